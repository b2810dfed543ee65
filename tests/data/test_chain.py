"""Chains: checked when built, the same whatever the chunk size, fitted on training rows, and carried into prediction."""

import anndata
import numpy as np
import pytest
from scipy import sparse

from bmfm_pipeline.data.sources import h5ad, open_source
from bmfm_pipeline.data.store import CellStore
from bmfm_pipeline.data.transforms import Chain, build_chain
from bmfm_pipeline.errors import ConfigError, DataError


def step(name, **arguments):
    return {"transform_name": name, "transform_args": arguments}


GENERIC = [
    step("RenameGenesTransform", gene_map=None),
    step("NormalizeTotalTransform", target_sum=10000.0),
    step("LogTransform", base=2),
    step("BinTransform", num_bins=10, binning_method="int_cast"),
    step("FilterCellsTransform", min_counts=2),
    step("FilterGenesTransform", min_counts=1),
]
EVERYTHING = [
    step("FilterCellsTransform", min_counts=5),
    step("FilterGenesTransform", min_cells=3),
    step("QcMetricsTransform", pct_counts_mt=60, total_counts_iqr_scale=3),
    step("NormalizeTotalTransform", target_sum=None, exclude_highly_expressed=True, max_fraction=0.3),
    step("LogTransform"),
    step("HighlyVariableGenesTransform", n_top_genes=15),
    step("BinTransform", num_bins=5, binning_method="value_binning"),
]


def counts_of(n_cells=120, n_genes=40, seed=0):
    random = np.random.default_rng(seed)
    dense = random.poisson(random.gamma(0.5, 2, n_genes), (n_cells, n_genes)).astype(np.float32)
    dense[:, 0] += 1
    return sparse.csr_matrix(dense)


def run(path, steps, out, rows=None, **settings):
    chain = build_chain(steps)
    report = chain.run(open_source(path), rows, out, {}, **settings)
    return chain, report, anndata.read_h5ad(out)


@pytest.mark.parametrize("steps", [GENERIC, EVERYTHING, []], ids=["generic", "everything", "none"])
@pytest.mark.parametrize("kind", ["csr", "csc", "dense"])
def test_chunk_size_and_storage_do_not_change_the_result(make_h5ad, tmp_path, monkeypatch, steps, kind):
    counts = counts_of()
    genes = [f"MT-{index}" if index < 3 else f"GENE{index}" for index in range(40)]
    whole = run(make_h5ad(counts, genes=genes), steps, tmp_path / "whole.h5ad")[2]
    monkeypatch.setattr(h5ad, "VALUES_PER_CHUNK", 97)
    stored = {"csr": counts, "csc": counts.tocsc(), "dense": counts.toarray()}[kind]
    pieces = run(make_h5ad(stored, genes=genes), steps, tmp_path / "pieces.h5ad")[2]
    assert whole.shape[0] > 50 and whole.obs_names.equals(pieces.obs_names) and whole.var_names.equals(pieces.var_names)
    np.testing.assert_array_equal(whole.X.toarray(), pieces.X.toarray())
    np.testing.assert_array_equal(whole.layers["counts"].toarray(), pieces.layers["counts"].toarray())


def test_counts_are_those_of_the_kept_cells_and_genes(make_h5ad, tmp_path):
    path = make_h5ad(counts_of())
    _, report, result = run(path, EVERYTHING, tmp_path / "out.h5ad")
    given = anndata.read_h5ad(path)
    np.testing.assert_array_equal(
        result.layers["counts"].toarray(), given[result.obs_names, result.var_names].X.toarray()
    )
    assert report.steps[-1].counts == result.layers["counts"].sum()
    assert report.share_of_counts == pytest.approx(result.layers["counts"].sum() / given.X.sum())
    assert result.layers["counts"].dtype == np.uint8


def test_report_counts_cells_genes_and_counts_after_every_step(make_h5ad, tmp_path):
    counts = counts_of()
    dense = counts.toarray()
    dense[:30, 1:] = 0  # 30 cells with few counts
    dense[:, 39] = 0  # a gene that nothing expresses
    dense[:30, 0] = 1
    steps = [step("FilterCellsTransform", min_counts=2), step("FilterGenesTransform", min_counts=1)]
    _, report, result = run(make_h5ad(sparse.csr_matrix(dense)), steps, tmp_path / "out.h5ad")
    found = [(entry.step, entry.cells, entry.genes, entry.counts) for entry in report.steps]
    left, expressed = dense[30:].sum(), int((dense[30:].sum(axis=0) > 0).sum())
    assert expressed < 40
    assert found[:3] == [
        ("input", 120, 40, dense.sum()),
        ("FilterCells(min_counts=2)", 90, 40, left),
        ("FilterGenes(min_counts=1)", 90, expressed, left),
    ]
    assert report.dropped_cells == {"FilterCells(min_counts=2)": 30}
    assert report.dropped_examples["cells"] == [f"cell{index}" for index in range(5)]
    assert result.shape == (90, expressed)


