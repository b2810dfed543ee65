"""From stored predictions to the rows of metrics.json: model and controls side by side, per class, with verdicts in words."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bmfm_pipeline.errors import ConfigError
from bmfm_pipeline.evaluation.intervals import Interval, confidence_interval, resampled
from bmfm_pipeline.evaluation.metrics import Metric, confusion, f1_by_class, precision_by_class, recall_by_class
from bmfm_pipeline.evaluation.predictions import LabelPredictions, Predictions

CLASS_METRICS = ("accuracy", "f1", "precision", "recall", "mcc", "auroc", "auprc")
VALUE_METRICS = ("mse", "mae", "pcc")
FALLBACK = "bootstrap_quantiles"


@dataclass
class Settings:
    """How intervals are made. `rare_class_floor`: classes with fewer test cells are named and left out of a second macro average."""

    method: str = "bootstrap_quantiles"
    resamples: int = 1000
    level: float = 0.95
    seed: int = 0
    rare_class_floor: int = 10
    split: str = "test"
    split_hash: str = ""
    groups: np.ndarray | None = None


@dataclass
class Evaluation:
    """What an evaluation found: `rows` are metrics.json, the rest feeds the report."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    per_class: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    confusion: dict[str, dict[str, Any]] = field(default_factory=dict)
    verdicts: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def evaluate_predictions(
    model: Predictions, controls: dict[str, dict[str, LabelPredictions]], settings: Settings
) -> Evaluation:
    """Metrics with intervals of the model and of every control, for every label column and masked field."""
    result = Evaluation()
    for target, predictions in model.labels.items():
        known = predictions.known
        if not known.all():
            result.notes.append(
                f"{target}: {int((~known).sum())} of {len(known)} cells have no known label and are not scored"
            )
        if not known.any():
            result.notes.append(f"{target}: no cell of the {settings.split} split has a label; nothing to score")
            continue
        if predictions.is_regression:
            _regression(result, target, predictions, controls, settings)
        else:
            _classification(result, target, predictions, controls, settings)
    _masked_fields(result, model.fields, settings)
    return result


def _row(
    metric: str, target: str, interval: Interval, settings: Settings, model: str, note: str = ""
) -> dict[str, Any]:
    uses_resamples = interval.method in ("bootstrap_quantiles", "bootstrap_t_interval", "bca")
    row = {
        "metric": metric,
        "target": target,
        "value": _plain(interval.value),
        "ci_low": _plain(interval.low),
        "ci_high": _plain(interval.high),
        "ci_method": interval.method,
        "n": interval.n,
        "resamples": settings.resamples if uses_resamples else 0,
        "split": settings.split,
        "split_hash": settings.split_hash,
        "seed": settings.seed,
        "model": model,
    }
    return {**row, "note": note} if note else row


def _plain(value: float | None) -> float | None:
    return None if value is None or not np.isfinite(value) else float(value)


def _interval(metric: str, y_true, y_pred, settings: Settings, groups) -> tuple[Interval, str]:
    options = {"resamples": settings.resamples, "level": settings.level, "seed": settings.seed, "groups": groups}
    try:
        return confidence_interval(metric, y_true=y_true, y_pred=y_pred, method=settings.method, **options), ""
    except ConfigError as error:
        note = f"{settings.method} does not fit {metric}: {FALLBACK} is used"
        if settings.method == FALLBACK:
            raise error
        return confidence_interval(metric, y_true=y_true, y_pred=y_pred, method=FALLBACK, **options), note


def _classification(result: Evaluation, target: str, model: LabelPredictions, controls, settings: Settings) -> None:
    known = model.known
    truth, names = model.truth[known], model.class_names
    groups = None if settings.groups is None else settings.groups[known]
    contenders = {"model": model, **{name: labels[target] for name, labels in controls.items() if target in labels}}
    for name, predictions in contenders.items():
        for metric in CLASS_METRICS:
            scores = metric in ("auroc", "auprc")
            if scores and predictions.probabilities is None:
                continue
            guess = predictions.probabilities[known] if scores else predictions.predicted[known]
            if scores and len(names) == 2:
                guess = guess[:, 1]
            interval, note = _interval(metric, truth, guess, settings, groups)
            result.rows.append(_row(metric, target, interval, settings, name, note))
    support = np.bincount(truth, minlength=len(names))
    rare = [names[index] for index in np.flatnonzero((support > 0) & (support < settings.rare_class_floor))]
    absent = [names[index] for index in np.flatnonzero(support == 0)]
    if rare:
        listed = ", ".join(f"{name} ({support[names.index(name)]})" for name in rare)
        result.notes.append(
            f"{target}: classes with fewer than {settings.rare_class_floor} test cells, scored with wide error: {listed}"
        )
        common = np.isin(truth, np.flatnonzero(support >= settings.rare_class_floor))
        if common.any():
            for name, predictions in contenders.items():
                inside = None if groups is None else groups[common]
                interval, _ = _interval("f1", truth[common], predictions.predicted[known][common], settings, inside)
                result.rows.append(
                    _row(
                        "f1_without_rare",
                        target,
                        interval,
                        settings,
                        name,
                        "macro-F1 over the cells of the other classes",
                    )
                )
    if absent:
        result.notes.append(f"{target}: classes without a test cell, not scored: {', '.join(absent)}")
    matrix = confusion(truth, model.predicted[known], np.ones((1, len(truth))), len(names))
    result.confusion[target] = {"classes": names, "counts": matrix[0].astype(int).tolist()}
    columns = {
        "precision": precision_by_class(matrix)[0],
        "recall": recall_by_class(matrix)[0],
        "f1": f1_by_class(matrix)[0],
    }
    control = contenders.get("logistic_l2")
    if control is not None:
        columns["f1_logistic_l2"] = f1_by_class(
            confusion(truth, control.predicted[known], np.ones((1, len(truth))), len(names))
        )[0]
    result.per_class[target] = [
        {
            "class": name,
            "support": int(support[index]),
            **{column: float(values[index]) for column, values in columns.items()},
            "rare": name in rare,
        }
        for index, name in enumerate(names)
    ]
    for name in ("logistic_l2", "majority"):
        if name in contenders:
            result.verdicts.append(
                _verdict(
                    target, truth, model.predicted[known], contenders[name].predicted[known], name, settings, groups
                )
            )


