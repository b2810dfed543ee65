"""Every golden score and confidence interval, discovered from the files of the folder; marked faults are answered correctly instead."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

from bmfm_pipeline.evaluation import confidence_interval
from bmfm_pipeline.evaluation.intervals import interval_from_values
from bmfm_pipeline.evaluation.metric_kinds.several import several_metrics
from bmfm_pipeline.evaluation.metrics import BY_CLASS, OVER_ALL, ClassCounts, Metric, confusion
from bmfm_pipeline.evaluation.perturbation import GroupMeans, group_predictions, perturbation_scores
from bmfm_pipeline.objectives import RunningMetrics, build_objectives

TOLERANCE = 1e-5
IGNORED = -100
# Names in the files and here.
NAMES = {"auc": "auroc"}


@pytest.fixture(scope="module")
def folder(golden_dir):
    return golden_dir / "metrics"


@pytest.fixture(scope="module")
def scores(folder) -> dict:
    return json.loads((folder / "expected.json").read_text())["metrics"]


@pytest.fixture(scope="module")
def inputs(folder) -> dict[str, np.ndarray]:
    with np.load(folder / "inputs.npz") as arrays:
        return {name: arrays[name] for name in arrays.files}


def near(expected):
    return pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE)


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def averaged(name: str, average: str, truth: np.ndarray, guess: np.ndarray, scores: np.ndarray) -> float:
    """A score under another average than our default, from the same counts per class."""
    support = np.bincount(truth, minlength=scores.shape[1])
    if name == "auc":
        there = np.flatnonzero(support)
        areas = [Metric("auroc", truth == label, scores[:, label]).value() for label in there]
        return float(np.average(areas, weights=support[there]))
    if average == "micro":
        return Metric("accuracy", truth, guess).value()
    counts = ClassCounts.of_matrix(confusion(truth, guess, len(support)))
    if (name, average) == ("f1", "weighted"):
        return float(OVER_ALL["f1_weighted"](counts)[0])
    values = BY_CLASS["recall" if name == "accuracy" else name](counts)[0]
    there = (counts.true + counts.predicted)[0] > 0
    return float(np.average(values, weights=support if average == "weighted" else there))


def class_cases(scores: dict) -> list[str]:
    return [key for key in scores if key.startswith("cat/")]


def case_arrays(inputs, key):
    stem = key.replace("/", "__")
    return inputs[f"{stem}__labels"], inputs[f"{stem}__logits"]


def test_class_scores_of_stored_predictions(scores, inputs, say):
    checked = 0
    for key in class_cases(scores):
        labels, logits = case_arrays(inputs, key)
        known = labels != IGNORED
        truth, probabilities = labels[known], softmax(logits[known])
        guess = probabilities.argmax(axis=1)
        present = len(np.unique(truth)) / logits.shape[1]
        for name, expected in scores[key].items():
            base, _, average = name.partition("__average=")
            if base == "confusion_matrix":
                assert confusion(truth, guess, logits.shape[1]).tolist() == expected, key
            elif average:
                assert averaged(base, average, truth, guess, probabilities) == near(expected), (key, name)
            elif base == "auc":
                # A class without cells has no area. The vectors count it as 0, which a resample that misses a rare class would feel.
                assert Metric("auroc", truth, probabilities).value() * present == near(expected), key
            else:
                y_pred = probabilities if base in ("auprc", "perplexity") else guess
                assert Metric(NAMES.get(base, base), truth, y_pred).value() == near(expected), (key, name)
            checked += 1
    say(f"golden metrics: {checked} class scores checked")
    assert checked > 20


def test_class_scores_of_running_metrics_fed_in_three_pieces(scores, inputs, say):
    checked = 0
    for key in class_cases(scores):
        labels, logits = (torch.from_numpy(array) for array in case_arrays(inputs, key))
        kept = [name for name in scores[key] if "__" not in name and name not in ("auc", "auprc")]
        loss = {"label_column_name": "x", "name": "cross_entropy", "metrics": [{"name": name} for name in kept]}
        running = RunningMetrics(build_objectives([loss], [], [{"label_column_name": "x"}]))
        for piece, targets in zip(logits.chunk(3), labels.chunk(3), strict=True):
            running.update({"x": piece}, {"x": targets})
        found = running.compute()
        for name in kept:
            value = running.matrices()["x"].tolist() if name == "confusion_matrix" else found[f"x_{name}"]
            assert np.array(value) == near(np.array(scores[key][name])), (key, name)
            checked += 1
    say(f"golden metrics: {checked} running class scores checked")
    assert checked > 20


def test_regression_scores(scores, inputs, say):
    expected = scores["reg"]
    truth, guess, ignored = (inputs[f"reg__{name}"] for name in ("labels", "predictions", "labels_with_ignored"))
    for name in ("mse", "mae", "pcc"):
        assert Metric(name, truth, guess).value() == near(expected[name])
    names = [{"name": name} for name in ("mse", "mae", "pcc", "nonzero_confusion_matrix")]
    loss = {"label_column_name": "x", "name": "mse", "metrics": names}
    for labels, ending in ((truth, ""), (ignored, "_with_-100")):
        running = RunningMetrics(
            build_objectives([loss], [], [{"label_column_name": "x", "is_regression_label": True}])
        )
        running.update({"x": torch.from_numpy(guess)[:, None]}, {"x": torch.from_numpy(labels)})
        found, known = running.compute(), labels != IGNORED
        for name in ("mse", "mae", "pcc"):
            # Where the vectors took -100 as a number, ours are the scores of the cells that have a label.
            value = expected[name] if not ending else Metric(name, labels[known], guess[known]).value()
            assert found[f"x_{name}"] == near(value), (name, ending)
    say("golden metrics: 3 regression scores checked, 3 marked faults answered correctly instead")


def test_multilabel_scores(scores, inputs):
    expected, labels = scores["multilabel"], inputs["multilabel__labels"]
    probabilities = inputs["multilabel__probabilities"]
    guess = (probabilities > 0.5).astype(int)
    columns = [(labels[:, c], guess[:, c], probabilities[:, c]) for c in range(labels.shape[1])]
    columns = [tuple(values[truth != IGNORED] for values in (truth, said, p)) for truth, said, p in columns]
    found = {name: np.mean([Metric(name, t, g, classes=[1]).value() for t, g, _ in columns]) for name in BY_CLASS}
    found["accuracy"] = np.mean([Metric("accuracy", truth, said).value() for truth, said, _ in columns])
    found["auc"] = np.mean([Metric("auroc", truth, p).value() for truth, _, p in columns])
    found["auprc"] = np.mean([Metric("auprc", truth, p).value() for truth, _, p in columns])
    flat = [np.concatenate(values) for values in zip(*columns, strict=True)]
    found["mcc"] = Metric("mcc", flat[0], flat[1]).value()
    assert found == {name: near(value) for name, value in expected.items()}
    if (labels != IGNORED).all(axis=1).any():
        # Over all classes at once, from the same arrays: answers that are not known count nowhere.
        together = {metric.name: metric.value() for metric in several_metrics(labels, guess, probabilities)}
        assert together["mcc"] == near(expected["mcc"])
        assert together["auroc"] == near(expected["auc"]) and together["auprc"] == near(expected["auprc"])
        assert {name: together[name] for name in BY_CLASS} == {name: near(expected[name]) for name in BY_CLASS}


def test_every_confidence_interval(folder, say):
    cases = json.loads((folder / "confidence_intervals.json").read_text())
    corrected = 0
    for case in cases:
        expected = case.get("correct", case["peer"])
        corrected += "correct" in case
        low, high = interval_from_values(case["data"], method=case["method"], n=case["n"])
        for found, bound in ((low, expected["low"]), (high, expected["high"])):
            what = (case["case"], case["method"])
            assert found is None if bound is None else found == near(bound), what
        assert np.mean(case["data"]) == near(expected["mean"])
    say(f"golden metrics: {len(cases)} intervals checked, {corrected} of them against the corrected formula")
    assert len(cases) > 10


def test_resampled_scores_and_their_intervals(folder):
    expected = json.loads((folder / "bootstrap_expected.json").read_text())
    with np.load(folder / "bootstrap_inputs.npz") as arrays:
        truth, guess, drawn = (arrays[name] for name in ("labels", "predictions", "resample_indices"))
    weights = np.stack([np.bincount(row, minlength=len(truth)) for row in drawn]).astype(float)
    values = Metric("accuracy", truth, guess).values(weights)
    assert values == near(np.array(expected["correct_per_run"]))
    intervals = expected["correct_ci"]
    for name, (mean, low, high) in intervals.items():
        method = name.removesuffix("_with_n_test")
        n = len(truth) if method != name else None
        assert interval_from_values(values, method=method, n=n) == near((low, high)), name
        assert values.mean() == near(mean)
    own = confidence_interval("accuracy", y_true=truth, y_pred=guess, method="binomial")
    assert own.n == len(truth)


@pytest.fixture(scope="module")
def perturbed(folder):
    predictions = pd.read_csv(folder / "perturbation_predictions.csv")
    means = GroupMeans.from_table(pd.read_csv(folder / "perturbation_ground_truth.csv", index_col=0))
    return predictions, means, json.loads((folder / "perturbation_expected.json").read_text())


@pytest.mark.parametrize("delta", [False, True])
def test_predictions_grouped_by_perturbation(folder, perturbed, delta):
    predictions, means, _ = perturbed
    name = "perturbation_grouped_from_delta_minus_one_expected.csv" if delta else "perturbation_grouped_expected.csv"
    expected = pd.read_csv(folder / name)
    values = predictions["predicted_expressions"] - delta
    found = group_predictions(
        predictions["perturbed_genes"],
        predictions["input_genes"],
        values,
        means,
        added_to="train_mean" if delta else None,
    )
    order = means.of(found.perturbations)
    columns = {
        "predicted_expressions": found.predicted,
        "label_expressions": order.profiles,
        "input_expressions": np.tile(means.control, (len(found.perturbations), 1)),
        "baseline_expressions": np.tile(means.train_mean, (len(found.perturbations), 1)),
    }
    for column, ours in columns.items():
        table = expected.pivot(index="perturbed_genes", columns="input_genes", values=column)
        assert ours == near(table.loc[found.perturbations, means.genes].to_numpy()), column


def test_scores_of_perturbations_and_of_their_baselines(perturbed, say):
    predictions, means, expected = perturbed
    found = group_predictions(*(predictions[name] for name in predictions.columns), means)
    means = means.of(found.perturbations)
    scores = perturbation_scores(found.predicted, means)
    baselines = {
        "baseline_": perturbation_scores(np.tile(means.control, (len(means.perturbations), 1)), means),
        "_from_avg_perturbation": perturbation_scores(np.tile(means.train_mean, (len(means.perturbations), 1)), means),
    }
    checked = 0
    for row, name in enumerate(means.perturbations):
        for metric, value in expected["per_perturbation"][name].items():
            if metric.endswith("_from_avg_perturbation"):
                own = baselines["_from_avg_perturbation"]
                ours = own[metric.removeprefix("baseline_").removesuffix("_from_avg_perturbation")]
            else:
                ours = (baselines["baseline_"] if metric.startswith("baseline_") else scores)[
                    metric.removeprefix("baseline_")
                ]
            assert ours[row] == near(value), (name, metric)
            checked += 1
        assert scores["discrimination_score"][row] == near(expected["discrimination_score_excluding_target"][name])
    # With the target genes left in, the vectors hold places in the order of names, whatever was predicted: no score to reproduce.
    places = [expected["discrimination_score_including_target"][name] for name in means.perturbations]
    assert places == near([1 - row / len(places) for row in range(len(places))])
    for metric in ("agg_pcc", "delta_agg_pcc", "agg_mae"):
        assert scores[metric].mean() == near(expected["mean"][metric])
    say(f"golden metrics: {checked} scores of perturbations checked")
    assert checked >= 35


def test_every_file_is_read(folder):
    read = {"README.md", "expected.json", "inputs.npz", "confidence_intervals.json"}
    read |= {"bootstrap_expected.json", "bootstrap_inputs.npz"}
    read |= {f"perturbation_{name}" for name in ("expected.json", "ground_truth.csv", "predictions.csv")}
    read |= {f"perturbation_grouped{name}_expected.csv" for name in ("", "_from_delta_minus_one")}
    assert {path.name for path in folder.iterdir()} == read