def test_cells_without_values_are_left_out_and_counted(make_h5ad, tmp_path):
    dense = counts_of().toarray()
    dense[[3, 8]] = 0
    path = make_h5ad(sparse.csr_matrix(dense))
    _, report, result = run(path, [], tmp_path / "out.h5ad")
    assert report.dropped_cells == {"drop cells without values": 2}
    assert report.dropped_examples["cells"] == ["cell3", "cell8"]
    assert result.n_obs == 118
    assert run(path, [], tmp_path / "all.h5ad", keep_empty=True)[2].n_obs == 120


def test_statistics_come_from_training_rows_only(make_h5ad, tmp_path):
    dense = counts_of().toarray()
    dense[:, 39] = 0
    dense[100:, 39] = 5  # a gene that only test cells express
    path = make_h5ad(sparse.csr_matrix(dense))
    training = np.arange(100)
    steps = [step("FilterGenesTransform", min_counts=1), step("NormalizeTotalTransform", target_sum=None)]
    chain, _, result = run(path, steps, tmp_path / "train.h5ad", rows=training)
    assert "GENE39" not in result.var_names and result.n_obs == 120
    assert chain.to_json()[1]["fitted"]["target"] == np.median(dense[:100].sum(axis=1))
    assert "GENE39" in run(path, steps, tmp_path / "all.h5ad")[2].var_names


@pytest.mark.parametrize("steps", [GENERIC, EVERYTHING], ids=["generic", "everything"])
def test_a_stored_chain_gives_new_cells_the_same_values(make_h5ad, tmp_path, steps):
    import json

    path = make_h5ad(counts_of())
    chain, _, result = run(path, steps, tmp_path / "out.h5ad")
    restored = Chain.from_json(json.loads(json.dumps(chain.to_json(), allow_nan=False)))
    given = anndata.read_h5ad(path)
    applied = restored.apply_to_cells(given.X, given.var_names.tolist())
    assert applied.gene_names == result.var_names.tolist()
    assert applied.values.shape[0] == 120  # filters of cells do not apply
    kept = given.obs_names.get_indexer(result.obs_names)
    np.testing.assert_array_equal(applied.values.toarray()[kept], result.X.toarray())
    assert applied.reasons == [None] * 120


@pytest.mark.parametrize("steps", [GENERIC, EVERYTHING], ids=["generic", "everything"])
def test_a_fitted_chain_writes_other_cells_as_prediction_sees_them_and_filters_none_out(make_h5ad, tmp_path, steps):
    chain, _, result = run(make_h5ad(counts_of(), name="own.h5ad"), steps, tmp_path / "own-out.h5ad")
    restored, other = Chain.from_json(chain.to_json()), counts_of(n_cells=30, seed=7).tolil()
    other[4] = 0
    other[4, 1] = 3  # few counts, which both filters of cells would leave out
    other[5] = 0
    cells = open_source(make_h5ad(other.tocsr(), name="other.h5ad"))
    report = restored.run(cells, None, tmp_path / "out.h5ad", {}, fitted=True, row_filters=False)
    written = anndata.read_h5ad(tmp_path / "out.h5ad")
    assert written.var_names.tolist() == restored.fitted_genes(cells.var_names) == result.var_names.tolist()
    applied = restored.apply_to_cells(other.tocsr(), cells.var_names)
    usable = [row for row, reason in enumerate(applied.reasons) if reason is None]
    assert written.obs_names.tolist() == [cells.obs_names[row] for row in usable] and 5 not in usable
    assert report.dropped_cells == {"drop cells without values": 30 - len(usable)}
    np.testing.assert_array_equal(written.X.toarray(), applied.values.toarray()[usable])
    assert restored.to_json() == chain.to_json()


def test_a_cell_is_transformed_alike_alone_and_in_company(make_h5ad, tmp_path):
    path = make_h5ad(counts_of())
    chain, _, _ = run(path, EVERYTHING, tmp_path / "out.h5ad")
    given = anndata.read_h5ad(path)
    together = chain.apply_to_cells(given.X, given.var_names.tolist()).values.toarray()
    for row in (0, 17, 119):
        np.testing.assert_array_equal(
            chain.apply_to_cells(given.X[[row]], given.var_names.tolist()).values.toarray()[0], together[row]
        )


