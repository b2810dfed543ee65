"""One row of metrics.json: a metric with its interval, made as the settings say; and what an evaluation gathers."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bmfm_pipeline.errors import ConfigError
from bmfm_pipeline.evaluation.intervals import METHODS, RESAMPLING, Interval, interval_from_values, interval_of
from bmfm_pipeline.evaluation.metrics import VALUE_METRICS, Metric

FALLBACK = "bootstrap_quantiles"


@dataclass
class Settings:
    """How intervals are made.

    `bootstrap_runs` is task.num_bootstrap_runs: how many resamples the configured method takes. 0 leaves it to `resamples`, except for
    binomial and wilson, which then take none and are centred on the metric itself (with runs, on its mean over them). Verdicts and
    the method that stands in where the configured one does not fit take `resamples`. `rare_class_floor`: classes with fewer test
    cells are named and left out of a second macro average. `groups` (n,): cells of one group are resampled together. `stratified`:
    every resample has as many cells of each class as the test; groups, which span classes, come before it. `allowed` {label
    column: bool (C, C)}: by row the classes that a class stands for, in an ontology.
    """

    method: str = "bootstrap_quantiles"
    resamples: int = 1000
    level: float = 0.95
    seed: int = 0
    rare_class_floor: int = 10
    split: str = "test"
    split_hash: str = ""
    groups: np.ndarray | None = None
    stratified: bool = False
    bootstrap_runs: int = 0
    allowed: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self):
        if self.method not in METHODS:
            raise ConfigError(f"task.ci_method: unknown interval method '{self.method}'; known: {', '.join(METHODS)}")


@dataclass
class Evaluation:
    """What an evaluation found: `rows` are metrics.json, the rest feeds the report. `gene_errors` {field: which genes are predicted
    well and badly at masked positions}."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    per_class: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    confusion: dict[str, dict[str, Any]] = field(default_factory=dict)
    verdicts: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    level: float = 0.95
    gene_errors: dict[str, dict[str, Any]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def row_interval(metric: Metric, settings: Settings, groups) -> tuple[Interval, int, str]:
    """The interval, how many resamples it took, and a note where the configured method does not fit."""
    runs, options = settings.bootstrap_runs, {"level": settings.level, "seed": settings.seed}
    drawn = {"groups": groups, "strata": _strata(metric, settings, groups), **options}
    if settings.method in RESAMPLING:
        resamples = runs or settings.resamples
        interval = interval_of(metric, method=settings.method, resamples=resamples, **drawn)
        return interval, resamples, _caution(interval, metric, resamples, settings, groups)
    if metric.is_proportion and groups is None and drawn["strata"] is None:
        interval = interval_of(metric, method=settings.method, resamples=runs, centre_on_resamples=runs > 0, **options)
        return interval, runs, _caution(interval, metric, runs, settings, groups)
    what = "this metric" if not metric.is_proportion else "groups of cells" if groups is not None else "fixed classes"
    note = f"{settings.method} does not fit {what}: {FALLBACK} is used"
    resamples = max(runs, settings.resamples)
    interval = interval_of(metric, method=FALLBACK, resamples=resamples, **drawn)
    caution = _caution(interval, metric, resamples, settings, groups)
    return interval, resamples, "; ".join(text for text in (note, caution) if text)


def _strata(metric: Metric, settings: Settings, groups) -> np.ndarray | None:
    """The classes to resample within, for a metric of classes or of their scores."""
    in_classes = settings.stratified and groups is None and metric.name not in VALUE_METRICS
    return metric.y_true if in_classes else None


def _caution(interval: Interval, metric: Metric, resamples: int, settings: Settings, groups) -> str:
    """What to know of bounds that say less than they seem to."""
    if interval.left_out:
        return f"not defined in {interval.left_out} of {resamples} resamples, which are left out"
    # Resamples of cells that are all right are all right: no width, however few they are.
    if metric.is_proportion and groups is None and interval.method != "wilson" and interval.low == interval.high:
        low, high = interval_from_values([interval.value], method="wilson", level=settings.level, n=metric.n)
        return (
            f"all {metric.n} cells alike, which leaves {interval.method} no width; wilson gives {low:.3f} to {high:.3f}"
        )
    return ""


def add_score(
    result: Evaluation,
    metric: Metric,
    target: str,
    model: str,
    settings: Settings,
    groups,
    shown_as: str | None = None,
    note: str = "",
) -> None:
    interval, resamples, why = row_interval(metric, settings, groups)
    notes = "; ".join(text for text in (note, why) if text)
    result.rows.append(metric_row(shown_as or metric.name, target, interval, resamples, settings, model, notes))


def metric_row(
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