_NAMES = {"logistic_l2": "logistic regression", "majority": "the commonest class"}


def _verdict(target: str, truth, guess, other, control: str, settings: Settings, groups) -> str:
    """Paired: both are resampled with the same cells, so what they share cancels."""
    differences = {}
    for metric in ("accuracy", "f1"):
        ours = resampled(Metric(metric, truth, guess), settings.resamples, settings.seed, groups)
        theirs = resampled(Metric(metric, truth, other), settings.resamples, settings.seed, groups)
        point = Metric(metric, truth, guess).value() - Metric(metric, truth, other).value()
        tail = (1 - settings.level) / 2
        low, high = np.quantile(ours - theirs, [tail, 1 - tail])
        differences[metric] = (100 * point, 100 * float(low), 100 * float(high))
    point, low, high = differences["accuracy"]
    words = "better than" if low > 0 else "worse than" if high < 0 else "not shown to differ from"
    f1 = differences["f1"]
    return (
        f"{target}: the model is {words} {_NAMES[control]}: accuracy {point:+.1f} points ({settings.level:.0%} interval {low:+.1f} to {high:+.1f}), "
        f"macro-F1 {f1[0]:+.1f} ({f1[1]:+.1f} to {f1[2]:+.1f}); McNemar p = {_mcnemar(truth, guess, other):.2g}"
    )


def _mcnemar(truth, guess, other) -> float:
    """Exact McNemar test of two classifiers on the same cells."""
    from scipy import stats

    only_ours = int(((guess == truth) & (other != truth)).sum())
    only_theirs = int(((guess != truth) & (other == truth)).sum())
    if only_ours + only_theirs == 0:
        return 1.0
    return float(stats.binomtest(only_ours, only_ours + only_theirs).pvalue)


def _regression(result: Evaluation, target: str, model: LabelPredictions, controls, settings: Settings) -> None:
    known = model.known
    groups = None if settings.groups is None else settings.groups[known]
    contenders = {"model": model, **{name: labels[target] for name, labels in controls.items() if target in labels}}
    for name, predictions in contenders.items():
        for metric in VALUE_METRICS:
            interval, note = _interval(metric, model.truth[known], predictions.predicted[known], settings, groups)
            result.rows.append(_row(metric, target, interval, settings, name, note))


def _masked_fields(result: Evaluation, fields: dict[str, float], settings: Settings) -> None:
    """Scores at masked positions, the constant guess beside them. They are sums over positions, so they carry no interval."""
    for name, value in fields.items():
        field_name, _, metric = name.partition("_")
        model = "model"
        if metric.startswith("constant_"):
            model, metric = "constant", metric.removeprefix("constant_")
        interval = Interval(value, None, None, 0, "none")
        result.rows.append(
            _row(metric, field_name, interval, settings, model, "over masked positions, without interval")
        )


def text_table(rows: list[dict[str, Any]]) -> str:
    """Accuracy and macro-F1 (mse and pcc for numbers) of model and controls, with intervals, for a terminal."""
    shown = {"accuracy": "accuracy", "f1": "macro-F1", "mse": "mse", "pcc": "pcc"}
    metrics = [name for name in shown if any(row["metric"] == name for row in rows)]
    lines = []
    for target in dict.fromkeys(row["target"] for row in rows):
        table = [["", *(shown[name] for name in metrics), "cells"]]
        for model in dict.fromkeys(row["model"] for row in rows if row["target"] == target):
            found = {row["metric"]: row for row in rows if row["target"] == target and row["model"] == model}
            cells = [_with_interval(found.get(name)) for name in metrics]
            if any(cells):
                n = next((row["n"] for row in found.values() if row["n"]), "")
                table.append([_LABELS.get(model, model), *cells, str(n)])
        widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
        lines.append(target)
        lines += [
            "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in table
        ]
    return "\n".join(lines)


_LABELS = {
    "model": "this model",
    "majority": "commonest class",
    "logistic_l2": "logistic regression (L2)",
    "logistic_l1": "logistic regression (L1)",
    "pca50_logistic": "PCA-50 + logistic",
    "constant": "constant guess",
    "train_mean": "mean of training",
}


def _with_interval(row: dict[str, Any] | None) -> str:
    if row is None or row["value"] is None:
        return ""
    if row["ci_low"] is None:
        return f"{row['value']:.3f}"
    return f"{row['value']:.3f} [{row['ci_low']:.3f}, {row['ci_high']:.3f}]"
