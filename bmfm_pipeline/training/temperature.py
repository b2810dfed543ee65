"""Temperature scaling (Guo et al. 2017): one number per label that makes probabilities mean what they say, and the confidence to ask for."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bmfm_pipeline.storage import read_json

CALIBRATION = "calibration.json"
# From fewer cells a temperature would be noise.
FEWEST_CELLS = 30
LOWEST, HIGHEST = 0.05, 20.0
# The share of right labels that a threshold picked by itself is to reach, unless another is asked for.
TARGET_ACCURACY = 0.95
# Fewer kept cells say too little about their accuracy.
FEWEST_KEPT = 20
POINTS = 200


def scaled_log_probabilities(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """log softmax(logits / temperature), float64 (n, C), exact where probabilities would underflow."""
    scaled = np.asarray(logits, dtype=np.float64) / temperature
    shifted = scaled - scaled.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def scaled_probabilities(logits: np.ndarray, temperature: float = 1.0, several: bool = False) -> np.ndarray:
    """Probabilities float64 (n, C) of logits over a temperature; `several`: of each class by itself, where a cell may have several.

    The order of a cell's classes, and so its label, is that of the logits whatever the temperature.
    """
    if several:
        return np.exp(-np.logaddexp(0, -np.asarray(logits, dtype=np.float64) / temperature))
    return np.exp(scaled_log_probabilities(logits, temperature))


def confidence_of(probabilities: np.ndarray, several: bool = False) -> np.ndarray:
    """How sure each cell's label is, (n,): its probability; of several classes a cell, that of the answer which is least sure."""
    if several:
        return np.maximum(probabilities, 1 - probabilities).min(axis=1)
    return probabilities.max(axis=1)


def fit_temperature(logits: np.ndarray, truth: np.ndarray, several: bool = False) -> dict[str, Any]:
    """{temperature, n, nll_before, nll_after} from logits (n, C) and class ids (n,), or 0 and 1 (n, C) for `several` classes a cell.

    Minimises the negative log-likelihood, which is convex in 1 / temperature. Where every label is right it would fall without end as
    they are made certain: then one more cell than there are is taken to be wrong (as in Platt 1999), of the likeliest other class.
    Cells without a known label (below 0) are left out. Temperature 1 and a `note` where the cells cannot tell one; a note too where the
    highest is taken.
    """
    known = (truth >= 0).any(axis=1) if several else truth >= 0
    logits, truth = np.asarray(logits, dtype=np.float64)[known], truth[known]
    n = len(truth)
    if not n:
        return _without("no dev cell has a known label", n)
    if not np.isfinite(logits).all():
        return _without("the model returns nan for dev cells", n)
    nll = _binary_nll(logits, truth) if several else _nll(logits, truth)
    if not several and logits.shape[1] < 2:
        return _without("there is but one class", n, nll(1.0, 0.0))
    if n < FEWEST_CELLS:
        return _without(f"{n} dev cells are too few (at least {FEWEST_CELLS})", n, nll(1.0, 0.0))
    from scipy.optimize import minimize_scalar

    right = ((logits > 0) == (truth > 0))[truth >= 0] if several else logits.argmax(axis=1) == truth
    smoothing = 1 / (n + 2) if right.all() else 0.0
    bounds = (math.log(LOWEST), math.log(HIGHEST))
    found = minimize_scalar(
        lambda log: nll(math.exp(log), smoothing), bounds=bounds, method="bounded", options={"xatol": 1e-6}
    )
    temperature, before = math.exp(float(found.x)), nll(1.0, 0.0)
    after = nll(temperature, 0.0)
    if after > before:
        return _without("no dev cell has a wrong label, and none is more likely at another temperature", n, before)
    found = {"temperature": temperature, "n": n, "nll_before": before, "nll_after": after}
    if temperature > 0.999 * HIGHEST:
        found["note"] = (
            "the highest temperature that is tried: what the model says of dev cells does not help to tell their labels"
        )
    return found


def _without(note: str, n: int, nll: float | None = None) -> dict[str, Any]:
    return {"temperature": 1.0, "n": n, "nll_before": nll, "nll_after": nll, "note": f"{note}: not calibrated"}


