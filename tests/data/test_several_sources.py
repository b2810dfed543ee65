"""Several h5ad files as one source: the same cells as joined in memory, whatever each file looks like."""

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from bmfm_pipeline.data.sources import check_source, h5ad, open_several, open_source
from bmfm_pipeline.data.sources.several import stacked_tables
from bmfm_pipeline.data.transforms import build_chain
from bmfm_pipeline.errors import DataError


def counts_of(n_cells: int, n_genes: int, seed: int) -> sparse.csr_matrix:
    dense = np.random.default_rng(seed).poisson(1.0, (n_cells, n_genes)).astype(np.float32)
    dense[:, 0] += 1
    return sparse.csr_matrix(dense)


def rows_of(source) -> np.ndarray:
    chunks = list(source.iter_chunks())
    assert [start for start, _ in chunks] == np.cumsum([0, *(chunk.shape[0] for _, chunk in chunks[:-1])]).tolist()
    for _, chunk in chunks:
        assert chunk.has_sorted_indices and chunk.data.all() and (np.diff(chunk.indptr) >= 0).all()
        fresh = sparse.csr_matrix((chunk.data, chunk.indices, chunk.indptr), shape=chunk.shape)
        assert fresh.has_sorted_indices
    return sparse.vstack([chunk for _, chunk in chunks]).toarray()


@pytest.fixture
def three(make_h5ad):
    """Files of 60, 40 and 30 cells: CSR, dense with genes in another order, and CSC in a layer that has genes of its own."""
    first, second, third = (counts_of(n_cells, 25, seed) for seed, n_cells in enumerate((60, 40, 30)))
    shuffled = [f"GENE{at}" for at in np.random.default_rng(3).permutation(25)]
    return {
        "a": make_h5ad(first, name="a.h5ad", cells=[f"a{row}" for row in range(60)], layers={"counts": first * 2}),
        "b": make_h5ad(second.toarray(), name="b.h5ad", genes=shuffled, cells=[f"b{row}" for row in range(40)],
                       layers={"counts": second.toarray() * 2}, obs={"age": np.arange(40)}),
        "c": make_h5ad(third.tocsc(), name="c.h5ad", genes=[f"GENE{at}" for at in range(20, 45)],
                       layers={"counts": third.tocsc() * 2}, cells=[f"c{row}" for row in range(30)]),
    }  # fmt: skip


@pytest.mark.parametrize(("layer", "values_per_chunk"), [(None, 500_000), ("counts", 70)])
def test_the_rows_are_those_of_a_join_in_memory(three, layer, values_per_chunk, monkeypatch):
    monkeypatch.setattr(h5ad, "VALUES_PER_CHUNK", values_per_chunk)
    source = open_several(three, layer)
    expected = anndata.concat([anndata.read_h5ad(path) for path in three.values()], join="outer", fill_value=0)
    expected = expected[:, source.var_names]
    assert source.shape == expected.shape == (130, 45)
    matrix = expected.X if layer is None else expected.layers[layer]
    np.testing.assert_array_equal(rows_of(source), matrix.toarray() if sparse.issparse(matrix) else matrix)
    np.testing.assert_array_equal(rows_of(source), rows_of(source))
    assert source.obs_names.tolist() == expected.obs_names.tolist()
    source.verify_unchanged()


def test_columns_of_obs_are_those_of_all_files(three):
    obs = open_several(three, cell_names="prefix").obs
    assert obs.index[[0, 60, 129]].tolist() == ["a:a0", "b:b0", "c:c29"]
    assert obs["file"].value_counts().to_dict() == {"a": 60, "b": 40, "c": 30}
    assert obs["celltype"].isna().sum() == 40 and isinstance(obs["celltype"].dtype, pd.CategoricalDtype)
    assert obs["age"].isna().sum() == 90 and obs["age"].iloc[99] == 39


def test_tables_of_unlike_columns():
    words, numbers = pd.Categorical(["x", "y"]), pd.Categorical([1, 2])
    tables = [
        pd.DataFrame({"c": words, "n": [1, 2], "flag": [True, False], "mixed": words}, index=["r0", "r1"]),
        pd.DataFrame({"c": pd.Categorical(["y", "z"]), "flag": [True, True], "mixed": numbers}, index=["r2", "r3"]),
        pd.DataFrame({"text": ["p", None]}, index=["r4", "r5"]),
    ]
    found = stacked_tables(tables)
    assert found["c"].astype(object).where(found["c"].notna(), None).tolist() == ["x", "y", "y", "z", None, None]
    assert found["n"].tolist()[:2] == [1, 2] and found["n"].isna().sum() == 4
    assert found["flag"].tolist()[:4] == [True, False, True, True] and found["flag"].isna().sum() == 2
    assert found["mixed"].tolist()[:4] == ["x", "y", 1, 2]
    assert found["text"].isna().tolist() == [True] * 4 + [False, True]
    assert stacked_tables(tables[:1])["n"].dtype == np.int64 and stacked_tables(tables[:2])["flag"].dtype == bool


