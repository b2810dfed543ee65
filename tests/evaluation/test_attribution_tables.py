"""What attributions say of a class: means with intervals, t-tests, a null by permutation; files and choices of cells."""

import json

import numpy as np
import pytest
from scipy import sparse, stats

from bmfm_pipeline.errors import ConfigError, DataError
from bmfm_pipeline.evaluation.attributions import read_attributions, scores_by_gene
from bmfm_pipeline.evaluation.attributions.cells import LabelColumn, choose_cells, wanted_classes
from bmfm_pipeline.evaluation.attributions.files import AttributionsWriter, entry
from bmfm_pipeline.evaluation.attributions.table import benjamini_hochberg, class_table, permutation_p_values

CELLS, GENES = 30, 200


def scores(seed: int = 0, planted: float = 0.0) -> np.ndarray:
    """Cells that show half of the genes each; gene 7, which all show, has `planted` added."""
    rng = np.random.default_rng(seed)
    found = rng.normal(size=(CELLS, GENES)) * (rng.random((CELLS, GENES)) < 0.5)
    found[:, 7] = rng.normal(size=CELLS) + planted
    found[:, 9] = 0.0
    return found


class TestTable:
    def test_means_spreads_and_t_tests_are_those_of_numpy_and_scipy_with_absent_genes_as_zeros(self):
        dense = scores(planted=2.0)
        table, stability = class_table(sparse.csr_matrix(dense), sparse.csr_matrix(3 * dense), resamples=200)
        own = dense[:, table["column"]]
        np.testing.assert_allclose(table["mean"], own.mean(axis=0), atol=1e-12)
        np.testing.assert_allclose(table["sd"], own.std(axis=0, ddof=1), atol=1e-12)
        np.testing.assert_allclose(table["p_ttest"], stats.ttest_1samp(own, 0).pvalue, rtol=1e-9)
        np.testing.assert_allclose(table["mean_logit"], 3 * own.mean(axis=0), atol=1e-12)
        assert table["n_present"].tolist() == (own != 0).sum(axis=0).tolist()
        assert (table["n_cells"] == CELLS).all() and 9 not in table["column"]
        assert (table["ci_low"] <= table["mean"]).all() and (table["mean"] <= table["ci_high"]).all()
        assert table["column"][0] == 7 and table["highlight"][0] and 0 < stability <= 1

    def test_intervals_are_as_wide_as_the_theory_says_and_wider_where_groups_are_resampled(self):
        rng = np.random.default_rng(3)
        donors = np.repeat(np.arange(6), 10)
        dense = rng.normal(size=(60, 40)) + rng.normal(size=(6, 40))[donors]
        matrix = sparse.csr_matrix(dense)
        by_cell, _ = class_table(matrix, matrix, resamples=2000, permutations=5)
        by_donor, _ = class_table(matrix, matrix, resamples=2000, permutations=5, groups=donors)
        order = np.argsort(by_cell["column"])
        width = (by_cell["ci_high"] - by_cell["ci_low"])[order]
        np.testing.assert_allclose(width, 2 * 1.96 * dense.std(axis=0) / np.sqrt(60), rtol=0.1)
        wider = (by_donor["ci_high"] - by_donor["ci_low"])[np.argsort(by_donor["column"])]
        assert np.median(wider / width) > 1.5

    def test_one_cell_has_neither_interval_nor_t_test(self):
        table, stability = class_table(sparse.csr_matrix([[0.6, 0.0, 0.8]]), sparse.csr_matrix([[0.6, 0.0, 0.8]]))
        assert table["column"].tolist() == [2, 0] and stability is None
        assert all(np.isnan(table[name]).all() for name in ("sd", "ci_low", "ci_high", "p_ttest"))
        assert not table["highlight"].any() and (table["q_null"] > 0.5).all()

    def test_the_same_seed_gives_the_same_table(self):
        matrix = sparse.csr_matrix(scores())
        first, second = (class_table(matrix, matrix, resamples=50, permutations=20, seed=4)[0] for _ in range(2))
        assert all(np.array_equal(first[name], second[name], equal_nan=True) for name in first)


