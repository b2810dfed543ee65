"""Every way a matrix lies in an h5ad gives the same rows; the packaged cells are rebuilt as counts."""

import anndata
import h5py
import numpy as np
import pytest
from scipy import sparse

from bmfm_pipeline.data.sources import h5ad, open_source, transposition, zheng68k_mini
from bmfm_pipeline.errors import DataError


def counts_of(n_cells=60, n_genes=25, seed=0):
    random = np.random.default_rng(seed)
    return sparse.csr_matrix(random.poisson(0.7, (n_cells, n_genes)).astype(np.float32))


def rows_of(source, rows_per_chunk=None):
    starts, chunks = zip(*source.iter_chunks(rows_per_chunk), strict=True)
    assert list(starts) == np.cumsum([0, *[chunk.shape[0] for chunk in chunks[:-1]]]).tolist()
    assert all(chunk.dtype == np.float32 and chunk.has_sorted_indices and chunk.data.all() for chunk in chunks)
    return sparse.vstack(chunks).toarray()


@pytest.mark.parametrize("kind", ["csr", "csc", "dense"])
@pytest.mark.parametrize("compression", [None, "gzip", "lzf"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.uint8])
def test_storage_does_not_matter(make_h5ad, kind, compression, dtype):
    counts = counts_of().astype(dtype)
    stored = {"csr": counts, "csc": counts.tocsc(), "dense": counts.toarray()}[kind]
    source = open_source(make_h5ad(stored, compression=compression))
    assert source.shape == counts.shape
    for rows_per_chunk in (None, 7, 1000):
        np.testing.assert_array_equal(rows_of(source, rows_per_chunk), counts.toarray())


@pytest.mark.parametrize("kind", ["csr", "csc", "dense"])
def test_chunks_are_bounded_by_values(make_h5ad, monkeypatch, kind):
    counts = counts_of(200, 30)
    monkeypatch.setattr(h5ad, "VALUES_PER_CHUNK", 100)
    monkeypatch.setattr(transposition, "VALUES_PER_BUCKET", 250)
    monkeypatch.setattr(transposition, "VALUES_PER_READ", 70)
    stored = {"csr": counts, "csc": counts.tocsc(), "dense": counts.toarray()}[kind]
    source = open_source(make_h5ad(stored))
    assert max(chunk.nnz for _, chunk in source.iter_chunks()) <= 100
    whole = list(source.iter_chunks(9))
    for first in (whole[3][0], whole[-1][0], 1, 200):  # from where a chunk begins, from within one, from the end
        rest = list(source.iter_chunks(9, first))
        expected = [(start, chunk) for start, chunk in whole if start >= first]
        assert [start for start, _ in rest] == [start for start, _ in expected]
        assert all((own != other).nnz == 0 for (_, own), (_, other) in zip(rest, expected, strict=True))
    np.testing.assert_array_equal(rows_of(source), counts.toarray())


def test_layer_and_raw_are_chosen_by_name(make_h5ad):
    counts, other = counts_of(), counts_of(seed=1)
    path = make_h5ad(counts * 2, layers={"counts": counts}, raw=other)
    np.testing.assert_array_equal(rows_of(open_source(path)), (counts * 2).toarray())
    np.testing.assert_array_equal(rows_of(open_source(path, layer="counts")), counts.toarray())
    np.testing.assert_array_equal(rows_of(open_source(path, layer="raw")), other.toarray())
    with pytest.raises(DataError, match=r"no layer 'spliced'; layers: counts and 'raw'"):
        open_source(path, layer="spliced")


def test_raw_that_is_not_there(make_h5ad):
    with pytest.raises(DataError, match=r"has no \.raw; layers: none"):
        open_source(make_h5ad(), layer="raw")


