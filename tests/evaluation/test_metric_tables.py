"""Rows of metrics.json: the public keys, the method that stands in, rare and unlabelled cells, masked fields, the text table."""

import json

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, f1_score, precision_score

from bmfm_pipeline.errors import ConfigError
from bmfm_pipeline.evaluation.intervals import interval_from_values, resampled
from bmfm_pipeline.evaluation.metrics import Metric
from bmfm_pipeline.evaluation.predictions import LabelPredictions, Predictions
from bmfm_pipeline.evaluation.tables import Evaluation, Settings, evaluate_predictions, text_table

# The public surface of metrics.json.
KEYS = ["metric", "target", "value", "ci_low", "ci_high", "ci_method", "n", "resamples", "split", "split_hash"]
KEYS += ["seed", "model"]
CLASS_METRICS = ["accuracy", "f1", "precision", "recall", "mcc", "balanced_accuracy", "f1_weighted", "auroc", "auprc"]
NAMES = ["B", "Mono", "NK", "T"]


def label(n=200, names=tuple(NAMES), right=0.8, seed=0, shares=None, truth=None):
    generator = np.random.default_rng(seed)
    names = list(names)
    truth = np.random.default_rng(99).choice(len(names), n, p=shares) if truth is None else truth
    scores = generator.random((len(truth), len(names)))
    lucky = generator.random(len(truth)) < right
    scores[np.flatnonzero(lucky), np.maximum(truth, 0)[lucky]] += 1
    probabilities = scores / scores.sum(axis=1, keepdims=True)
    return LabelPredictions(truth, probabilities.argmax(axis=1), probabilities, names)


def constant(model):
    shares = np.bincount(model.truth[model.known], minlength=len(model.class_names)) / model.known.sum()
    probabilities = np.tile(shares, (len(model.truth), 1))
    return LabelPredictions(model.truth, probabilities.argmax(axis=1), probabilities, model.class_names)


def evaluate(model, controls=None, target="celltype", **settings):
    predictions = Predictions([f"c{i}" for i in range(len(model.truth))], {target: model})
    controls = {} if controls is None else {name: {target: each} for name, each in controls.items()}
    return evaluate_predictions(predictions, controls, Settings(**{"resamples": 200, **settings}))


def row(found, metric, model="model"):
    (one,) = [row for row in found.rows if (row["metric"], row["model"]) == (metric, model)]
    return one


def test_rows_have_exactly_the_public_keys_for_model_and_controls():
    model = label()
    found = evaluate(
        model, {"majority": constant(model), "logistic_l2": label(seed=1)}, split_hash="abc", seed=7, level=0.9
    )
    assert [(row["model"], row["metric"]) for row in found.rows] == [
        (name, metric) for name in ("model", "majority", "logistic_l2") for metric in CLASS_METRICS
    ]
    for each in found.rows:
        assert list(each) == KEYS
        assert each["ci_low"] <= each["value"] + 1e-9
        assert each["value"] <= each["ci_high"] + 1e-9
        assert (each["n"], each["resamples"], each["split"], each["split_hash"], each["seed"]) == (
            200,
            200,
            "test",
            "abc",
            7,
        )
    assert row(found, "f1")["value"] == pytest.approx(f1_score(model.truth, model.predicted, average="macro"))
    assert row(found, "auroc", "majority")["value"] == 0.5


def test_an_evaluation_survives_json():
    model = label(shares=[0.5, 0.4, 0.1, 0.0])
    found = evaluate(model, {"logistic_l2": label(seed=1, truth=model.truth)})
    text = json.dumps(found.to_dict(), allow_nan=False)
    assert Evaluation(**json.loads(text)) == found


def test_a_configured_method_that_fits_is_used_alone():
    found = evaluate(label(), method="bca")
    assert {each["ci_method"] for each in found.rows} == {"bca"}
    assert not any("note" in each for each in found.rows)


