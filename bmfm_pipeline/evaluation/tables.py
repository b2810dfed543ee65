"""From stored predictions to the rows of metrics.json: model and controls side by side, per class, with verdicts in words."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bmfm_pipeline.errors import ConfigError
from bmfm_pipeline.evaluation.intervals import METHODS, RESAMPLING, Interval, interval_of
from bmfm_pipeline.evaluation.metrics import (
    ClassCounts,
    Metric,
    confusion,
    f1_by_class,
    precision_by_class,
    recall_by_class,
)
from bmfm_pipeline.evaluation.predictions import TOP, LabelPredictions, Predictions
from bmfm_pipeline.evaluation.verdicts import class_verdicts, value_verdicts

LABEL_METRICS = ("accuracy", "f1", "precision", "recall", "mcc")
SCORE_METRICS = ("auroc", "auprc")
VALUE_METRICS = ("mse", "mae", "pcc")
# How scores at masked positions may end; the rest of the name is the field.
FIELD_METRICS = ("zero_accuracy", "accuracy", "perplexity", "f1", "precision", "recall", "mcc", "mse", "mae", "pcc")
FALLBACK = "bootstrap_quantiles"
FEW_RUNS = 100

LABELS = {
    "model": "this model",
    "majority": "commonest class",
    "logistic_l2": "logistic regression (L2)",
    "logistic_l1": "logistic regression (L1)",
    "pca50_logistic": "PCA-50 + logistic",
    "constant": "constant guess",
    "train_mean": "mean of training",
}


@dataclass
class Settings:
    """How intervals are made.

    `bootstrap_runs` is task.num_bootstrap_runs: how many resamples the configured method takes. 0 leaves it to `resamples`, except for
    binomial and wilson, which then take none and are centred on the metric itself (with runs, on its mean over them). Verdicts and
    the method that stands in where the configured one does not fit take `resamples`. `rare_class_floor`: classes with fewer test
    cells are named and left out of a second macro average. `groups` (n,): cells of one group are resampled together. `allowed`
    {label column: bool (C, C)}: by row the classes that a class stands for, in an ontology.
    """

    method: str = "bootstrap_quantiles"
    resamples: int = 1000
    level: float = 0.95
    seed: int = 0
    rare_class_floor: int = 10
    split: str = "test"
    split_hash: str = ""
    groups: np.ndarray | None = None
    bootstrap_runs: int = 0
    allowed: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self):
        if self.method not in METHODS:
            raise ConfigError(f"task.ci_method: unknown interval method '{self.method}'; known: {', '.join(METHODS)}")


@dataclass
class Evaluation:
    """What an evaluation found: `rows` are metrics.json, the rest feeds the report."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    per_class: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    confusion: dict[str, dict[str, Any]] = field(default_factory=dict)
    verdicts: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    level: float = 0.95

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def evaluate_predictions(
    model: Predictions, controls: dict[str, dict[str, LabelPredictions]], settings: Settings
) -> Evaluation:
    """Metrics with intervals of the model and of every control, for every label column and masked field."""
    result = Evaluation(level=settings.level)
    for target, predictions in model.labels.items():
        known = predictions.known
        if not known.all():
            result.notes.append(
                f"{target}: {int((~known).sum())} of {len(known)} cells have no known label and are not scored"
            )
        if not known.any():
            result.notes.append(f"{target}: no cell of the {settings.split} split has a label; nothing to score")
            continue
        others = {name: labels[target] for name, labels in controls.items() if target in labels}
        groups = None if settings.groups is None else np.asarray(settings.groups)[known]
        if predictions.is_regression:
            _regression(result, target, predictions, others, settings, groups)
        else:
            _classification(result, target, predictions, others, settings, groups)
    if result.rows and settings.method in RESAMPLING and 0 < settings.bootstrap_runs < FEW_RUNS:
        result.notes.append(
            f"intervals come from {settings.bootstrap_runs} resamples (task.num_bootstrap_runs): their ends are rough; "
            "1000 cost a second or two"
        )
    _masked_fields(result, model.fields, settings)
    return result


