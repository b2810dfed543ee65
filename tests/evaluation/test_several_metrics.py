"""Metrics of cells with several classes equal scikit-learn, plainly and under the weights of a resample; what is not known counts nowhere."""

import numpy as np
import pytest
from sklearn import metrics as reference

from bmfm_pipeline.evaluation.intervals import interval_of
from bmfm_pipeline.evaluation.metric_kinds.several import SEVERAL_METRICS, several_metrics
from bmfm_pipeline.evaluation.predictions import LabelPredictions, Predictions
from bmfm_pipeline.evaluation.resampling import draw_weights
from bmfm_pipeline.evaluation.several_classes import predictions_by_class
from bmfm_pipeline.evaluation.tables import Settings, evaluate_predictions


def case(n=80, classes=5, seed=0):
    generator = np.random.default_rng(seed)
    truth = (generator.random((n, classes)) < np.linspace(0.5, 0.1, classes)).astype(np.int64)
    probabilities = np.clip(0.6 * truth + generator.random((n, classes)) * 0.7 - 0.1, 0, 1).round(2)
    return truth, (probabilities > 0.5).astype(np.int64), probabilities


def sklearn_scores(truth, said, scores):
    there = [label for label in range(truth.shape[1]) if 0 < truth[:, label].sum() < len(truth)]
    present = [label for label in range(truth.shape[1]) if (truth | said)[:, label].any()]
    macro = {"labels": present, "average": "macro", "zero_division": 0}
    return {
        "subset_accuracy": reference.accuracy_score(truth, said),
        "hamming_loss": reference.hamming_loss(truth, said),
        "jaccard": reference.jaccard_score(truth, said, average="samples", zero_division=1),
        "f1_micro": reference.f1_score(truth, said, average="micro"),
        "f1": reference.f1_score(truth, said, **macro),
        "precision": reference.precision_score(truth, said, **macro),
        "recall": reference.recall_score(truth, said, **macro),
        "mcc": reference.matthews_corrcoef(truth.ravel(), said.ravel()),
        "auroc": np.mean([reference.roc_auc_score(truth[:, label], scores[:, label]) for label in there]),
        "auprc": np.mean([reference.average_precision_score(truth[:, label], scores[:, label]) for label in there]),
    }


def test_every_metric_equals_scikit_learn_also_in_resamples():
    truth, said, scores = case()
    metrics = {metric.name: metric for metric in several_metrics(truth, said, scores)}
    assert tuple(metrics) == SEVERAL_METRICS
    assert {name: metric.value() for name, metric in metrics.items()} == pytest.approx(
        sklearn_scores(truth, said, scores)
    )
    weights = draw_weights(np.random.default_rng(1), 5, len(truth))
    drawn = [np.repeat(np.arange(len(truth)), row.astype(int)) for row in weights]
    expected = [sklearn_scores(truth[rows], said[rows], scores[rows]) for rows in drawn]
    for name, metric in metrics.items():
        assert metric.values(weights) == pytest.approx([one[name] for one in expected]), name


def test_cells_and_answers_that_are_not_known_count_nowhere():
    truth, said, scores = case()
    added = np.vstack([truth, np.full((7, 5), -100)])
    more = several_metrics(added, np.vstack([said, said[:7]]), np.vstack([scores, scores[:7]]))
    assert [metric.value() for metric in more] == pytest.approx(list(sklearn_scores(truth, said, scores).values()))
    holed = truth.copy()
    holed[:40, 2] = -100
    found = {metric.name: metric.value() for metric in several_metrics(holed, said, scores)}
    known = holed >= 0
    assert found["hamming_loss"] == pytest.approx((holed != said)[known].mean())
    assert found["subset_accuracy"] == pytest.approx(((holed == said) | ~known).all(axis=1).mean())
    assert found["mcc"] == pytest.approx(reference.matthews_corrcoef(holed[known], said[known]))


@pytest.mark.parametrize("method", ["bca", "bootstrap_quantiles"])
def test_sums_give_the_interval_that_observations_give(method):
    truth, said, _ = case()
    groups = np.arange(80) // 4
    (subset,) = [metric for metric in several_metrics(truth, said) if metric.name == "subset_accuracy"]
    right = (truth == said).all(axis=1)
    plain = interval_of(_Mean(right), method=method, resamples=200, groups=groups)
    found = interval_of(subset, method=method, resamples=200, groups=groups)
    assert (found.low, found.high) == pytest.approx((plain.low, plain.high))
    assert subset.is_proportion


class _Mean:
    """A metric without a way of its own to leave out cells."""

    name, is_proportion = "mean", True

    def __init__(self, values):
        self.of, self.n = np.asarray(values, dtype=float), len(values)

    def values(self, weights):
        return weights @ self.of / weights.sum(axis=1)

    def value(self):
        return self.of.mean()

    def at(self, rows):
        return _Mean(self.of[rows])

    def alike(self):
        return np.arange(self.n), np.arange(self.n)


def test_a_column_of_several_classes_is_scored_as_a_whole_and_class_by_class():
    truth, said, scores = case()
    names = list("abcde")
    split = predictions_by_class({"tags": LabelPredictions(truth, said, scores, names)}, {"tags": truth})
    control = {name: LabelPredictions(one.truth, 1 - one.truth, None, one.class_names) for name, one in split.items()}
    model = Predictions([f"c{row}" for row in range(80)], split)
    found = evaluate_predictions(model, {"worst": control}, Settings(resamples=20, method="wilson"))
    whole = {row["metric"]: row for row in found.rows if (row["target"], row["model"]) == ("tags", "model")}
    assert {name: row["value"] for name, row in whole.items()} == pytest.approx(sklearn_scores(truth, said, scores))
    assert whole["subset_accuracy"]["ci_method"] == "wilson"
    assert whole["f1"]["note"] == "wilson does not fit this metric: bootstrap_quantiles is used"
    assert {row["n"] for row in whole.values()} == {80}
    other = {row["metric"]: row["value"] for row in found.rows if (row["target"], row["model"]) == ("tags", "worst")}
    assert other["hamming_loss"] == 1 and "auroc" not in other
    assert [row["target"] for row in found.rows][-1] == "tags: e"