@pytest.mark.parametrize("method", ["binomial", "wilson"])
def test_where_a_method_does_not_fit_quantiles_stand_in_and_the_row_says_so(method):
    found = evaluate(label(), method=method)
    assert row(found, "accuracy")["ci_method"] == method
    assert "note" not in row(found, "accuracy")
    for metric in CLASS_METRICS[1:]:
        other = row(found, metric)
        assert other["ci_method"] == "bootstrap_quantiles"
        assert other["note"] == f"{method} does not fit this metric: bootstrap_quantiles is used"
        assert other["resamples"] == 200


def test_without_runs_the_binomial_interval_is_centred_on_the_accuracy_and_takes_no_resamples():
    model = label()
    one = row(evaluate(model, method="binomial"), "accuracy")
    assert (one["ci_low"], one["ci_high"]) == interval_from_values([one["value"]], method="binomial", n=200)
    assert one["resamples"] == 0
    assert one["value"] == np.mean(model.truth == model.predicted)


def test_with_runs_the_binomial_interval_is_centred_on_the_mean_over_them():
    model = label()
    one = row(evaluate(model, method="binomial", bootstrap_runs=10, seed=3), "accuracy")
    mean = resampled(Metric("accuracy", model.truth, model.predicted), 10, seed=3).mean()
    assert (one["ci_low"], one["ci_high"]) == interval_from_values([mean], method="binomial", n=200)
    assert one["resamples"] == 10
    assert one["value"] == np.mean(model.truth == model.predicted) != mean


def test_runs_are_the_resamples_of_a_bootstrap_and_few_of_them_are_noted():
    found = evaluate(label(), method="bootstrap_quantiles", bootstrap_runs=20)
    assert {each["resamples"] for each in found.rows} == {20}
    assert any("20 resamples (task.num_bootstrap_runs)" in note for note in found.notes)
    assert evaluate(label(), bootstrap_runs=500).notes == []


def test_one_run_of_the_t_interval_leaves_the_bounds_out():
    one = row(evaluate(label(), method="bootstrap_t_interval", bootstrap_runs=1), "accuracy")
    assert (one["ci_low"], one["ci_high"]) == (None, None)


def test_a_single_run_decides_neither_verdicts_nor_stand_ins():
    model = label()
    found = evaluate(model, {"logistic_l2": label(seed=1)}, method="binomial", bootstrap_runs=1)
    assert row(found, "f1")["resamples"] == 200
    assert row(found, "f1")["ci_low"] < row(found, "f1")["ci_high"]
    assert found.verdicts == evaluate(model, {"logistic_l2": label(seed=1)}).verdicts


def test_unlabelled_cells_are_counted_and_not_scored():
    truth = label().truth.copy()
    truth[:30] = -100
    model = label(truth=truth)
    found = evaluate(model, {"majority": constant(model)})
    assert found.notes == ["celltype: 30 of 200 cells have no known label and are not scored"]
    assert {each["n"] for each in found.rows} == {170}
    assert row(found, "accuracy")["value"] == np.mean(model.truth[30:] == model.predicted[30:])
    assert sum(map(sum, found.confusion["celltype"]["counts"])) == 170


def test_a_split_without_any_label_is_said_not_scored():
    found = evaluate(label(truth=np.full(12, -100)))
    assert (found.rows, found.verdicts) == ([], [])
    assert found.notes[1] == "celltype: no cell of the test split has a label; nothing to score"


def test_rare_and_absent_classes_are_named():
    truth = np.array([0] * 60 + [1] * 40 + [2] * 4)
    found = evaluate(label(truth=truth), rare_class_floor=10)
    assert "celltype: classes with fewer than 10 test cells, scored with wide error: NK (4)" in found.notes
    assert "celltype: classes without a test cell, not scored: T" in found.notes
    by_name = {each["class"]: each for each in found.per_class["celltype"]}
    assert {name: each["support"] for name, each in by_name.items()} == {"B": 60, "Mono": 40, "NK": 4, "T": 0}
    assert [name for name, each in by_name.items() if each["rare"]] == ["NK"]
    assert all(each["f1_low"] <= each["f1"] <= each["f1_high"] for name, each in by_name.items() if name != "T")
    assert by_name["NK"]["f1_high"] - by_name["NK"]["f1_low"] > by_name["B"]["f1_high"] - by_name["B"]["f1_low"]
    assert (by_name["T"]["recall"], by_name["T"]["f1"]) == (None, None)