def _nll(logits: np.ndarray, truth: np.ndarray):
    """Mean negative log-likelihood of a temperature; `smoothing` is the share of the truth that lies with the likeliest other class."""
    cells = np.arange(len(truth))
    own, others = logits[cells, truth], logits.copy()
    others[cells, truth] = -np.inf
    other = own if logits.shape[1] < 2 else others.max(axis=1)

    def value(temperature: float, smoothing: float) -> float:
        scaled = logits / temperature
        top = scaled.max(axis=1)
        whole = top + np.log(np.exp(scaled - top[:, None]).sum(axis=1))
        return float((whole - ((1 - smoothing) * own + smoothing * other) / temperature).mean())

    return value


def _binary_nll(logits: np.ndarray, truth: np.ndarray):
    known = truth >= 0
    logits, sign = logits[known], np.where(truth[known] > 0, 1.0, -1.0)

    def value(temperature: float, smoothing: float) -> float:
        scaled = sign * logits / temperature
        return float((np.logaddexp(0, -scaled) + smoothing * scaled).mean())

    return value


def coverage_points(confidence: np.ndarray, right: np.ndarray, most: int = POINTS) -> list[dict[str, Any]]:
    """[{threshold, coverage, risk, n}] as fewer and fewer cells are kept out: of the n cells at least as sure as `threshold`.

    `right` (n,) tells which labels are; risk is the share of wrong ones. Cells that are equally sure are kept together; at most
    `most` points, spaced evenly in coverage, the last of all cells.
    """
    order = np.argsort(-confidence, kind="stable")
    ranked = confidence[order]
    ends = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))
    if len(ends) > most:
        wanted = np.searchsorted(ends, np.arange(1, most + 1) * len(ranked) / most - 1)
        ends = ends[np.unique(np.minimum(wanted, len(ends) - 1))]
    wrong = np.cumsum(~right[order].astype(bool))[ends]
    return [
        {
            "threshold": float(ranked[end]),
            "coverage": (int(end) + 1) / len(ranked),
            "risk": int(errors) / (int(end) + 1),
            "n": int(end) + 1,
        }
        for end, errors in zip(ends, wrong, strict=True)
    ]


def pick_threshold(points: Sequence[dict[str, Any]], target: float = TARGET_ACCURACY) -> dict[str, Any]:
    """The lowest confidence to ask for so that the cells kept are right as often as `target`, from `coverage_points`.

    One more cell than is kept is taken to be wrong: the lowest of many thresholds owes something to luck.
    {target_accuracy, threshold, share, accuracy}: `share` of cells called unknown, `accuracy` of the others; threshold 0 where all
    cells together reach the target, None and a `note` where no threshold that keeps 20 cells does.
    """
    kept = [point for point in points if point["n"] >= FEWEST_KEPT]
    reached = [point for point in kept if (point["risk"] * point["n"] + 1) / (point["n"] + 1) <= 1 - target + 1e-12]
    if not reached:
        best = min(kept, key=lambda point: point["risk"], default=None)
        found = "" if best is None else f" (at best {1 - best['risk']:.1%} of {best['n']} cells)"
        note = f"no confidence that keeps {FEWEST_KEPT} dev cells is enough for an accuracy of {target:g}{found}"
        return {"target_accuracy": target, "threshold": None, "share": None, "accuracy": None, "note": note}
    last = reached[-1]
    return {
        "target_accuracy": target,
        # A little less, so that the rounding of another batch does not shut out the very cell that it was taken from.
        "threshold": last["threshold"] * (1 - 1e-6) if last["coverage"] < 1 else 0.0,
        "share": 1 - last["coverage"],
        "accuracy": 1 - last["risk"],
    }


def read_calibration(folder: str | Path) -> dict[str, dict[str, Any]]:
    """{label: what was fitted} of a model folder; nothing for a model from elsewhere, whose temperatures are 1."""
    file = Path(folder) / CALIBRATION
    return read_json(file) if file.exists() else {}


def temperatures(calibration: dict[str, dict[str, Any]]) -> dict[str, float]:
    return {name: float(entry["temperature"]) for name, entry in calibration.items()}
