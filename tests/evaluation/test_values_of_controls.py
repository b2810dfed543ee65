"""What controls read where there are no counts, and what is said of columns that an encoder is to forget."""

from types import SimpleNamespace

import numpy as np
import pytest
from scipy import sparse

from bmfm_pipeline.evaluation.controls import ControlCells, log_cp10k
from bmfm_pipeline.evaluation.controls.choice import described
from bmfm_pipeline.evaluation.controls.values import note_on_values, values_for_controls, values_read
from bmfm_pipeline.evaluation.rows import Evaluation
from bmfm_pipeline.evaluation.unlearning import say_what_is_left


class Matrix:
    def __init__(self, values):
        self.values = sparse.csr_matrix(values)

    def rows(self, rows):
        return self.values[rows]


def store(counts=None, log_values=None) -> SimpleNamespace:
    return SimpleNamespace(counts=counts, log_values=log_values, matrix="X")


def test_counts_come_before_logarithms_and_these_before_bins():
    assert values_for_controls(store("counts", "logs")) == ("counts", "counts")
    assert values_for_controls(store(None, "logs")) == ("logs", "log_normalised")
    assert values_for_controls(store()) == ("X", "X")


def test_only_counts_are_normalised():
    values = np.array([[0, 2.5, 1], [3, 0, 0.5], [1, 1, 0]], dtype=np.float32)
    train, test = np.array([0, 1]), np.array([2])
    logs = ControlCells(Matrix(values), train, test, kind="log_normalised").values("logistic_l2", np.ones(2, bool))
    assert (logs[0].toarray() == values[:2]).all() and (logs[1].toarray() == values[2:]).all()
    counts = ControlCells(Matrix(values), train, test).values("logistic_l2", np.ones(2, bool))
    assert np.array_equal(counts[0].toarray(), log_cp10k(sparse.csr_matrix(values[:2])).toarray())


@pytest.mark.parametrize("kind", ["log_normalised", "X"])
def test_a_report_knows_from_the_notes_what_was_read(kind):
    assert values_read(["something else", note_on_values(kind)]) == kind and values_read([]) == "counts"
    assert "per 10,000" in described("ridge") and "per 10,000" not in described("ridge", kind)
    assert "as they are" in described("ridge", kind) and described("majority", kind) == described("majority")


def row(target, metric, model, value, low=None, high=None) -> dict:
    return {"target": target, "metric": metric, "model": model, "value": value, "ci_low": low, "ci_high": high}


def test_a_column_to_be_forgotten_is_judged_by_what_a_probe_finds():
    rows = [
        row("donor", "accuracy", "model", 0.1),
        row("donor", "accuracy", "linear_probe", 0.2, 0.15, 0.25),
        row("donor", "accuracy", "logistic_l2", 0.9, 0.85, 0.95),
        row("donor", "accuracy", "majority", 0.1),
        row("age", "pcc", "linear_probe", 0.3),
        row("age", "pcc", "ridge", None),
    ]
    verdicts = [
        "donor: the model is worse than logistic regression",
        "cell_type: the model is better than all",
        "age: the model is worse",
    ]
    evaluation = Evaluation(rows=rows, verdicts=verdicts)
    say_what_is_left(evaluation, {"donor": 0.5, "age": 1.0, "absent": 1.0})
    kept, donor, age = evaluation.verdicts
    assert kept == "cell_type: the model is better than all"
    assert "linear probe of its frozen embeddings reaches accuracy 0.200 (0.150 to 0.250)" in donor
    assert "values of the cells 0.900 (0.850 to 0.950), the commonest class 0.100" in donor
    assert age.endswith("reaches correlation 0.300")


def test_without_a_probe_the_sentence_says_how_to_get_one():
    evaluation = Evaluation(rows=[row("donor", "accuracy", "model", 0.1)], verdicts=["donor: the model is worse"])
    say_what_is_left(evaluation, {"donor": 0.5})
    assert evaluation.verdicts[0].endswith("add controls=full")
