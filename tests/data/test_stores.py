"""Every kind of store gives the rows that scipy gives, and batches that do not depend on the kind."""

import pickle
import zlib
from concurrent.futures import ThreadPoolExecutor

import anndata
import numpy as np
import pandas as pd
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import sparse

from bmfm_pipeline.batching import BatchBuilder, BatchingConfig, FieldSpec
from bmfm_pipeline.data import CellStore, open_store
from bmfm_pipeline.data.processed import ProcessedWriter
from bmfm_pipeline.data.stores import JoinedStore, MemoryStore, ZarrStore, write_zarr
from bmfm_pipeline.data.stores.matrices import is_ascending
from bmfm_pipeline.errors import DataError, StorageError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:zarr", "ignore:.*zarr.*:UserWarning")
KINDS = ("mapped", "memory", "joined", "zarr")


def random_cells(n_cells: int, n_genes: int, density: float = 0.4, seed: int = 0) -> sparse.csr_matrix:
    dense = np.random.default_rng(seed).poisson(density, (n_cells, n_genes))
    return sparse.csr_matrix(dense.astype(np.uint8))


def names_of(matrix, prefix: str = "cell") -> list[str]:
    return [f"{prefix}{number}" for number in range(matrix.shape[0])]


def genes_of(matrix) -> list[str]:
    return [f"GENE{number}" for number in range(matrix.shape[1])]


def write_h5ad(path, matrix, counts=None, obs=None, genes=None):
    table = pd.DataFrame(obs or {}, index=names_of(matrix))
    with ProcessedWriter(path, table, genes or genes_of(matrix), matrix.shape) as writer:
        for name, values in (("X", matrix), ("layers/counts", counts)):
            if values is not None:
                writer.matrix(name, np.diff(values.indptr), values.dtype)
                writer.fill(name, values)
    return path


def anndata_zarr(path, matrix, counts=None, obs=None, chunk=7):
    """anndata's own writing, in chunks so small that rows straddle them."""
    cells = anndata.AnnData(
        matrix,
        obs=pd.DataFrame(obs or {}, index=names_of(matrix)),
        var=pd.DataFrame(index=genes_of(matrix)),
        layers=None if counts is None else {"counts": counts},
    )

    cells.strings_to_categoricals()  # as anndata's own `write_zarr` does

    def in_chunks(write, store, key, element, *, dataset_kwargs, iospec):
        small = key.split("/")[-1] in ("indices", "data") or key in ("X", "/X", "/layers/counts")
        write(store, key, element, dataset_kwargs={**dataset_kwargs, "chunks": (chunk,)} if small else dataset_kwargs)

    anndata.experimental.write_dispatched(zarr.open_group(str(path), mode="w"), "/", cells, in_chunks)
    return path


def make_store(kind: str, folder, matrix, counts=None, obs=None):
    if kind == "mapped":
        return CellStore(write_h5ad(folder / "cells.h5ad", matrix, counts, obs))
    if kind == "zarr":
        return ZarrStore(anndata_zarr(folder / "cells.zarr", matrix, counts, obs))
    table = pd.DataFrame(obs or {}, index=names_of(matrix))
    if kind == "memory":
        return MemoryStore(matrix, names_of(matrix), genes_of(matrix), obs=table, counts=counts)
    cut, order = matrix.shape[0] // 3, np.arange(matrix.shape[1])[::-1]
    parts = []
    for rows, columns in ((slice(0, cut), np.arange(matrix.shape[1])), (slice(cut, None), order)):
        parts.append(
            MemoryStore(
                matrix[rows][:, columns],
                names_of(matrix)[rows],
                np.array(genes_of(matrix), dtype=object)[columns],
                obs=table.iloc[rows],
                counts=None if counts is None else counts[rows][:, columns],
            )
        )
    return JoinedStore(parts)


@st.composite
def matrices_and_rows(draw):
    n_cells, n_genes = draw(st.integers(1, 12)), draw(st.integers(1, 9))
    values = draw(st.lists(st.integers(0, 3), min_size=n_cells * n_genes, max_size=n_cells * n_genes))
    rows = draw(st.lists(st.integers(0, n_cells - 1), max_size=20))
    return np.array(values, dtype=np.uint8).reshape(n_cells, n_genes), np.array(rows, dtype=np.int64)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=matrices_and_rows())