def test_a_column_called_file_is_kept_under_another_name(make_h5ad):
    paths = {name: make_h5ad(obs={"file": [name * 2] * 60}, name=f"{name}.h5ad") for name in "ab"}
    obs = open_several(paths, cell_names="prefix").obs
    assert obs["file"].iloc[60] == "b" and obs["original_file"].iloc[60] == "bb"


def test_names_that_stand_twice_in_a_file_keep_their_own_columns(make_h5ad):
    stored = sparse.csr_matrix(np.array([[1, 2, 3], [4, 5, 6]], dtype=np.float32))
    paths = {
        "a": make_h5ad(stored, genes=["G1", "G2", "G1"], name="a.h5ad", obs={}),
        "b": make_h5ad(stored, genes=["G1", "G1", "G3"], name="b.h5ad", obs={}),
    }
    source = open_several(paths)
    assert source.var_names == ["G1", "G2", "G1", "G3"]
    np.testing.assert_array_equal(rows_of(source)[2:], [[1, 0, 2, 3], [4, 0, 5, 6]])
    summed = open_several(paths, duplicate_genes="sum")
    assert summed.var_names == ["G1", "G2", "G3"]
    np.testing.assert_array_equal(rows_of(summed), [[4, 2, 0], [10, 5, 0], [3, 0, 3], [9, 0, 6]])


def test_what_files_say_of_genes_is_put_together(make_h5ad):
    paths = {
        "a": make_h5ad(name="a.h5ad", var={"length": range(25)}),
        "b": make_h5ad(name="b.h5ad", genes=[f"GENE{at}" for at in range(20, 45)], var={"symbol": [f"S{at}" for at in range(25)]}),
    }  # fmt: skip
    var = open_several(paths).var
    assert var.loc["GENE20", "length"] == 20 and var.loc["GENE20", "symbol"] == "S0"
    assert var["length"].isna().sum() == 20 and var["symbol"].isna().sum() == 20


def test_the_same_cell_names_are_refused_with_the_files(make_h5ad):
    paths = {name: make_h5ad(name=f"{name}.h5ad") for name in "ab"}
    with pytest.raises(DataError, match=r"60 duplicate cell names.*cell0 in a, b;.*cell_names=prefix"):
        check_source(open_several(paths))
    found = check_source(open_several(paths, cell_names="prefix"), [("celltype", False)])
    assert found["cells"] == 120 and found["labels"]["celltype"]["classes"] == 3


def test_a_file_that_changes_while_others_are_read(three):
    source = open_several(three)
    with open(three["c"], "ab") as stream:
        stream.write(b"more")
    with pytest.raises(DataError, match=r"c\.h5ad: changed while it was being read"):
        list(source.iter_chunks())


def test_a_chain_over_files_is_that_over_their_join(three, tmp_path):
    steps = [
        {"transform_name": "LogTransform", "transform_args": {}},
        {"transform_name": "HighlyVariableGenesTransform", "transform_args": {"n_top_genes": 20, "batch_key": "study", "flavor": "seurat"}},
        {"transform_name": "FilterCellsTransform", "transform_args": {"min_genes": 3}},
    ]  # fmt: skip
    source = open_several(three)
    tables = {name: anndata.read_h5ad(path) for name, path in three.items()}
    joined = anndata.concat(tables, join="outer", fill_value=0, label="study")[:, source.var_names].copy()
    joined.write_h5ad(tmp_path / "joined.h5ad")
    results = []
    for number, cells in enumerate((open_source(tmp_path / "joined.h5ad"), source)):
        steps[1]["transform_args"]["batch_key"] = ("study", "file")[number]
        report = build_chain(steps).run(cells, np.arange(0, 130, 2), tmp_path / f"{number}.h5ad", {})
        results.append((anndata.read_h5ad(tmp_path / f"{number}.h5ad"), [step.cells for step in report.steps]))
    (one, counted_one), (several, counted) = results
    assert counted == counted_one and several.n_vars == 20
    assert one.var_names.tolist() == several.var_names.tolist()
    np.testing.assert_array_equal(one.X.toarray(), several.X.toarray())
    np.testing.assert_array_equal(one.layers["counts"].toarray(), several.layers["counts"].toarray())
