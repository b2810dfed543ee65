"""Rows of metrics.json whose intervals need a word: fixed numbers of each class, no width, resamples left out."""

import numpy as np
import pytest

from bmfm_pipeline.evaluation.intervals import interval_from_values
from bmfm_pipeline.evaluation.predictions import LabelPredictions, Predictions
from bmfm_pipeline.evaluation.tables import Settings, evaluate_predictions

TRUTH = np.repeat([0, 1, 2], [150, 40, 10])


def label(right=(0.95, 0.5, 0.2), truth=TRUTH):
    generator = np.random.default_rng(0)
    guess = np.where(generator.random(len(truth)) < np.array(right)[truth], truth, (truth + 1) % 3)
    scores = 0.5 * generator.random((len(truth), 3)) + np.eye(3)[guess]
    return LabelPredictions(truth, guess, scores / scores.sum(axis=1, keepdims=True), ["B", "NK", "T"])


def rows_of(model, **settings):
    predictions = Predictions([f"c{i}" for i in range(len(model.truth))], {"celltype": model})
    other = label((0.9, 0.4, 0.3), model.truth)
    found = evaluate_predictions(
        predictions, {"logistic_l2": {"celltype": other}}, Settings(**{"resamples": 400, **settings})
    )
    return found, {row["metric"]: row for row in found.rows if row["model"] == "model"}


def width(row):
    return row["ci_high"] - row["ci_low"]


def test_stratified_resamples_keep_the_numbers_of_each_class():
    plain, by_cell = rows_of(label())
    within, by_class = rows_of(label(), stratified=True)
    assert width(by_class["accuracy"]) < 0.95 * width(by_cell["accuracy"])
    # In each resample all ten cells of the rare class are there, so its share of the average cannot vanish.
    recall = by_class["recall"]
    assert recall["value"] == by_cell["recall"]["value"] and recall["ci_low"] < recall["value"] < recall["ci_high"]
    assert within.verdicts != plain.verdicts, "differences are resampled within classes too"
    assert by_class["auroc"]["ci_low"] != by_cell["auroc"]["ci_low"]


def test_groups_come_before_classes():
    groups = np.arange(200) % 20
    found, rows = rows_of(label(), groups=groups, stratified=True)
    alone, expected = rows_of(label(), groups=groups)
    assert rows["accuracy"] == expected["accuracy"] and found.verdicts == alone.verdicts


def test_where_classes_are_fixed_a_proportion_interval_does_not_fit():
    _, rows = rows_of(label(), stratified=True, method="wilson")
    assert rows["accuracy"]["ci_method"] == "bootstrap_quantiles"
    assert rows["accuracy"]["note"] == "wilson does not fit fixed classes: bootstrap_quantiles is used"


@pytest.mark.parametrize("method", ["binomial", "bootstrap_quantiles"])
def test_a_model_that_is_always_right_is_not_thereby_certain(method):
    _, rows = rows_of(label((1.0, 1.0, 1.0)), method=method)
    row = rows["accuracy"]
    low, _ = interval_from_values([1.0], method="wilson", n=200)
    assert row["ci_low"] == row["ci_high"] == 1.0
    assert row["note"] == f"all 200 cells alike, which leaves {method} no width; wilson gives {low:.3f} to 1.000"
    _, rows = rows_of(label((1.0, 1.0, 1.0)), method="wilson")
    assert "note" not in rows["accuracy"] and rows["accuracy"]["ci_low"] == low


def test_resamples_that_do_not_define_a_metric_are_counted_in_the_row():
    truth = np.array([1.0, 2.0, 3.0])
    model = LabelPredictions(truth, np.array([1.0, 2.5, 3.0]))
    found = evaluate_predictions(Predictions(list("abc"), {"age": model}), {}, Settings(resamples=500))
    (row,) = [row for row in found.rows if row["metric"] == "pcc"]
    count = int(row["note"].split()[3])
    assert row["note"] == f"not defined in {count} of 500 resamples, which are left out" and 20 < count < 100