class TestNull:
    def null(self, dense: np.ndarray, permutations: int = 200) -> np.ndarray:
        present = (dense != 0).sum(axis=0)
        return permutation_p_values(sparse.csr_matrix(dense), dense.mean(axis=0), present, permutations, 0)

    def test_genes_that_are_like_all_others_have_uniform_p_values(self):
        p = np.concatenate([self.null(scores(seed), 60) for seed in range(8)])
        for rate in (0.05, 0.3):
            assert abs((p < rate).mean() - rate) < 4 * np.sqrt(rate * (1 - rate) / len(p))

    def test_a_common_shift_of_all_genes_makes_none_stand_out_though_it_passes_a_t_test(self):
        dense = scores()
        dense[dense != 0] += 2.0
        table, _ = class_table(sparse.csr_matrix(dense), sparse.csr_matrix(dense), resamples=10)
        often = table["n_present"] > CELLS / 3
        assert (table["p_ttest"][often] < 0.05).all() and (table["p_null"] < 0.05).mean() < 0.12
        assert not (table["q_null"] < 0.05).any()

    def test_a_gene_that_does_stand_out_is_found_at_a_small_rate_of_false_discoveries(self):
        table, _ = class_table(sparse.csr_matrix(scores(planted=3.0)), sparse.csr_matrix(scores()), resamples=10)
        found = dict(zip(table["column"].tolist(), table["q_null"].tolist(), strict=True))
        assert found.pop(7) < 0.05 and min(found.values()) > 0.05

    def test_false_discovery_rates_are_those_of_scipy(self):
        p = np.random.default_rng(0).random(50) ** 2
        np.testing.assert_allclose(benjamini_hochberg(p), stats.false_discovery_control(p))
        assert len(benjamini_hochberg([])) == 0

    def test_cells_whose_scores_are_all_alike_say_nothing(self):
        assert (self.null(np.ones((4, 10))) == 1).all()


def test_the_file_is_a_list_of_cells_that_reads_back_as_a_table(tmp_path):
    path = tmp_path / "attributions.json"
    with AttributionsWriter(path) as writer:
        for cell, kind in (("c1", "B"), ("c2", "T")):
            listed = [entry(["CD79A", "CD3E"], [0.1, -0.12345678], "B"), entry(["CD3E"], [1.0], "T")]
            writer.add(cell, [{"label_column_name": "type", "pred_label": kind, "label_attributions": listed}])
        number = {
            "label_column_name": "age",
            "pred_label": 3.5,
            "label_attributions": [entry(["A", "A"], [0.25, 0.5], None)],
        }
        writer.add("c3", [number])
    found = json.loads(path.read_text())
    assert found == read_attributions(path) and [cell["name"] for cell in found] == ["c1", "c2", "c3"]
    first = found[0]["label_column_attributions"][0]
    assert first["label_attributions"][0] == {"label_name": "B", "attributions": [["CD3E", -0.123457], ["CD79A", 0.1]]}
    table = scores_by_gene(found, "type", "B")
    assert table.loc["CD79A"].tolist() == [0.1, 0.1] and list(table) == ["c1", "c2"]
    assert scores_by_gene(found, "type")["c2"].dropna().to_dict() == {"CD3E": 1.0}
    assert scores_by_gene(found, "age")["c3"].to_dict() == {"A": 0.75}
    (tmp_path / "other.json").write_text('[{"x": 1}]')
    with pytest.raises(DataError, match=r"no list of attributions"):
        read_attributions(tmp_path / "other.json")


def test_cells_are_drawn_class_by_class_with_a_seed():
    truth = np.array([0] * 50 + [1] * 3 + [-100] * 20)
    column = LabelColumn("type", ["a", "b"], truth)
    rows = np.arange(0, 73)
    chosen = choose_cells([column], rows, 5, seed=1)
    assert [int((truth[chosen] == kind).sum()) for kind in (0, 1, -100)] == [5, 3, 0]
    assert np.array_equal(chosen, choose_cells([column], rows, 5, seed=1))
    assert not np.array_equal(chosen, choose_cells([column], rows, 5, seed=2))
    several = LabelColumn("marks", ["a", "b"], np.array([[1, 1], [0, 1], [0, 0]]), several=True)
    assert choose_cells([several], np.arange(3), 5, 0).tolist() == [0, 1]
    assert len(choose_cells([LabelColumn("age", [], np.linspace(0, 1, 9))], np.arange(9), 4, 0)) == 4


def test_which_classes_are_attributed():
    many = [f"k{number}" for number in range(13)]
    assert wanted_classes("type", many[:12], None) == list(range(12)) and wanted_classes("age", [], None) == [0]
    assert wanted_classes("type", many, None) is None
    assert wanted_classes("type", many, {"type": ["k3", "k1"]}) == [3, 1]
    with pytest.raises(ConfigError, match=r"task\.attribute_filter\.type: no class 'Bcell'; did you mean 'B cell'\?"):
        wanted_classes("type", ["B cell", "T cell"], {"type": ["Bcell"]})
