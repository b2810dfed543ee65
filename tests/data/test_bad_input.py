"""Every kind of bad input ends in one message that says what was found, where, and what would be right."""

import anndata
import h5py
import numpy as np
import pytest
from scipy import sparse

from bmfm_pipeline.data.sources import check_genes, check_source, open_source
from bmfm_pipeline.data.splits import make_split
from bmfm_pipeline.errors import DataError


def counts_of(n_cells=60, n_genes=25, seed=0):
    random = np.random.default_rng(seed)
    dense = random.poisson(0.7, (n_cells, n_genes)).astype(np.float32)
    dense[:, 0] += 1
    return sparse.csr_matrix(dense)


def check(path, labels=(("celltype", False),), layer=None, **settings):
    return check_source(open_source(path, layer), list(labels), **settings)


def problem_of(path, *args, **settings) -> str:
    with pytest.raises(DataError) as caught:
        check(path, *args, **settings)
    return str(caught.value)


def test_a_good_file_passes_with_its_counts(make_h5ad):
    report = check(make_h5ad(counts_of()), stratify="celltype")
    assert (report["cells"], report["genes"], report["cells_without_counts"]) == (60, 25, 0)
    assert report["labels"]["celltype"] == {"classes": 3, "missing": 0, "smallest": 20}


def test_label_column_misspelt(make_h5ad):
    message = problem_of(make_h5ad(counts_of()), labels=[("cell_type", False)])
    assert "no label column 'cell_type'; did you mean 'celltype'? (columns: celltype)" in message


def test_class_with_one_cell_is_named(make_h5ad):
    labels = ["A"] * 30 + ["B"] * 29 + ["rare"]
    path = make_h5ad(counts_of(), obs={"celltype": labels})
    message = problem_of(path, stratify="celltype")
    assert "obs['celltype']" in message and "'rare' (1)" in message and "is_stratification_label=false" in message
    assert check(path)["labels"]["celltype"]["smallest"] == 1  # no harm in a random split
    with pytest.raises(DataError, match=r"too few cells to stratify by: rare \(1\)"):
        make_split(
            open_source(path).obs, weights={"train": 0.72, "dev": 0.08, "test": 0.2}, stratify="celltype", seed=1
        )


def test_negative_values(make_h5ad):
    counts = counts_of()
    counts.data[:7] = -1
    message = problem_of(make_h5ad(counts))
    assert "X: 7 values are negative" in message


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinite_values(make_h5ad, value):
    counts = counts_of()
    counts.data[0], counts.data[-1] = value, value
    message = problem_of(make_h5ad(counts))
    assert "X: 2 values are NaN or infinite, in 2 cells, e.g. cell0, cell59" in message


def test_log_normalised_values_point_to_the_counts(make_h5ad):
    counts = counts_of()
    logs = counts.copy()
    logs.data = np.log1p(logs.data)
    message = problem_of(make_h5ad(logs))
    assert (
        "are not whole numbers" in message
        and "log-normalised" in message
        and "no layer of the file holds counts" in message
    )
    path = make_h5ad(logs, layers={"counts": counts})
    assert "layer 'counts' holds counts: set data_module.transform_kwargs.layer=counts" in problem_of(path)
    assert check(path, layer="counts")["total"] == counts.sum()
    assert ".raw holds counts: set data_module.transform_kwargs.layer=raw" in problem_of(make_h5ad(logs, raw=counts))
    assert check(make_h5ad(logs), need_counts=False)["cells"] == 60


def test_duplicate_gene_names(make_h5ad):
    genes = [f"GENE{index}" for index in range(24)] + ["GENE3"]
    path = make_h5ad(counts_of(), genes=genes)
    message = problem_of(path)
    assert "1 duplicate gene names (var): GENE3" in message and "duplicate_genes=sum (or first)" in message
    assert check_source(open_source(path, duplicate_genes="sum"), [("celltype", False)])["genes"] == 24


def test_duplicate_cell_names(make_h5ad):
    message = problem_of(make_h5ad(counts_of(), cells=["same", "same", *[f"c{index}" for index in range(58)]]))
    assert "1 duplicate cell names (obs): same" in message and "obs_names_make_unique" in message


def test_several_problems_are_said_at_once(make_h5ad):
    counts = counts_of()
    counts.data[0], counts.data[1] = -1, np.nan
    message = problem_of(make_h5ad(counts, cells=["a", "a", *[f"c{i}" for i in range(58)]]), labels=[("tissue", False)])
    for part in ("duplicate cell names", "no label column 'tissue'", "NaN or infinite", "negative"):
        assert part in message


@pytest.mark.parametrize(("shape", "what"), [((0, 5), "no cells"), ((5, 0), "no genes")])
def test_empty_matrix(make_h5ad, shape, what):
    message = problem_of(make_h5ad(sparse.csr_matrix(shape, dtype=np.float32)))
    assert f"X is empty: {shape[0]} cells x {shape[1]} genes, {what}" in message


def test_matrix_of_zeros(make_h5ad):
    assert "no cell expresses any gene" in problem_of(make_h5ad(sparse.csr_matrix((5, 4), dtype=np.float32)))


def test_cells_without_counts_are_counted_and_named(make_h5ad):
    dense = counts_of().toarray()
    dense[[4, 9]] = 0
    report = check(make_h5ad(sparse.csr_matrix(dense)))
    assert report["cells_without_counts"] == 2
    assert report["cells_without_counts_examples"] == ["cell4", "cell9"]


