"""Every metric equals scikit-learn or scipy, plainly and under the weights of a resample."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn import metrics as reference

from bmfm_pipeline.errors import ConfigError
from bmfm_pipeline.evaluation.metrics import ALL_METRICS, Metric, confusion
from bmfm_pipeline.evaluation.resampling import draw_weights

CLASS_METRICS = {
    "accuracy": reference.accuracy_score,
    "f1": lambda t, p: reference.f1_score(t, p, average="macro", zero_division=0),
    "precision": lambda t, p: reference.precision_score(t, p, average="macro", zero_division=0),
    "recall": lambda t, p: reference.recall_score(t, p, average="macro", zero_division=0),
    "mcc": reference.matthews_corrcoef,
    "balanced_accuracy": reference.balanced_accuracy_score,
    "f1_weighted": lambda t, p: reference.f1_score(t, p, average="weighted", zero_division=0),
}
VALUE_METRICS = {
    "mse": reference.mean_squared_error,
    "mae": reference.mean_absolute_error,
    "pcc": lambda t, p: stats.pearsonr(t, p).statistic,
    "rmse": reference.root_mean_squared_error,
    "r2": reference.r2_score,
    "spearman": lambda t, p: stats.spearmanr(t, p).statistic,
    "zero_accuracy": lambda t, p: reference.accuracy_score(t == 0, p.round() == 0),
}


def sklearn_auroc(truth, scores):
    """Mean over the classes that have cells of both kinds."""
    areas = [
        reference.roc_auc_score(truth == label, scores[:, label])
        for label in range(scores.shape[1])
        if 0 < (truth == label).sum() < len(truth)
    ]
    return np.mean(areas)


def sklearn_auprc(truth, scores):
    present = [label for label in range(scores.shape[1]) if (truth == label).any()]
    return np.mean([reference.average_precision_score(truth == label, scores[:, label]) for label in present])


def sklearn_log_loss(truth, scores):
    return reference.log_loss(truth, shares(scores), labels=range(scores.shape[1]))


def sklearn_top(k):
    return lambda truth, scores: reference.top_k_accuracy_score(truth, scores, k=k, labels=range(scores.shape[1]))


def shares(scores):
    return scores / scores.sum(axis=1, keepdims=True)


AREAS = {"auroc": sklearn_auroc, "auprc": sklearn_auprc}
SCORE_METRICS = AREAS | {
    "log_loss": sklearn_log_loss,
    "perplexity": lambda truth, scores: np.exp(sklearn_log_loss(truth, scores)),
    "top3_accuracy": sklearn_top(3),
    "top5_accuracy": sklearn_top(5),
}


def class_case(n=200, classes=6, seed=0, right=0.6):
    generator = np.random.default_rng(seed)
    truth = generator.choice(classes, n, p=generator.dirichlet(np.ones(classes)))
    guess = np.where(generator.random(n) < right, truth, generator.integers(0, classes, n))
    scores = generator.random((n, classes)).round(1)  # many ties
    scores[np.arange(n), truth] += 0.3
    return truth, guess, scores


def test_the_list_of_metrics_is_the_one_tested_here():
    assert set(ALL_METRICS) == {*CLASS_METRICS, *SCORE_METRICS, *VALUE_METRICS}


@pytest.mark.filterwarnings("ignore:A single label was found", "ignore:y_pred contains classes not in y_true")
@pytest.mark.parametrize("name", CLASS_METRICS)
@pytest.mark.parametrize(
    "case",
    [
        class_case(),
        class_case(seed=1, classes=30, n=60),
        ([0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 1, 1]),  # classes 2 and 0 hardly or never predicted
        ([0, 0, 1, 1], [3, 0, 1, 3]),  # class 3 only predicted
        ([0, 0, 0], [0, 0, 0]),
        ([0, 0, 0], [1, 1, 1]),
        ([0, 1, 2], [1, 1, 1]),
        ([4], [4]),
        ([4], [5]),
    ],
    ids=lambda case: f"n{len(case[0])}",
)
def test_class_metrics_equal_scikit_learn(name, case):
    truth, guess = np.array(case[0]), np.array(case[1])
    assert Metric(name, truth, guess).value() == pytest.approx(CLASS_METRICS[name](truth, guess), abs=1e-12)


@pytest.mark.parametrize("name", AREAS)
def test_score_metrics_equal_scikit_learn_with_ties_and_absent_classes(name):
    truth, _, scores = class_case()
    assert Metric(name, truth, scores).value() == pytest.approx(SCORE_METRICS[name](truth, scores), abs=1e-12)
    truth = np.where(truth == 2, 3, truth)
    assert Metric(name, truth, scores).value() == pytest.approx(SCORE_METRICS[name](truth, scores), abs=1e-12)
    constant = np.full_like(scores, 0.2)
    assert Metric(name, truth, constant).value() == pytest.approx(SCORE_METRICS[name](truth, constant), abs=1e-12)


@pytest.mark.parametrize("name", sorted(set(SCORE_METRICS) - set(AREAS)))
def test_what_is_said_of_the_true_class_equals_scikit_learn(name):
    truth, _, _ = class_case()
    scores = shares(np.random.default_rng(12).random((200, 6)) + 1e-3)
    assert Metric(name, truth, scores).value() == pytest.approx(SCORE_METRICS[name](truth, scores), rel=1e-12)


def test_of_equal_scores_the_first_classes_are_named_as_for_the_class_itself():
    truth, _, scores = class_case()
    (first,) = np.nonzero(truth == 5)
    constant = np.full_like(scores, 1 / 6)
    assert Metric("top5_accuracy", truth, constant).value() == pytest.approx(1 - len(first) / 200)
    two = np.stack([np.full(200, 0.3), np.full(200, 0.7)], axis=1)
    one = Metric("log_loss", truth % 2, two[:, 1])
    assert one.value() == pytest.approx(Metric("log_loss", truth % 2, two).value())
    impossible = Metric("log_loss", [1, 1], [[1.0, 0.0], [0.0, 1.0]]).value()
    assert impossible == pytest.approx(-np.log(2.0**-24) / 2)  # the smallest float16 above 0


@pytest.mark.parametrize("labels", [(0, 1), (False, True), (-1, 1), (1, 2), ("healthy", "ill")])
def test_binary_scores_belong_to_the_greater_label(labels):
    generator = np.random.default_rng(3)
    code = generator.integers(0, 2, 80)
    truth, scores = np.array(labels)[code], generator.random(80).round(1) + 0.3 * code
    assert Metric("auroc", truth, scores).value() == pytest.approx(reference.roc_auc_score(code, scores))
    assert Metric("auprc", truth, scores).value() == pytest.approx(reference.average_precision_score(code, scores))
    assert Metric("auprc", truth, scores[:, None]).value() == Metric("auprc", truth, scores).value()


def test_scores_of_named_classes_are_taken_in_sorted_order():
    truth, _, scores = class_case(classes=4, seed=2)
    assert len(np.unique(truth)) == 4
    names = np.array(["B", "Mono", "NK", "T"])
    assert Metric("auroc", names[truth], scores).value() == pytest.approx(sklearn_auroc(truth, scores))


@pytest.mark.parametrize("name", ["auroc", "auprc"])
def test_areas_are_not_defined_for_one_observation_or_one_class(name):
    found = Metric(name, [1], [0.7]).value()
    assert np.isnan(found) if name == "auroc" else found == 1.0
    assert np.isnan(Metric(name, [0, 0], [0.7, 0.1]).value())
    assert np.isnan(Metric("auroc", [1, 1], [[0.7, 0.3], [0.1, 0.9]]).value())


@pytest.mark.parametrize("name", [*AREAS, "log_loss"])
def test_a_score_that_is_nan_gives_nan_instead_of_a_rank(name):
    assert np.isnan(Metric(name, [0, 1, 1], [0.1, np.nan, 0.9]).value())


@pytest.mark.parametrize("name", VALUE_METRICS)
def test_value_metrics_equal_scikit_learn_and_scipy(name):
    generator = np.random.default_rng(4)
    truth = generator.normal(3, 2, 100)
    guess = truth + generator.normal(size=100)
    assert Metric(name, truth, guess).value() == pytest.approx(VALUE_METRICS[name](truth, guess), rel=1e-12)
    column = Metric(name, truth[:, None], guess[:, None])  # (n, 1), as models return it
    assert column.value() == pytest.approx(VALUE_METRICS[name](truth, guess), rel=1e-12)


def test_correlation_survives_a_large_offset():
    generator = np.random.default_rng(5)
    truth = generator.normal(size=200)
    guess = truth + generator.normal(size=200)
    expected = stats.pearsonr(truth, guess).statistic
    assert Metric("pcc", truth + 1e7, guess - 1e7).value() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("constant", [0.0, 0.1, 1 / 3, 1e9 / 7])
def test_correlation_with_a_constant_is_not_defined(constant):
    truth = np.random.default_rng(6).normal(size=101)
    assert np.isnan(Metric("pcc", truth, np.full(101, constant)).value())
    assert np.isnan(Metric("spearman", truth, np.full(101, constant)).value())
    assert np.isnan(Metric("r2", np.full(101, constant), truth).value())
    assert np.isnan(Metric("pcc", [2.0], [3.0]).value())


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
@pytest.mark.parametrize("name", ALL_METRICS)
def test_weighted_values_equal_the_metric_of_the_resampled_arrays(name):
    truth, guess, scores = class_case(n=60)
    if name in VALUE_METRICS:
        truth, guess = np.random.default_rng(7).normal(size=(2, 60)).round(1)  # with equal values
        function = VALUE_METRICS[name]
    elif name in SCORE_METRICS:
        # scikit-learn takes the last of equal scores first where it looks at the top.
        guess = scores if name in AREAS else shares(scores + np.random.default_rng(9).random((60, 6)) / 100)
        function = SCORE_METRICS[name]
    else:
        function = CLASS_METRICS[name]
    weights = draw_weights(np.random.default_rng(8), 40, 60)
    rows = [np.repeat(np.arange(60), row.astype(int)) for row in weights]
    expected = [function(truth[chosen], guess[chosen]) for chosen in rows]
    assert Metric(name, truth, guess).values(weights) == pytest.approx(expected, abs=1e-12)


def test_a_function_is_called_on_every_resample():
    truth, guess, _ = class_case(n=30)
    weights = draw_weights(np.random.default_rng(0), 5, 30)
    by_name, by_function = Metric("f1", truth, guess), Metric(CLASS_METRICS["f1"], truth, guess)
    assert by_function.values(weights) == pytest.approx(by_name.values(weights))


def test_macro_averages_can_be_limited_to_some_classes():
    truth, guess, _ = class_case()
    for name, function in (
        ("f1", reference.f1_score),
        ("precision", reference.precision_score),
        ("recall", reference.recall_score),
    ):
        expected = function(truth, guess, labels=[1, 4], average="macro", zero_division=0)
        assert Metric(name, truth, guess, classes=[1, 4]).value() == pytest.approx(expected)
    names = np.array(["a", "b", "c", "d", "e", "f"])
    assert Metric("f1", names[truth], names[guess], classes=["b", "e"]).value() == pytest.approx(
        reference.f1_score(truth, guess, labels=[1, 4], average="macro")
    )


def test_labels_are_compared_by_value_not_by_type():
    truth = np.array([0, 1, 2, 2])
    assert Metric("accuracy", truth, truth.astype(float)).value() == 1.0
    assert Metric("accuracy", truth, np.array(["0", "1", "2", "1"])).value() == 0.75
    assert Metric("accuracy", pd.Series(truth, dtype=object), truth.astype(np.float32)).value() == 1.0
    names = pd.Series(["B", "T", "B"])
    assert Metric("accuracy", names.astype("category"), names.to_numpy()).value() == 1.0


def test_confusion_matrix_equals_scikit_learn():
    truth, guess, _ = class_case()
    assert confusion(truth, guess, 6).tolist() == reference.confusion_matrix(truth, guess, labels=range(6)).tolist()


@pytest.mark.parametrize(
    "truth, message",
    [
        ([0, -100, 1], r"1 of 3 observations have no known label .* the first in row 1"),
        ([0.0, 1.0, np.nan], r"the first in row 2"),
        (["B", None, "T"], r"the first in row 1"),
    ],
)
def test_unknown_labels_are_refused_not_scored(truth, message):
    with pytest.raises(ConfigError, match=message):
        Metric("accuracy", truth, truth)


def test_minus_one_hundred_is_a_number_like_any_other_in_regression():
    assert Metric("mae", [-100.0, 0.0], [-100.0, 1.0]).value() == 0.5
    with pytest.raises(ConfigError, match="no known label"):
        Metric("mae", [np.nan, 0.0], [0.0, 1.0])


@pytest.mark.parametrize(
    "name, truth, guess, message",
    [
        ("acuracy", [0], [0], "unknown metric 'acuracy'; known: accuracy"),
        ("accuracy", [0, 1], [0], "y_true has 2 observations, y_pred has 1"),
        ("accuracy", [], [], "there is no observation"),
        ("accuracy", [0, 1], [[0.1, 0.9], [0.2, 0.8]], r"y_pred has shape \(2, 2\)"),
        ("mse", ["a", "b"], [1.0, 2.0], "mse: y_true holds .* numbers are expected"),
        ("auroc", [0, 1, 2], [0.1, 0.2, 0.3], "one score per observation fits two labels, y_true holds 3"),
        (
            "auroc",
            [1, 2, 3],
            [[0.1, 0.9]] * 3,
            "y_pred has 2 columns, so y_true must hold class ids 0 to 1; found 1, 2, 3",
        ),
        ("top3_accuracy", [0, 1], [[0.1, 0.8, 0.1]] * 2, "needs scores of more than 3 classes, y_pred has those of 3"),
        ("log_loss", [0, 1], [[0.1, 4.0], [1, -2]], "y_pred holds -2 to 4; probabilities are expected"),
    ],
)
def test_what_cannot_be_scored_is_refused_with_what_was_found(name, truth, guess, message):
    with pytest.raises(ConfigError, match=message):
        Metric(name, truth, guess)
