"""Single steps: percentile bins as numpy makes them, transcripts per million, and the list of all transforms."""

import anndata
import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from bmfm_pipeline.data.sources import h5ad, open_source
from bmfm_pipeline.data.transforms import STEPS, Chain, build_chain, list_transforms
from bmfm_pipeline.data.transforms.binning import Bin
from bmfm_pipeline.errors import ConfigError, DataError, StorageError


def step(name, **arguments):
    return {"transform_name": name, "transform_args": arguments}


def run(path, steps, out, **settings):
    chain = build_chain(steps)
    report = chain.run(open_source(path), None, out, {}, **settings)
    return chain, report, anndata.read_h5ad(out)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(2**-10, 2**20, width=32), min_size=1, max_size=40), st.integers(2, 12))
def test_percentile_bins_are_those_of_numpy(values, n_bins):
    row = np.array(values, dtype=np.float32)
    edges = np.percentile(row, np.linspace(0, 100, n_bins + 1))
    expected = np.clip(np.digitize(row, edges), 1, n_bins)
    chunk = sparse.csr_matrix((row.copy(), np.arange(len(row)), [0, len(row)]), shape=(1, len(row)))
    found = Bin(num_bins=n_bins, binning_method="percentile").values(chunk, [])
    np.testing.assert_array_equal(found.data, expected)


GTF = """#!genome-build test
chr1\tx\tgene\t1\t1000\t.\t+\t.\tgene_id "ENSG1.4"; gene_name "A";
chr1\tx\texon\t1\t100\t.\t+\t.\tgene_id "ENSG1.4"; gene_name "A";
chr1\tx\texon\t51\t200\t.\t+\t.\tgene_id "ENSG1.4"; gene_name "A";
chr1\tx\texon\t901\t1000\t.\t-\t.\tgene_id "ENSG2.1"; gene_name "B";
chr2\tx\texon\t1\t400\t.\t-\t.\tgene_id "ENSG3.2"; gene_name "C";
"""


@pytest.mark.parametrize(
    "genes", [["A", "none", "B", "C"], ["ENSG1", "none", "ENSG2", "ENSG3"], ["ENSG1.4", "none", "ENSG2.1", "ENSG3.2"]]
)
def test_transcripts_per_million(make_h5ad, tmp_path, genes):
    gtf = tmp_path / "genes.gtf"
    gtf.write_text(GTF)
    counts = np.array([[10, 5, 10, 0], [0, 0, 0, 0], [2, 1, 0, 4], [20, 0, 0, 0]], dtype=np.float32)
    path = make_h5ad(sparse.csr_matrix(counts), genes=genes)
    steps = [step("TPMNormalizationTransform", gtf_file=str(gtf), filter_genes_min_percentage=0.4)]
    chain, report, result = run(path, steps, tmp_path / "out.h5ad")
    rates = counts[[0, 2, 3]][:, [0, 2, 3]] / np.array([200, 100, 400])
    expected = (rates / rates.sum(axis=1, keepdims=True) * 1e6)[:, [0]]  # B and C are in one of three cells
    assert result.var_names.tolist() == [genes[0]] and result.obs_names.tolist() == ["cell0", "cell2", "cell3"]
    np.testing.assert_allclose(result.X.toarray(), expected, rtol=1e-6)
    assert result.layers["counts"].toarray().ravel().tolist() == [10, 2, 20]
    assert report.dropped_cells == {f"TPMNormalization(gtf_file={gtf}, filter_genes_min_percentage=0.4)": 1}
    gtf.unlink()
    values, names = Chain.from_json(chain.to_json()).apply(sparse.csr_matrix(counts), genes)
    assert names == [genes[0]]
    np.testing.assert_allclose(values.toarray()[[0, 2, 3]], expected, rtol=1e-6)


def test_annotations_that_do_not_fit(make_h5ad, tmp_path):
    gtf = tmp_path / "genes.gtf"
    gtf.write_text(GTF)
    source = open_source(make_h5ad())
    with pytest.raises(
        DataError, match=r"genes\.gtf has none of the 25 genes of the data, e\.g\. GENE0.*it has ENSG1\.4"
    ):
        build_chain([step("TPMNormalizationTransform", gtf_file=str(gtf))]).fit(source, None)
    with pytest.raises(DataError, match=r"nothing\.gtf: cannot be read"):
        build_chain([step("TPMNormalizationTransform", gtf_file=str(tmp_path / "nothing.gtf"))]).look_at(source)
    gtf.write_text("gene,length\nA,3\n")
    with pytest.raises(DataError, match="line 1 has 1 columns, a GTF file has 9"):
        build_chain([step("TPMNormalizationTransform", gtf_file=str(gtf))]).look_at(source)
    with pytest.raises(ConfigError, match="gtf_file"):
        build_chain([step("TPMNormalizationTransform")])