def _interval(metric: Metric, settings: Settings, groups) -> tuple[Interval, int, str]:
    """The interval, how many resamples it took, and a note where the configured method does not fit."""
    runs, options = settings.bootstrap_runs, {"level": settings.level, "seed": settings.seed}
    if settings.method in RESAMPLING:
        resamples = runs or settings.resamples
        return (
            interval_of(metric, method=settings.method, resamples=resamples, groups=groups, **options),
            resamples,
            "",
        )
    if metric.is_proportion and groups is None:
        interval = interval_of(metric, method=settings.method, resamples=runs, centre_on_resamples=runs > 0, **options)
        return interval, runs, ""
    what = "groups of cells" if metric.is_proportion else "this metric"
    note = f"{settings.method} does not fit {what}: {FALLBACK} is used"
    resamples = max(runs, settings.resamples)
    return interval_of(metric, method=FALLBACK, resamples=resamples, groups=groups, **options), resamples, note


def _score(
    result: Evaluation,
    metric: Metric,
    target: str,
    model: str,
    settings: Settings,
    groups,
    shown_as: str | None = None,
    note: str = "",
) -> None:
    interval, resamples, why = _interval(metric, settings, groups)
    notes = "; ".join(text for text in (note, why) if text)
    result.rows.append(_row(shown_as or metric.name, target, interval, resamples, settings, model, notes))


def _row(
    metric: str, target: str, interval: Interval, resamples: int, settings: Settings, model: str, note: str
) -> dict[str, Any]:
    row = {
        "metric": metric,
        "target": target,
        "value": _plain(interval.value),
        "ci_low": _plain(interval.low),
        "ci_high": _plain(interval.high),
        "ci_method": interval.method,
        "n": interval.n,
        "resamples": resamples,
        "split": settings.split,
        "split_hash": settings.split_hash,
        "seed": settings.seed,
        "model": model,
    }
    return {**row, "note": note} if note else row


def _plain(value: float | None) -> float | None:
    return None if value is None or not np.isfinite(value) else float(value)


def _classification(
    result: Evaluation,
    target: str,
    model: LabelPredictions,
    others: dict[str, LabelPredictions],
    settings: Settings,
    groups,
) -> None:
    known, names = model.known, model.class_names
    truth = model.truth[known]
    contenders = {"model": model, **others}
    guesses = {name: predictions.predicted[known] for name, predictions in contenders.items()}
    for name, predictions in contenders.items():
        for metric in LABEL_METRICS:
            _score(result, Metric(metric, truth, guesses[name]), target, name, settings, groups)
        if (allowed := settings.allowed.get(target)) is not None:
            within = np.where(allowed[truth, guesses[name]], truth, guesses[name])
            prepared, note = Metric("accuracy", truth, within), "right where the label's term stands for the class"
            _score(result, prepared, target, name, settings, groups, shown_as="hierarchical_accuracy", note=note)
        if predictions.probabilities is not None:
            scores = predictions.probabilities[known]
            for metric in SCORE_METRICS:
                prepared = Metric(metric, truth, scores[:, 1] if len(names) == 2 else scores)
                _score(result, prepared, target, name, settings, groups)
    if model.probabilities is not None and len(names) == 2:
        result.notes.append(f"{target}: auroc and auprc are those of class {names[1]} against {names[0]}")
    if model.only_top:
        result.notes.append(
            f"{target}: auroc and auprc rank the {TOP} most probable classes of each cell, the others count as probability 0"
        )
    support = np.bincount(truth, minlength=len(names))
    common = np.flatnonzero(support >= settings.rare_class_floor)
    rare = [names[index] for index in np.flatnonzero((support > 0) & (support < settings.rare_class_floor))]
    absent = [names[index] for index in np.flatnonzero(support == 0)]
    if rare:
        listed = ", ".join(f"{name} ({support[names.index(name)]})" for name in rare)
        result.notes.append(
            f"{target}: classes with fewer than {settings.rare_class_floor} test cells, scored with wide error: {listed}"
        )
    if rare and len(common):
        note = f"macro-F1 averaged over the classes with at least {settings.rare_class_floor} test cells"
        for name, guess in guesses.items():
            prepared = Metric("f1", truth, guess, classes=common)
            _score(result, prepared, target, name, settings, groups, shown_as="f1_without_rare", note=note)
    if absent:
        result.notes.append(f"{target}: classes without a test cell, not scored: {', '.join(absent)}")
    matrix = confusion(truth, guesses["model"], len(names))
    result.confusion[target] = {"classes": names, "counts": matrix.tolist()}
    control = confusion(truth, guesses["logistic_l2"], len(names)) if "logistic_l2" in guesses else None
    result.per_class[target] = _by_class(names, support, rare, matrix, control)
    result.verdicts += class_verdicts(
        target,
        truth,
        guesses.pop("model"),
        guesses,
        **_comparing(settings, groups),
    )


