"""Mean profiles of perturbations and genes that change, against numpy and scanpy; expressions of perturbations in silico."""

import anndata
import numpy as np
import pandas as pd
import pytest

from bmfm_pipeline.data.perturbations import group_moments, ranked_genes, welch_scores
from bmfm_pipeline.data.perturbations.expressions import read_change, value_of
from bmfm_pipeline.data.stores import MemoryStore
from bmfm_pipeline.errors import ConfigError


def cells():
    generator = np.random.default_rng(0)
    groups = np.repeat([0, 1, 2, -1], [30, 12, 25, 4])
    values = np.log1p(
        generator.poisson(1.0 + 1.5 * (groups[:, None] == 1) * (np.arange(20) < 5), size=(71, 20))
    ).astype(np.float32)
    values[:, 19] = 0
    return values, groups


def test_moments_are_those_of_numpy():
    values, groups = cells()
    store = MemoryStore(values, [str(row) for row in range(71)], [f"G{g}" for g in range(20)])
    found = group_moments(store, groups, 3)
    assert found.cells.tolist() == [30, 12, 25]
    for group in range(3):
        own = values[groups == group].astype(np.float64)
        np.testing.assert_allclose(found.means[group], own.mean(axis=0), atol=1e-12)
        np.testing.assert_allclose(found.variances[group], own.var(axis=0, ddof=1), atol=1e-12)


def test_genes_are_ranked_as_scanpy_ranks_them():
    scanpy = pytest.importorskip("scanpy")
    values, groups = cells()
    store = MemoryStore(values, [str(row) for row in range(71)], [f"G{g}" for g in range(20)])
    scores = welch_scores(group_moments(store, groups, 3), 0)
    kept = groups >= 0
    data = anndata.AnnData(
        values[kept], obs=pd.DataFrame({"p": [f"p{g}" for g in groups[kept]]}, index=[str(i) for i in range(67)])
    )
    scanpy.tl.rank_genes_groups(data, "p", reference="p0", method="t-test", rankby_abs=True, n_genes=20)
    for group in (1, 2):
        names = data.uns["rank_genes_groups"]["names"][f"p{group}"]
        theirs = data.uns["rank_genes_groups"]["scores"][f"p{group}"]
        own = scores[group][[int(name) for name in names]]
        np.testing.assert_allclose(own, theirs, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(
            np.abs(scores[group][ranked_genes(scores, 10)[group]]), np.abs(theirs[:10]), rtol=1e-4
        )


GENE = {"MAX": 8.0, "MIN": 1.0, "MEAN": 3.0}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("MAX * 0.5", 4),
        ("max*.5", 4),
        ("X + 1", 3),
        ("(MAX - MIN) / 2", 3.5),
        ("2 * X + MEAN * 2", 10),
        ("- -3", 3),
        ("1e1 - 2 - 3", 5),
    ],
)
def test_expressions_are_calculated(text, value):
    (entry,) = read_change(f"KLF1={text}").genes
    assert entry.gene == "KLF1" and value_of(entry, 2.0, GENE) == pytest.approx(value)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os')",
        "MAX.real",
        "2 ** 3",
        "MAX MAX",
        "(1",
        "",
        "a",
        "1;2",
        "[1]",
        "lambda: 1",
        "1e",
        "(" * 40 + "1",
    ],
)
def test_anything_else_is_refused(text):
    with pytest.raises(ConfigError, match=r"expression .*cannot be read"):
        read_change(f"KLF1={text}")


def test_several_genes_a_bare_gene_and_impossible_values():
    change = read_change("TP53 = 0, KLF1=MAX")
    assert change.name == "KLF1_TP53" and [entry.gene for entry in change.genes] == ["TP53", "KLF1"]
    assert read_change("KLF1").genes[0].rule is None
    with pytest.raises(ConfigError, match="gives -1, and expression is 0 or more"):
        value_of(read_change("A=0-1").genes[0], 1.0, GENE)
    with pytest.raises(ConfigError, match="divides by 0"):
        value_of(read_change("A=1/(X-X)").genes[0], 1.0, GENE)
    with pytest.raises(ConfigError, match="A is named twice"):
        read_change("A=0,A=1")
    with pytest.raises(ConfigError, match="names no gene"):
        read_change("=1")