def test_transforms_can_be_listed():
    listed = {entry["name"]: entry for entry in list_transforms()}
    assert list(listed) == list(STEPS)
    assert all(entry["help"] and not entry["help"].startswith("One transform") for entry in listed.values())
    arguments = {argument["name"]: argument for argument in listed["BinTransform"]["arguments"]}
    assert arguments["num_bins"] == {"name": "num_bins", "type": "int | None", "default": None, "required": False}
    assert arguments["binning_method"]["type"] == "one of 'int_cast', 'percentile', 'value_binning'"
    assert listed["ScaleCountsTransform"]["arguments"][0]["required"]
    assert not listed["LogTransform"]["needs_pass"] and listed["FilterGenesTransform"]["needs_pass"]


def test_counts_share_the_places_of_the_values_until_a_step_parts_them(make_h5ad, tmp_path):
    path = make_h5ad()
    run(path, [step("LogTransform"), step("FilterCellsTransform", min_genes=8)], tmp_path / "shared.h5ad")
    run(path, [step("ChangeExpressionLevelTransform", gene_perturbations={"GENE3": "positive"})], tmp_path / "own.h5ad")
    with h5py.File(tmp_path / "shared.h5ad") as file:
        assert file["X/indices"] == file["layers/counts/indices"] and file["X/indptr"] == file["layers/counts/indptr"]
    with h5py.File(tmp_path / "own.h5ad") as file:
        assert file["X/indices"] != file["layers/counts/indices"]
    given, own = anndata.read_h5ad(path), anndata.read_h5ad(tmp_path / "own.h5ad")
    np.testing.assert_array_equal(own.layers["counts"].toarray(), given.X.toarray())
    assert (own[:, "GENE3"].X.toarray() == given[:, "GENE3"].X.max()).all()


@pytest.mark.parametrize("many", [0, 10**9], ids=["compiled", "plain"])
def test_selecting_genes_compiled_or_not_is_the_same(make_h5ad, tmp_path, monkeypatch, many):
    from bmfm_pipeline.data.transforms import blocks

    monkeypatch.setattr(blocks, "_MANY", many)
    path = make_h5ad()
    kept = ["GENE1", "GENE4", "GENE24"]
    result = run(path, [step("LogTransform"), step("KeepGenesTransform", genes_to_keep=kept)], tmp_path / "out.h5ad")[2]
    counts = anndata.read_h5ad(path)[result.obs_names, kept].X.toarray()
    np.testing.assert_array_equal(result.layers["counts"].toarray(), counts)
    np.testing.assert_array_equal(result.X.toarray(), np.log1p(counts))


def test_a_fitted_chain_is_not_fitted_again(make_h5ad, tmp_path):
    path = make_h5ad()
    steps = [step("FilterGenesTransform", min_cells=15), step("NormalizeTotalTransform"), step("LogTransform")]
    chain = build_chain(steps)
    chain.fit(open_source(path), np.arange(30))
    restored = Chain.from_json(chain.to_json())
    restored.run(open_source(path), None, tmp_path / "restored.h5ad", {}, fitted=True)
    build_chain(steps).run(open_source(path), np.arange(30), tmp_path / "whole.h5ad", {})
    restored, whole = (anndata.read_h5ad(tmp_path / name) for name in ("restored.h5ad", "whole.h5ad"))
    assert restored.var_names.equals(whole.var_names)
    np.testing.assert_array_equal(restored.X.toarray(), whole.X.toarray())


def test_a_full_disk_is_said_and_leaves_nothing_beside_the_target(make_h5ad, tmp_path, file_size_limit):
    random = np.random.default_rng(0)
    path = make_h5ad(sparse.csr_matrix(random.poisson(1.0, (600, 50)).astype(np.float32)))
    folder = tmp_path / "out"
    with file_size_limit(30_000), pytest.raises(StorageError, match="disk is full or a file size limit"):
        run(path, [step("LogTransform")], folder / "processed.h5ad")
    assert [file.name for file in folder.iterdir()] in ([], ["processed.h5ad"])


def test_memory_does_not_grow_with_cells(make_h5ad, tmp_path, monkeypatch):
    import tracemalloc

    monkeypatch.setattr(h5ad, "VALUES_PER_CHUNK", 20_000)
    steps = [
        step("NormalizeTotalTransform"), step("LogTransform"),
        step("HighlyVariableGenesTransform", n_top_genes=100), step("BinTransform", num_bins=5),
    ]  # fmt: skip
    peaks = []
    for n_cells in (500, 500, 4000):  # the first warms up
        counts = sparse.random(n_cells, 200, density=0.5, format="csr", dtype=np.float32, random_state=1)
        counts.data = np.ceil(counts.data * 5)
        source = open_source(make_h5ad(counts, name=f"{n_cells}.h5ad"))
        assert len(source.obs) == n_cells
        tracemalloc.start()
        build_chain(steps).run(source, None, tmp_path / "out.h5ad", {})
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] - peaks[1] < 3500 * 200  # bytes a cell: masks, lengths and obs, not the 800 of its values
