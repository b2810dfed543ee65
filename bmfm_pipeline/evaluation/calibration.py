"""Whether a model's confidence can be believed: calibration.json, and the rows ece, brier and nll of metrics.json."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from bmfm_pipeline.evaluation.confidences import Confidences, confidences_of_control
from bmfm_pipeline.evaluation.intervals import Interval
from bmfm_pipeline.evaluation.predictions import LabelPredictions
from bmfm_pipeline.evaluation.reliability import (
    AccuracyAtCoverage,
    CalibrationError,
    Mean,
    OfCells,
    RiskCoverageArea,
)
from bmfm_pipeline.evaluation.resampling import resampled_together
from bmfm_pipeline.evaluation.rows import Settings, metric_row
from bmfm_pipeline.training.temperature import TARGET_ACCURACY, coverage_points, pick_threshold

METHOD = "bootstrap_quantiles"
COVERAGES = (0.8, 0.9)
NOTES = {
    "ece": "confidence against accuracy in {bins} bins of equal size, not debiased; {calibrated:.3f} would be expected of exact "
    "confidences, and the interval allows for it",
    "brier": "squared distance of all classes' probabilities to the truth, 0 to 2",
    "nll": "minus the logarithm of the true class's probability, in nats",
}


@dataclass(frozen=True)
class Unknown:
    """Below which calibrated confidence a cell is called unknown: a number, 'auto' (the lowest that reaches `target_accuracy` on dev
    cells), or None for never."""

    threshold: float | Literal["auto"] | None = "auto"
    target_accuracy: float = TARGET_ACCURACY


def _known(found: Confidences, settings: Settings) -> tuple[Confidences, np.ndarray | None]:
    known = np.flatnonzero(found.known)
    return found.at(known), None if settings.groups is None else np.asarray(settings.groups)[known]


def _bounds(statistics: Sequence[OfCells], settings: Settings, groups) -> list[tuple[float | None, float | None]]:
    """Quantiles of each over the same resamples; none where all cells are of one group, or too few of the resamples define it."""
    if groups is not None and len(np.unique(np.asarray(groups).astype(str))) == 1:
        return [(None, None)] * len(statistics)
    tail = (1 - settings.level) / 2
    found = []
    for values in resampled_together(statistics, settings.resamples, settings.seed, groups):
        values = values[np.isfinite(values)]
        low, high = np.quantile(values, [tail, 1 - tail]) if len(values) else (None, None)
        found.append((None, None) if low is None else (float(low), float(high)))
    return found


def _entry(statistic: OfCells, bounds: tuple[float | None, float | None]) -> dict[str, Any]:
    value = statistic.value()
    return {
        "value": float(value) if np.isfinite(value) else None,
        "ci_low": bounds[0],
        "ci_high": bounds[1],
        "ci_method": METHOD if bounds[0] is not None else "none",
        "n": statistic.n,
    }


def _error(
    statistic: CalibrationError, bounds: tuple[float | None, float | None], settings: Settings
) -> dict[str, Any]:
    """The calibration error, with what luck alone would make of it: then, the lower bound is 0."""
    expected, most = statistic.if_calibrated(0.5 + settings.level / 2, settings.seed)
    entry = _entry(statistic, bounds)
    if entry["ci_low"] is not None and entry["value"] <= most:
        entry["ci_low"] = 0.0
    return {**entry, "bins": statistic.count, "if_calibrated": expected, "if_calibrated_high": most}


def scores(found: Confidences, settings: Settings) -> dict[str, dict[str, Any]]:
    """ece, brier and nll of cells whose truth is known, each with its interval; nothing where it is known of none."""
    cells, groups = _known(found, settings)
    if not len(cells.right):
        return {}
    error, others = CalibrationError(cells.confidence, cells.right), [Mean(cells.brier), Mean(cells.loss)]
    of_error, *bounds = _bounds([error, *others], settings, groups)
    pairs = zip(("brier", "nll"), others, bounds, strict=True)
    return {"ece": _error(error, of_error, settings), **{name: _entry(one, ends) for name, one, ends in pairs}}


def score_rows(
    found: Confidences, target: str, model: str, settings: Settings, temperature: float | None = None
) -> list[dict[str, Any]]:
    """Rows of metrics.json for ece, brier and nll. `temperature`: that of the probabilities, where they were scaled."""
    rows = []
    for metric, entry in scores(found, settings).items():
        note = NOTES[metric].format(bins=entry.get("bins"), calibrated=entry.get("if_calibrated", 0.0))
        if temperature is not None and temperature != 1:
            note += f"; probabilities at temperature {temperature:.3g}"
        if settings.stratified and settings.groups is None:
            note += "; cells are drawn over all classes"
        interval = Interval(*(entry[name] for name in ("value", "ci_low", "ci_high", "n", "ci_method")))
        rows.append(metric_row(metric, target, interval, settings.resamples, settings, model, note))
    return rows


def rows_of_all(
    model: Mapping[str, Mapping[str, Confidences]],
    controls: Mapping[str, Mapping[str, LabelPredictions]],
    fitted: Mapping[str, dict[str, Any]],
    settings: Settings,
) -> list[dict[str, Any]]:
    """score_rows of the model, at its temperatures, and of the controls that have probabilities, as they give them."""
    rows = []
    for target, ways in model.items():
        temperature = fitted_to(target, fitted).get("temperature")
        rows += score_rows(ways["calibrated"], target, "model", settings, temperature)
        for name, labels in controls.items():
            found = confidences_of_control(labels[target]) if target in labels else None
            rows += [] if found is None else score_rows(found, target, name, settings)
    return rows


def fitted_to(target: str, fitted: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """What was fitted to the label column of a target; nothing where the model has no calibration. `COLUMN: CLASS` is of COLUMN, whose
    temperature is that of each class, but whose threshold is for all its classes at once."""
    if target in fitted:
        return fitted[target]
    column = next((name for name in fitted if target.startswith(f"{name}: ")), None)
    if column is None:
        return {}
    return {name: value for name, value in fitted[column].items() if name not in ("coverage", "unknown")}


def calibration_of(
    found: dict[str, Confidences], fitted: dict[str, Any], settings: Settings, unknown: Unknown
) -> dict[str, Any]:
    """The entry of one target in calibration.json.

    `found` holds "calibrated" and "uncalibrated" confidences of the test cells, `fitted` what the model folder's calibration.json says
    of the label (nothing for a model without one). Empty where the truth of no cell is known.
    """
    after, before = (scores(found[way], settings) for way in ("calibrated", "uncalibrated"))
    if not after:
        return {}
    cells, groups = _known(found["calibrated"], settings)
    area = RiskCoverageArea(cells.confidence, cells.right)
    at = [AccuracyAtCoverage(cells.confidence, cells.right, coverage) for coverage in COVERAGES]
    bounds = _bounds([area, *at], settings, groups)
    points = coverage_points(cells.confidence, cells.right)
    wrong = float((~cells.right).mean())
    entry = {
        "temperature": float(fitted.get("temperature", 1.0)),
        "n_dev": int(fitted.get("n", 0)),
        "ece": after["ece"],
        "ece_uncalibrated": before["ece"],
        "brier": after["brier"],
        "brier_uncalibrated": before["brier"],
        "nll": after["nll"],
        "nll_uncalibrated": before["nll"],
        "bins": CalibrationError(cells.confidence, cells.right).bins(),
        "bins_uncalibrated": _bins(found["uncalibrated"], settings),
        "risk_coverage": points,
        "aurc": {**_entry(area, bounds[0]), "best": best_area(cells.right), "chance": wrong},
        "accuracy_at_coverage": [
            {"coverage": coverage, **_entry(one, ends)}
            for coverage, one, ends in zip(COVERAGES, at, bounds[1:], strict=True)
        ],
        "unknown": _unknown(cells, fitted, settings, unknown, groups),
    }
    if "encoder_share" in fitted:  # of a model whose linear path was weighed against its encoder
        entry["encoder_share"] = float(fitted["encoder_share"])
    if note := fitted.get("note") or (None if fitted else "the model has no calibration.json: temperature 1"):
        entry["note"] = note
    return {**entry, "sentence": sentence(entry)}


def _bins(found: Confidences, settings: Settings) -> list[dict[str, float]]:
    cells, _ = _known(found, settings)
    return CalibrationError(cells.confidence, cells.right).bins()


def best_area(right: np.ndarray) -> float:
    """The area under the risk-coverage curve if every wrong label were less sure than every right one."""
    n, wrong = len(right), int((~right).sum())
    return float((np.maximum(np.arange(1, n + 1) - (n - wrong), 0) / np.arange(1, n + 1)).mean())


def _unknown(
    cells: Confidences, fitted: dict[str, Any], settings: Settings, unknown: Unknown, groups
) -> dict[str, Any]:
    """What asking for the threshold does to the test cells: the share called unknown, how often the others are right."""
    threshold, about = unknown.threshold, {}
    if threshold == "auto":
        picked = pick_threshold(fitted.get("coverage", []), unknown.target_accuracy)
        threshold = picked.pop("threshold")
        about = {"target_accuracy": picked["target_accuracy"], "dev_accuracy": picked["accuracy"]}
        about |= {"note": picked["note"]} if "note" in picked else {}
    if threshold is None:
        return {"threshold": None, "share": None, "accuracy_of_known": None, **about}
    kept = cells.confidence >= threshold
    right = Mean(cells.right.astype(np.float64), of=kept)
    (low, high), *_ = _bounds([right], settings, groups) if kept.any() else [(None, None)]
    refused = cells.right[~kept]
    return {
        "threshold": float(threshold),
        "share": float(1 - kept.mean()),
        "accuracy_of_known": right.value() if kept.any() else None,
        "ci_low": low,
        "ci_high": high,
        "n_known": int(kept.sum()),
        "accuracy_of_unknown": float(refused.mean()) if len(refused) else None,
        **about,
    }


def sentence(entry: dict[str, Any]) -> str:
    """What a person should take from an entry of calibration.json."""
    error = entry["ece"]
    between = (
        "" if error["ci_low"] is None else f" (interval {100 * error['ci_low']:.1f} to {100 * error['ci_high']:.1f})"
    )
    if error["value"] <= error["if_calibrated_high"]:
        verdict = f"of {error['n']} cells, exact confidences would show {100 * error['if_calibrated']:.1f}: no sign that they are wrong"
    else:
        sure = sum(one["n"] * (one["confidence"] - one["accuracy"]) for one in entry["bins"]) / error["n"]
        mixed = abs(sure) < error["value"] / 2
        verdict = (
            "too sure of some cells, not sure enough of others"
            if mixed
            else "too sure"
            if sure > 0
            else "not sure enough"
        )
    return f"confidence is {100 * error['value']:.1f} points off on average{between}; {verdict}"
