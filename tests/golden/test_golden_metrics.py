"""Every golden score and confidence interval, discovered from the files of the folder; marked faults are answered correctly instead."""

import json

import numpy as np
import pytest
import torch

from bmfm_pipeline.evaluation import confidence_interval
from bmfm_pipeline.evaluation.intervals import interval_from_values
from bmfm_pipeline.evaluation.metrics import BY_CLASS, ClassCounts, Metric, confusion
from bmfm_pipeline.objectives import RunningMetrics, build_objectives

TOLERANCE = 1e-5
IGNORED = -100
# Names in the files and here.
NAMES = {"auc": "auroc"}
# Perturbation scores belong to another room; their files are counted below, not read.
ELSEWHERE = "perturbation_"


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
            if base in ("perplexity", "confusion_matrix"):
                continue  # of the running metrics, below
            if average:
                assert averaged(base, average, truth, guess, probabilities) == near(expected), (key, name)
            elif base == "auc":
                # A class without cells has no area. The vectors count it as 0, which a resample that misses a rare class would feel.
                assert Metric("auroc", truth, probabilities).value() * present == near(expected), key
            else:
                y_pred = probabilities if base == "auprc" else guess
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


def test_what_is_not_read_is_said(folder, say):
    known = {"README.md", "expected.json", "inputs.npz", "confidence_intervals.json"}
    known |= {"bootstrap_expected.json", "bootstrap_inputs.npz"}
    files = {path.name for path in folder.iterdir()}
    elsewhere = {name for name in files if name.startswith(ELSEWHERE)}
    say(f"golden metrics: {len(elsewhere)} files of perturbation scores are not read here")
    assert files - elsewhere == known