def test_the_second_macro_average_leaves_rare_classes_out_but_not_cells_taken_for_them():
    truth = np.array([0] * 60 + [1] * 40 + [2] * 4)
    model = label(truth=truth, right=0.5)
    assert (model.predicted[:100] == 2).any()
    one = row(evaluate(model, rare_class_floor=10), "f1_without_rare")
    expected = f1_score(model.truth, model.predicted, labels=[0, 1], average="macro")
    assert one["value"] == pytest.approx(expected)
    assert one["n"] == 104
    assert one["note"] == "macro-F1 averaged over the classes with at least 10 test cells"
    found, common = evaluate(model, rare_class_floor=10), truth < 2
    precision = precision_score(model.truth, model.predicted, labels=[0, 1], average="macro")
    assert row(found, "precision_without_rare")["value"] == pytest.approx(precision)
    assert row(found, "mcc_without_rare")["value"] == Metric("mcc", truth[common], model.predicted[common]).value()
    assert row(found, "mcc_without_rare")["n"] == 100
    assert not [each for each in evaluate(model, rare_class_floor=3).rows if each["metric"] == "f1_without_rare"]


def test_per_class_scores_and_confusion_are_those_of_the_cells():
    model, control = label(), label(seed=1)
    found = evaluate(model, {"logistic_l2": control})
    expected = f1_score(model.truth, model.predicted, average=None)
    of_control = f1_score(control.truth, control.predicted, average=None)
    assert [each["f1"] for each in found.per_class["celltype"]] == pytest.approx(expected)
    assert [each["f1_logistic_l2"] for each in found.per_class["celltype"]] == pytest.approx(of_control)
    first = found.per_class["celltype"][0]
    assert first["auprc"] == pytest.approx(average_precision_score(model.truth == 0, model.probabilities[:, 0]))
    matrix = np.array(found.confusion["celltype"]["counts"])
    assert matrix[1, 2] == ((model.truth == 1) & (model.predicted == 2)).sum()
    assert matrix.sum() == 200


def test_two_classes_have_the_area_of_the_second_and_say_so():
    model = label(names=["control", "ill"])
    found = evaluate(model)
    assert row(found, "auprc")["value"] == Metric("auprc", model.truth, model.probabilities[:, 1]).value()
    assert "celltype: auroc and auprc are those of class ill against control" in found.notes


def test_cut_probabilities_are_said():
    model = label()
    model.only_top = True
    assert any("20 most probable classes" in note for note in evaluate(model).notes)


def test_groups_are_respected_everywhere():
    groups = np.repeat(np.arange(10), 20)
    model = label()
    grouped = evaluate(model, {"logistic_l2": label(seed=1)}, method="binomial", groups=groups)
    one = row(grouped, "accuracy")
    assert one["ci_method"] == "bootstrap_quantiles"
    assert one["note"] == "binomial does not fit groups of cells: bootstrap_quantiles is used"
    assert "groups are resampled together" in grouped.verdicts[0]
    assert "McNemar" not in grouped.verdicts[0]


def test_regression_has_errors_correlation_and_a_verdict():
    generator = np.random.default_rng(0)
    truth = generator.normal(size=150)
    truth[:10] = np.nan
    model = LabelPredictions(truth, np.nan_to_num(truth) + 0.3 * generator.normal(size=150))
    mean = LabelPredictions(truth, np.zeros(150))
    found = evaluate(model, {"train_mean": mean}, target="age")
    assert [each["metric"] for each in found.rows] == ["mse", "mae", "pcc", "r2", "spearman"] * 2
    assert {each["n"] for each in found.rows} == {140}
    assert row(found, "pcc")["value"] == pytest.approx(np.corrcoef(truth[10:], model.predicted[10:])[0, 1])
    undefined = row(found, "pcc", "train_mean")
    assert (undefined["value"], undefined["ci_low"], undefined["ci_high"]) == (None, None, None)
    assert found.verdicts[0].startswith("age: the model is better than the mean of the training cells by ")