def test_regression_label_that_holds_text(make_h5ad):
    message = problem_of(make_h5ad(counts_of()), labels=[("celltype", True)])
    assert (
        "obs['celltype'] is a regression label, but holds text or infinite values in 60 cells, e.g. 'A', 'B', 'C'"
        in message
    )


def test_label_column_without_a_label(make_h5ad):
    message = problem_of(make_h5ad(counts_of(), obs={"celltype": np.full(60, np.nan)}))
    assert "obs['celltype'] holds no labels: every value is missing" in message


def test_transposed_matrix(make_h5ad):
    genes = ["RPL3", "RPS6", "MT-CO1", "CD3D", *[f"GENE{i}" for i in range(56)]]
    barcodes = ["".join(np.random.default_rng(i).choice(list("ACGT"), 14)) + "-1" for i in range(25)]
    message = problem_of(make_h5ad(counts_of(), cells=genes, genes=barcodes))
    assert (
        "cells and genes look swapped" in message
        and "RPL3" in message
        and barcodes[0] in message
        and "adata.T" in message
    )
    assert check(make_h5ad(counts_of(25, 60), cells=barcodes, genes=genes))["cells"] == 25


KNOWN = {f"GENE{index}" for index in range(50)} | {"CD3D", "RPL3"}


def test_genes_unknown_to_the_vocabulary_are_counted():
    report = check_genes(["GENE1", "GENE2", "other"], KNOWN, "gene2vec")
    assert report == {"genes": 3, "known": 2, "unknown": 1, "unknown_examples": ["other"]}


@pytest.mark.parametrize(
    ("names", "advice"),
    [
        ([f"ENSG000001234{index:02d}" for index in range(20)], "These are Ensembl ids"),
        ([f"gene{index}" for index in range(20)], "known in upper case"),
        ([f"GENE{index}_ENSG00000012345.1" for index in range(20)], "without what follows `_ENSG`"),
        ([f"strange{index}" for index in range(20)], "Check the species"),
    ],
)
def test_genes_of_another_kind(names, advice):
    with pytest.raises(DataError) as caught:
        check_genes(names, KNOWN, "gene2vec")
    message = str(caught.value)
    assert "gene2vec knows none of the 20 gene names" in message
    assert advice in message
    assert ", ".join(names[:10]) in message and names[10] not in message


def test_too_few_genes_in_common():
    names = ["GENE1", *[f"other{index}" for index in range(19)]]
    with pytest.raises(DataError, match=r"only 1 of the 20 gene names \(5\.0%\)"):
        check_genes(names, KNOWN, "gene2vec")
    assert check_genes(names, KNOWN, "gene2vec", min_share=0.05)["known"] == 1


def test_files_of_anndata_before_0_7_are_read():
    from bmfm_pipeline.data.sources.zheng68k_mini import packaged_file

    cells = anndata.read_h5ad(packaged_file())
    source, raw = open_source(packaged_file()), open_source(packaged_file(), layer="raw")
    assert source.shape == raw.shape == (700, 765)
    assert source.obs_names.tolist() == cells.obs_names.tolist() and source.var_names == cells.var_names.tolist()
    assert raw.var_names == cells.raw.var_names.tolist()
    for column in ("bulk_labels", "phase", "louvain"):  # kept as codes beside their categories
        assert source.obs[column].astype(str).tolist() == cells.obs[column].astype(str).tolist()
    assert source.obs["n_counts"].tolist() == cells.obs["n_counts"].tolist()
    rows = sparse.vstack([chunk for _, chunk in source.iter_chunks()])
    np.testing.assert_array_equal(rows.toarray(), np.asarray(cells.X))
    rows = sparse.vstack([chunk for _, chunk in raw.iter_chunks()])
    np.testing.assert_array_equal(rows.toarray(), cells.raw.X.toarray())
    assert check_source(raw, [("bulk_labels", False)], need_counts=False)["labels"]["bulk_labels"]["classes"] == 10


def test_obs_and_var_that_lie_the_other_way_round(make_h5ad):
    path = make_h5ad(counts_of(60, 25))
    with h5py.File(path, "r+") as file:
        file.move("obs", "cells")
        file.move("var", "obs")
        file.move("cells", "var")
    with pytest.raises(DataError, match=r"X is 60 x 25, but obs has 25 rows and var 60; the matrix is transposed"):
        open_source(path)


def test_indices_of_64_bits(make_h5ad):
    path = make_h5ad(counts_of())
    with h5py.File(path, "r+") as file:
        indices = file["X/indices"][:].astype(np.int64)
        del file["X/indices"]
        file["X/indices"] = indices
    whole = sparse.vstack([chunk for _, chunk in open_source(path).iter_chunks()])
    np.testing.assert_array_equal(whole.toarray(), counts_of().toarray())
    with h5py.File(path, "r+") as file:
        file["X/indices"][4] = 2**32 + 1  # as 32 bits it would be gene 1
    with pytest.raises(DataError, match=r"an index lies outside 0\.\.24"):
        check(path)


@pytest.mark.parametrize("kind", ["csr", "csc", "dense"])
def test_values_that_are_not_whole(make_h5ad, kind):
    counts = counts_of()
    counts.data[3] += 0.25
    stored = {"csr": counts, "csc": counts.tocsc(), "dense": counts.toarray()}[kind]
    message = problem_of(make_h5ad(stored))
    assert "X: 1 values are not whole numbers" in message and "look log-normalised" in message