def test_unusable_cells_are_flagged_with_a_reason(make_h5ad, tmp_path):
    chain, _, result = run(make_h5ad(counts_of()), GENERIC, tmp_path / "out.h5ad")
    cells = np.zeros((4, 3), dtype=np.float32)
    cells[0, 0], cells[1, 2], cells[3, 0] = 3, 2, -1
    names = [*result.var_names[:2], "STRANGE"]
    applied = chain.apply_to_cells(sparse.csr_matrix(cells), names)
    assert applied.reasons == [
        None,
        "no gene that the model knows is expressed",
        "no expressed gene",
        "holds negative, NaN or infinite values",
    ]
    with pytest.raises(DataError, match=r"none of the 1 genes is one the model was made with, e\.g\. STRANGE"):
        chain.apply_to_cells(sparse.csr_matrix(cells[:, 2:]), ["STRANGE"])


def test_unknown_step_and_argument_are_refused_with_a_suggestion():
    with pytest.raises(
        ConfigError, match=r"transforms\.1: unknown transform 'BinTransfrom'; did you mean 'BinTransform'"
    ):
        build_chain([step("LogTransform"), step("BinTransfrom")])
    with pytest.raises(ConfigError, match=r"transforms\.0 \(BinTransform\).*'num_bin'.*did you mean 'num_bins'"):
        build_chain([step("BinTransform", num_bin=10)])
    with pytest.raises(ConfigError, match="give exactly one of min_counts, max_counts, min_genes, max_genes; found 2"):
        build_chain([step("FilterCellsTransform", min_counts=1, max_counts=5)])
    with pytest.raises(ConfigError, match="num_bins is needed for binning_method percentile"):
        build_chain([step("BinTransform")])


def test_filters_that_leave_nothing_say_which_one(make_h5ad, tmp_path):
    with pytest.raises(DataError, match=r"no cell is left.*FilterCells\(min_counts=1e\+06\): 0 cells.*loosen"):
        run(make_h5ad(counts_of()), [step("FilterCellsTransform", min_counts=1e6)], tmp_path / "out.h5ad")


def test_genes_renamed_by_a_column_a_file_and_upper_case(make_h5ad, tmp_path):
    path = make_h5ad(counts_of(20, 4), genes=["ENSG1", "ENSG2", "ENSG3", "ENSG4"], var={"symbol": ["a", "b", "a", ""]})
    chain, report, result = run(
        path, [step("RenameGenesTransform", gene_map="var:symbol", upper_case=True)], tmp_path / "out.h5ad"
    )
    assert result.var_names.tolist() == ["A", "B"]
    assert report.steps[1].genes == 2 and report.steps[1].counts < report.steps[0].counts
    applied = Chain.from_json(chain.to_json()).apply_to_cells(
        sparse.csr_matrix(np.ones((1, 2), np.float32)), ["ENSG2", "ENSG9"]
    )
    assert applied.gene_names == ["B"]
    table = tmp_path / "names.tsv"
    table.write_text("ENSG1\tfirst\nENSG4\tlast\n")
    assert run(path, [step("RenameGenesTransform", gene_map=str(table))], tmp_path / "file.h5ad")[
        2
    ].var_names.tolist() == ["first", "last"]
    with pytest.raises(DataError, match=r"var has no column 'name' \(columns: symbol\)"):
        run(path, [step("RenameGenesTransform", gene_map="var:name")], tmp_path / "bad.h5ad")
    with pytest.raises(DataError, match=r"gene_map names none of the 4 genes, e\.g\. ENSG1"):
        run(path, [step("RenameGenesTransform", gene_map={"x": "y"})], tmp_path / "bad.h5ad")


def test_genes_of_the_vocabulary_are_those_of_the_processed_file(make_h5ad, tmp_path):
    path = make_h5ad(counts_of())
    training = np.arange(60)
    for steps in (GENERIC, EVERYTHING, []):
        expected = run(path, steps, tmp_path / "out.h5ad", rows=training)[2].var_names.tolist()
        assert build_chain(steps).vocabulary_genes(open_source(path), training) == expected


def test_counts_are_asked_for_only_where_they_are_normalised():
    assert build_chain(GENERIC).needs_counts
    assert not build_chain(
        [step("ScaleCountsTransform", scale_factor=10), step("BinTransform", binning_method="int_cast")]
    ).needs_counts


def test_values_that_are_no_counts_are_not_stored_as_counts(make_h5ad, tmp_path):
    counts = counts_of()
    counts.data = np.log1p(counts.data)
    steps = [step("ScaleCountsTransform", scale_factor=10), step("BinTransform", binning_method="int_cast")]
    _, report, result = run(make_h5ad(counts), steps, tmp_path / "out.h5ad")
    assert "counts" not in result.layers and "no counts" in report.notes[0]
    assert CellStore(tmp_path / "out.h5ad").counts is None


def test_a_source_that_changes_stops_the_chain(make_h5ad, tmp_path):
    path = make_h5ad(counts_of())
    source = open_source(path)
    assert source.obs.shape[0] == 120
    path.write_bytes(path.read_bytes() + b"0")
    with pytest.raises(DataError, match="changed while it was being read"):
        build_chain(GENERIC).run(source, None, tmp_path / "out.h5ad", {})