def test_numbers_that_may_be_zero_say_how_often_zero_is_told():
    truth = np.array([0.0, 0.0, 1.0, 2.0, np.nan])
    model = LabelPredictions(truth, np.array([0.2, 1.4, 0.4, 2.2, 0.0]))
    found = evaluate(model, target="dose")
    assert row(found, "zero_accuracy")["value"] == 0.5
    assert found.confusion["dose"] == {"classes": ["not zero", "zero"], "counts": [[1, 1], [1, 1]]}


def test_many_classes_have_the_accuracy_of_the_first_few():
    names = [f"class {number}" for number in range(12)]
    model = label(names=names)
    found = evaluate(model)
    ranks = np.argsort(-model.probabilities, axis=1)[:, :3]
    assert row(found, "top3_accuracy")["value"] == (ranks == model.truth[:, None]).any(axis=1).mean()
    assert "top5_accuracy" not in {each["metric"] for each in found.rows}


def test_an_unknown_method_is_refused_before_anything_is_scored():
    with pytest.raises(
        ConfigError, match=r"task\.ci_method: unknown interval method 'bayes'; known: bootstrap_quantiles"
    ):
        Settings(method="bayes")


def test_text_table_puts_model_and_controls_side_by_side():
    truth = np.array([0] * 8 + [1] * 2)
    model = LabelPredictions(truth, np.array([0] * 9 + [1]), None, ["B", "T"])
    majority = LabelPredictions(truth, np.zeros(10, dtype=int), None, ["B", "T"])
    found = evaluate(model, {"majority": majority})
    note = "masked positions of 7 cells, which are resampled whole"
    field = {"metric": "accuracy", "target": "expressions", "ci_low": None, "ci_high": None, "n": 77, "note": note}
    found.rows += [{**field, "value": 0.785, "model": "model"}, {**field, "value": 0.723, "model": "constant"}]
    lines = text_table(found.rows).splitlines()
    assert lines[0] == "celltype"
    assert lines[1].split() == ["accuracy", "macro-F1", "cells"]
    assert lines[2].startswith("  this model       0.900 [0.")
    assert lines[2].endswith("  10")
    assert lines[3].startswith("  commonest class  0.800 [0.")
    assert lines[2].index("0.9") == lines[3].index("0.8"), "columns are aligned"
    assert lines[4:] == [
        "expressions",
        "                  accuracy  positions",
        "  this model      0.785     77",
        "  constant guess  0.723     77",
    ]


def test_text_table_shows_what_is_not_defined_and_small_numbers():
    rows = [
        {
            "metric": "mse",
            "target": "age",
            "value": 1.234e-5,
            "ci_low": 1e-6,
            "ci_high": 2e-5,
            "n": 9,
            "model": "model",
        },
        {"metric": "pcc", "target": "age", "value": None, "ci_low": None, "ci_high": None, "n": 9, "model": "model"},
    ]
    assert text_table(rows).splitlines()[2].split() == ["this", "model", "1.234e-05", "[1e-06,", "2e-05]", "-", "9"]


def test_a_prediction_within_the_label_is_right_in_the_hierarchical_accuracy():
    truth, said = np.array([0, 0, 1, 2, -100]), np.array([1, 2, 0, 2, 2])
    label = LabelPredictions(truth, said, None, ["T cell", "regulatory T cell", "B cell"])
    other = LabelPredictions(truth, np.zeros(5, dtype=np.int64), None, label.class_names)
    allowed = {"kind": np.array([[1, 1, 0], [0, 1, 0], [0, 0, 1]], dtype=bool)}
    model = Predictions(list("abcde"), {"kind": label})
    found = evaluate_predictions(model, {"majority": {"kind": other}}, Settings(resamples=50, allowed=allowed))
    rows = {(row["model"], row["metric"]): row["value"] for row in found.rows}
    assert rows["model", "accuracy"] == 0.25 and rows["model", "hierarchical_accuracy"] == 0.5
    assert rows["majority", "hierarchical_accuracy"] == rows["majority", "accuracy"] == 0.5
    plain = evaluate_predictions(model, {}, Settings(resamples=50))
    assert "hierarchical_accuracy" not in {row["metric"] for row in plain.rows}