def test_unsorted_and_doubled_entries_are_put_right(make_h5ad):
    path = make_h5ad(counts_of(2, 3))
    with h5py.File(path, "r+") as file:
        del file["X/data"], file["X/indices"], file["X/indptr"]
        file["X/data"] = np.array([1, 2, 3, 0, 4], dtype=np.float32)
        file["X/indices"] = np.array([2, 0, 2, 1, 1], dtype=np.int32)
        file["X/indptr"] = np.array([0, 3, 5], dtype=np.int64)
    np.testing.assert_array_equal(rows_of(open_source(path)), [[2, 0, 4], [0, 4, 0]])


@pytest.mark.parametrize(("how", "expected"), [("sum", [[3, 3], [6, 0]]), ("first", [[1, 3], [4, 0]])])
@pytest.mark.parametrize("kind", ["csr", "csc", "dense"])
def test_duplicate_genes_are_merged_on_request(make_h5ad, how, expected, kind):
    counts = sparse.csr_matrix(np.array([[1, 3, 2], [4, 0, 2]], dtype=np.float32))
    stored = {"csr": counts, "csc": counts.tocsc(), "dense": counts.toarray()}[kind]
    source = open_source(make_h5ad(stored, genes=["G1", "G2", "G1"]), duplicate_genes=how)
    assert source.var_names == ["G1", "G2"]
    np.testing.assert_array_equal(rows_of(source), expected)


def test_missing_file_folder_and_other_formats(tmp_path):
    with pytest.raises(DataError, match=r"nothing\.h5ad: no such file"):
        open_source(tmp_path / "nothing.h5ad")
    with pytest.raises(DataError, match="is a folder"):
        open_source(tmp_path)
    text = tmp_path / "text.h5ad"
    text.write_text("cell,GENE1\nc1,3\n")
    with pytest.raises(DataError, match=r"not a readable h5ad.*write_h5ad"):
        open_source(text)
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["table"] = [1, 2]
    with pytest.raises(DataError, match=r"HDF5 but not an h5ad: it has no X, obs, var \(it has table\)"):
        open_source(tmp_path / "other.h5")


def test_truncated_file(make_h5ad):
    path = make_h5ad(counts_of(500, 200), compression=None)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=r"cut short|could not be read to its end"):
        list(open_source(path).iter_chunks())


def test_damaged_matrix(make_h5ad):
    path = make_h5ad(counts_of())
    with h5py.File(path, "r+") as file:
        file["X/indices"][3] = 99
    with pytest.raises(DataError, match=r"X is damaged: an index lies outside 0\.\.24"):
        list(open_source(path).iter_chunks())
    with h5py.File(path, "r+") as file:
        file["X/indptr"][5] = 10_000
    with pytest.raises(DataError, match=r"X is damaged: its indptr does not fit"):
        list(open_source(path).iter_chunks())


def test_a_file_that_changes_while_it_is_read(make_h5ad):
    path = make_h5ad(counts_of())
    source = open_source(path)
    chunks = source.iter_chunks(10)
    next(chunks)
    with h5py.File(path.with_name("other.h5ad"), "w") as file:
        file["X"] = [1]
    path.with_name("other.h5ad").replace(path)
    with pytest.raises(DataError, match="changed while it was being read"):
        list(chunks)


def test_the_packaged_cells(mini_h5ad, tmp_path):
    cells = anndata.read_h5ad(mini_h5ad)
    assert cells.shape == (700, 765)
    assert (cells.X.data == np.rint(cells.X.data)).all() and cells.X.data.min() == 1
    assert (np.minimum.reduceat(cells.X.data, cells.X.indptr[:-1]) == 1).all()
    assert cells.obs["celltype"].value_counts().to_dict()["Dendritic"] == 240
    assert cells.obs["celltype"].nunique() == 10
    assert _bytes(zheng68k_mini.build(tmp_path / "again.h5ad")) == _bytes(mini_h5ad)


def _bytes(path):
    with h5py.File(path, "r") as file:
        return [file[name][:].tobytes() for name in ("X/data", "X/indices", "X/indptr", "obs/celltype/codes")]