def test_rows_are_those_of_scipy(kind, case, tmp_path_factory):
    dense, rows = case
    matrix = sparse.csr_matrix(dense)
    counts = sparse.csr_matrix(dense.astype(np.uint16) * 300)
    store = make_store(kind, tmp_path_factory.mktemp(kind), matrix, counts)
    assert store.shape == dense.shape and store.var_names == genes_of(matrix)
    for own, expected in ((store.matrix, matrix), (store.counts, counts)):
        indptr, indices, data = own.gather(rows)
        assert indptr.dtype == np.int64 and indices.dtype == np.int32 and data.dtype == expected.dtype
        assert is_ascending(indptr, indices)
        np.testing.assert_array_equal(own.rows(rows).toarray(), expected[rows].toarray())
        np.testing.assert_array_equal(indptr, expected[rows].indptr)
        assert (own.row_sizes >= np.diff(expected.indptr)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_that_does_not_exist_is_refused(kind, tmp_path):
    store = make_store(kind, tmp_path, random_cells(6, 4))
    np.testing.assert_array_equal(store.rows([-1]).toarray(), store.rows([5]).toarray())
    for rows in ([6], [-7]):
        with pytest.raises(DataError, match=r"the store has rows 0..5"):
            store.rows(rows)


@pytest.mark.parametrize("kind", KINDS)
def test_columns_labels_keys_and_pickles_are_alike(kind, tmp_path):
    obs = {
        "celltype": ["A", "B", None, "A", "B", "A"],
        "age": [1.5, np.nan, 3, 4, 5, 6],
        "split": ["train"] * 4 + ["dev", "test"],
    }
    store = make_store(kind, tmp_path, random_cells(6, 5), random_cells(6, 5, seed=1), obs)
    copy = pickle.loads(pickle.dumps(store))
    for one in (store, copy):
        assert one.labels("celltype", {"A": 0, "B": 1}).tolist() == [0, 1, -100, 0, 1, 0]
        np.testing.assert_array_equal(one.labels("age", None), np.array(obs["age"], np.float32))
        assert one.rows_of_split("train", "split").tolist() == [0, 1, 2, 3]
        assert one.obs_names.tolist() == [f"cell{number}" for number in range(6)]
        assert one.cell_keys.tolist() == [zlib.crc32(name.encode()) for name in one.obs_names]
        assert list(one.obs.columns) == list(obs) and one.obs.index.tolist() == one.obs_names.tolist()
        with pytest.raises(DataError, match=r"obs has no column 'tissue'; columns: age, celltype, split"):
            one.column("tissue")
    np.testing.assert_array_equal(copy.rows([4, 0]).toarray(), store.rows([4, 0]).toarray())


def _builder(store) -> BatchBuilder:
    fields = [
        FieldSpec("genes", "genes", vocab_size=45, column_ids=np.arange(5, 45, dtype=np.int32)),
        FieldSpec("expressions", "values", is_masked=True, vocab_size=25, value_ids=np.arange(5, 25, dtype=np.int32)),
        FieldSpec("label_expressions", "values", is_input=False, vocab_size=300, layer="counts",
                  value_ids=np.arange(5, 300, dtype=np.int32)),
    ]  # fmt: skip
    return BatchBuilder(store, fields, BatchingConfig(max_length=32, collation_strategy="language_modeling"))


def test_batches_do_not_depend_on_the_kind_of_store(tmp_path):
    matrix = random_cells(30, 40)
    counts = sparse.csr_matrix(matrix.toarray() * 3)
    rows = np.array([29, 3, 3, 17, 0])
    batches = {}
    for kind in KINDS:
        (tmp_path / kind).mkdir()
        builder = _builder(make_store(kind, tmp_path / kind, matrix, counts))
        batches[kind] = [builder.build(rows, epoch) for epoch in (0, 1)]
        assert builder.report.cells_built == 10
    for kind in KINDS[1:]:
        for batch, expected in zip(batches[kind], batches["mapped"], strict=True):
            assert batch["cell_name"] == expected["cell_name"]
            for name in ("input_ids", "attention_mask", "cell_index"):
                assert batch[name].equal(expected[name]), (kind, name)
            assert batch["labels"]["expressions"].equal(expected["labels"]["expressions"])
    assert batches["zarr"][0]["cell_index"].tolist() == rows.tolist()


def test_joined_files_are_aligned_to_a_gene_list_and_say_what_they_lack(tmp_path):
    one = write_h5ad(tmp_path / "one.h5ad", sparse.csr_matrix(np.array([[1, 2, 3]], np.uint8)), genes=["a", "b", "c"])
    two = tmp_path / "two.h5ad"
    matrix = sparse.csr_matrix(np.array([[4, 5], [0, 6]], np.uint16))
    with ProcessedWriter(two, pd.DataFrame({"age": [7.0, 8.0]}, index=["x", "y"]), ["c", "d"], (2, 2)) as writer:
        writer.matrix("X", np.diff(matrix.indptr), matrix.dtype)
        writer.fill("X", matrix)
    everything = open_store([one, two])
    assert everything.var_names == ["a", "b", "c", "d"]
    assert everything.rows([2, 0, 1]).toarray().tolist() == [[0, 0, 0, 6], [1, 2, 3, 0], [0, 0, 4, 5]]
    assert everything.obs_names.tolist() == ["cell0", "x", "y"]
    assert np.isnan(everything.column("age")[0]) and everything.column("age")[1:].tolist() == [7, 8]
    assert everything.counts is None and not everything.contiguous
    chosen = open_store([one, two], genes=["d", "c", "z"])
    assert chosen.rows([0, 1, 2]).toarray().tolist() == [[0, 3, 0], [5, 4, 0], [6, 0, 0]]
    assert chosen.gene_report == [
        {"store": str(one), "genes": 3, "left_out": 2, "left_out_examples": ["a", "b"], "absent": 2},
        {"store": str(two), "genes": 2, "left_out": 0, "left_out_examples": [], "absent": 1},
    ]


def test_joined_files_with_the_same_cell_names(tmp_path):
    path = write_h5ad(tmp_path / "one.h5ad", random_cells(2, 3))
    with pytest.raises(DataError, match=r"2 cell names occur more than once, e.g. cell0, cell1; set unique_names=True"):
        open_store([path, path])
    store = open_store([path, path], unique_names=True)
    assert store.obs_names.tolist() == ["cell0-0", "cell1-0", "cell0-1", "cell1-1"]
    assert store.obs.index.tolist() == store.obs_names.tolist()


def test_joined_files_that_cannot_be_aligned(tmp_path):
    matrix = random_cells(2, 3)
    with_counts = MemoryStore(matrix, ["a", "b"], genes_of(matrix), counts=matrix)
    without = MemoryStore(matrix, ["c", "d"], genes_of(matrix))
    with pytest.raises(DataError, match="only some of the joined files have counts; without: cells in memory"):
        _ = JoinedStore([with_counts, without]).counts
    with pytest.raises(DataError, match="a gene name occurs more than once"):
        JoinedStore([MemoryStore(matrix, ["e", "f"], ["G", "G", "H"])])
    with pytest.raises(DataError, match="the gene list names 1 genes more than once"):
        JoinedStore([without], ["GENE0", "GENE0"])
    with pytest.raises(DataError, match="name at least one file"):
        open_store([])


def test_disorder_is_put_right_in_memory_and_refused_when_written(tmp_path):
    disorderly = sparse.csr_matrix(
        (np.array([1, 2, 3, 4], np.uint8), np.array([2, 0, 2, 2]), np.array([0, 2, 4])), shape=(2, 3)
    )
    store = MemoryStore(disorderly, ["a", "b"], ["x", "y", "z"])
    assert store.rows([0, 1]).toarray().tolist() == [[2, 0, 1], [0, 0, 7]]
    assert store.indices.tolist() == [0, 2, 2] and disorderly.indices.tolist() == [2, 0, 2, 2]
    with (
        pytest.raises(DataError, match="a cell names the same gene twice in X"),
        ProcessedWriter(tmp_path / "x.h5ad", pd.DataFrame(index=["a", "b"]), ["x", "y", "z"], (2, 3)) as writer,
    ):
        writer.matrix("X", np.array([2, 2]), np.dtype(np.uint8))
        writer.fill("X", disorderly)


def test_sizes_that_do_not_fit_are_refused():
    matrix = random_cells(3, 2)
    with pytest.raises(DataError, match="obs_names has 2 entries, the matrix 3 rows"):
        MemoryStore(matrix, ["a", "b"], ["x", "y"])
    with pytest.raises(DataError, match="var_names has 1 entries, the matrix 2 columns"):
        MemoryStore(matrix, ["a", "b", "c"], ["x"])
    with pytest.raises(DataError, match="cells x genes must be the same"):
        MemoryStore(matrix, ["a", "b", "c"], ["x", "y"], counts=matrix[:, :1])


def test_an_anndata_becomes_a_store():
    matrix = random_cells(4, 3)
    cells = anndata.AnnData(matrix, obs=pd.DataFrame({"celltype": list("ABAB")}, index=names_of(matrix)))
    cells.layers["counts"] = matrix * 2
    store = MemoryStore.from_anndata(cells)
    np.testing.assert_array_equal(store.counts.rows([1]).toarray(), 2 * matrix[[1]].toarray())
    assert store.column("celltype").tolist() == list("ABAB") and store.var_names == ["0", "1", "2"]


@pytest.mark.parametrize("chunks_per_file", [None, 4])
def test_any_store_can_be_written_as_zarr_that_anndata_reads(tmp_path, chunks_per_file, monkeypatch):
    matrix, obs = random_cells(60, 30), {"celltype": list("ABC") * 20}
    store = make_store("joined", tmp_path, matrix, sparse.csr_matrix(matrix.toarray() * 2), obs)
    chosen = JoinedStore([store], [f"GENE{number}" for number in range(0, 30, 2)])
    monkeypatch.setattr("bmfm_pipeline.data.stores.writing._VALUES_AT_ONCE", 100)
    path = write_zarr(chosen, tmp_path / "new.zarr", values_per_chunk=16, chunks_per_file=chunks_per_file)
    again, cells = ZarrStore(path), anndata.read_zarr(path)
    np.testing.assert_array_equal(again.rows(np.arange(60)).toarray(), matrix.toarray()[:, ::2])
    np.testing.assert_array_equal(cells.X.toarray(), matrix.toarray()[:, ::2])
    np.testing.assert_array_equal(cells.layers["counts"].toarray(), 2 * matrix.toarray()[:, ::2])
    assert again.column("celltype").tolist() == obs["celltype"] == cells.obs["celltype"].tolist()
    with pytest.raises(StorageError, match="exists and is not overwritten"):
        write_zarr(chosen, path)


def test_zarr_reads_only_the_chunks_it_needs_and_forgets_the_oldest(tmp_path):
    matrix = random_cells(200, 30)
    store = ZarrStore(anndata_zarr(tmp_path / "cells.zarr", matrix, chunk=10), cache_bytes=600)
    store.rows([5])
    first = store.cache.reads
    assert 2 <= first <= 6  # of some 260 chunks, two or three of indices and as many of data
    store.rows([5])
    assert store.cache.reads == first
    np.testing.assert_array_equal(store.rows(np.arange(200)).toarray(), matrix.toarray())
    assert store.cache._bytes <= 600
    store.rows([5])
    assert store.cache.reads > first + 10


def test_zarr_is_read_by_many_threads_at_once(tmp_path):
    matrix = random_cells(300, 30)
    store = ZarrStore(anndata_zarr(tmp_path / "cells.zarr", matrix, chunk=50))
    batches = [np.random.default_rng(number).integers(0, 300, 20) for number in range(40)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda rows: store.rows(rows).toarray(), batches))
    for rows, values in zip(batches, found, strict=True):
        np.testing.assert_array_equal(values, matrix[rows].toarray())
    assert store.cache.reads == 2 * -(-matrix.nnz // 50)  # every chunk once


def test_damaged_zarr_is_refused(tmp_path):
    matrix = random_cells(40, 20)
    anndata_zarr(tmp_path / "cells.zarr", matrix, chunk=20)
    for name, message in (("data", "chunk 1 of X/data is missing"), ("indices", "the same gene column twice")):
        anndata_zarr(tmp_path / "cells.zarr", matrix, chunk=20)
        chunk = next(path for path in (tmp_path / "cells.zarr" / "X" / name).rglob("*") if path.name == "1")
        chunk.unlink()
        with pytest.raises(DataError, match=message):
            ZarrStore(tmp_path / "cells.zarr").rows(np.arange(40))
    dense = anndata.AnnData(matrix.toarray())
    dense.write_zarr(tmp_path / "dense.zarr")
    with pytest.raises(DataError, match="X is stored as array, CSR is needed"):
        ZarrStore(tmp_path / "dense.zarr")
    zarr.open_group(str(tmp_path / "empty.zarr"), mode="w")
    with pytest.raises(DataError, match="is no AnnData: it lacks X, obs or var"):
        open_store(tmp_path / "empty.zarr")


def test_addresses_that_are_no_store(tmp_path):
    with pytest.raises(DataError, match=r"neither an .h5ad file nor a .zarr folder"):
        open_store(tmp_path / "cells.csv")
    with pytest.raises(DataError, match=r"no such file; make it with `bmfm preprocess`"):
        open_store(tmp_path / "cells.h5ad")
    (tmp_path / "text.h5ad").write_text("no")
    with pytest.raises(DataError, match="cannot be read as h5ad"):
        open_store(tmp_path / "text.h5ad")