def _comparing(settings: Settings, groups) -> dict[str, Any]:
    """How differences to the controls are resampled."""
    return {"resamples": settings.resamples, "level": settings.level, "seed": settings.seed, "groups": groups}


def _by_class(
    names: list[str], support: np.ndarray, rare: list[str], matrix: np.ndarray, control: np.ndarray | None
) -> list[dict[str, Any]]:
    """One entry per class; what is not defined (recall without test cells, precision when never predicted) is None."""
    counts = ClassCounts.of_matrix(matrix)
    there, predicted = support > 0, counts.predicted[0] > 0
    columns = {
        "precision": (precision_by_class(counts)[0], predicted),
        "recall": (recall_by_class(counts)[0], there),
        "f1": (f1_by_class(counts)[0], there),
    }
    if control is not None:
        columns["f1_logistic_l2"] = (f1_by_class(ClassCounts.of_matrix(control))[0], there)
    return [
        {
            "class": name,
            "support": int(support[index]),
            "predicted": int(counts.predicted[0][index]),
            **{
                column: float(values[index]) if defined[index] else None
                for column, (values, defined) in columns.items()
            },
            "rare": name in rare,
        }
        for index, name in enumerate(names)
    ]


def _regression(
    result: Evaluation,
    target: str,
    model: LabelPredictions,
    others: dict[str, LabelPredictions],
    settings: Settings,
    groups,
) -> None:
    known = model.known
    truth = model.truth[known]
    guesses = {name: predictions.predicted[known] for name, predictions in {"model": model, **others}.items()}
    for name, guess in guesses.items():
        for metric in VALUE_METRICS:
            _score(result, Metric(metric, truth, guess), target, name, settings, groups)
    result.verdicts += value_verdicts(
        target,
        truth,
        guesses.pop("model"),
        guesses,
        **_comparing(settings, groups),
    )


def _masked_fields(result: Evaluation, fields: dict[str, float], settings: Settings) -> None:
    """Scores at masked positions, the constant guess beside them. They are sums over positions, so they carry no interval."""
    for name, value in fields.items():
        metric = next((ending for ending in FIELD_METRICS if name.endswith(f"_{ending}")), name.rpartition("_")[2])
        target, model = name.removesuffix(f"_{metric}"), "model"
        if target.endswith("_constant"):
            target, model = target.removesuffix("_constant"), "constant"
        interval = Interval(value, None, None, None, "none")
        result.rows.append(
            _row(metric, target, interval, 0, settings, model, "over masked positions, without interval")
        )


def text_table(rows: list[dict[str, Any]]) -> str:
    """Accuracy and macro-F1 (mse and pcc for numbers) of model and controls, with intervals, for a terminal."""
    shown = {"accuracy": "accuracy", "f1": "macro-F1", "mse": "mse", "pcc": "pcc"}
    lines = []
    for target in dict.fromkeys(row["target"] for row in rows):
        own = [row for row in rows if row["target"] == target]
        there = list(dict.fromkeys(row["metric"] for row in own))
        metrics = [name for name in shown if name in there] or there[:2]
        table = [["", *(shown.get(name, name) for name in metrics), "cells"]]
        for model in dict.fromkeys(row["model"] for row in own):
            found = {row["metric"]: row for row in own if row["model"] == model}
            n = next((row["n"] for row in found.values() if row["n"]), "")
            table.append([LABELS.get(model, model), *(with_interval(found.get(name)) for name in metrics), str(n)])
        if not any(row[-1] for row in table[1:]):
            table = [row[:-1] for row in table]
        widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
        lines.append(target)
        lines += [
            "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in table
        ]
    return "\n".join(lines)


def with_interval(row: dict[str, Any] | None) -> str:
    """'0.812 [0.790, 0.834]', without the bounds where there are none; '-' where the metric is not defined."""
    if row is None:
        return ""
    if row["value"] is None:
        return "-"
    if row["ci_low"] is None or row["ci_high"] is None:
        return number(row["value"])
    return f"{number(row['value'])} [{number(row['ci_low'])}, {number(row['ci_high'])}]"


def number(value: float) -> str:
    """Three decimals, four digits for what they would not show."""
    return f"{value:.3f}" if value == 0 or 0.01 <= abs(value) < 1000 else f"{value:.4g}"
