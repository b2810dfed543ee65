"""What is said of each class: how many cells, how well they are found, how sure that is, and which classes are too rare to judge."""

from typing import Any

import numpy as np

from bmfm_pipeline.evaluation.metrics import (
    BY_CLASS,
    ClassCounts,
    Metric,
    Ranking,
    confusion,
    f1_by_class,
    precision_by_class,
    recall_by_class,
)
from bmfm_pipeline.evaluation.resampling import resampled
from bmfm_pipeline.evaluation.rows import Evaluation, Settings, add_score

# Macro averages that are also given without the rare classes, and how the rows say it.
WITHOUT_RARE = {"f1": "macro-F1", "precision": "macro precision", "recall": "macro recall"}


class ByClass:
    """F1, precision or recall of every class, (R, C), where a macro average has one value a resample; nan where it is not defined."""

    def __init__(self, name: str, y_true: np.ndarray, y_pred: np.ndarray):
        self.name, self._metric = name, Metric(name, y_true, y_pred)

    @property
    def n(self) -> int:
        return self._metric.n

    @property
    def labels(self) -> np.ndarray:
        """(C,) the classes, among the labels or the predictions."""
        return self._metric.labels

    def values(self, weights: np.ndarray) -> np.ndarray:
        counts = self._metric.counts(weights)
        return np.where(counts.present, BY_CLASS[self.name](counts), np.nan)

    def alike(self) -> tuple[np.ndarray, np.ndarray]:
        return self._metric.alike()

    def at(self, rows: np.ndarray) -> "ByClass":
        return ByClass(self.name, self._metric.y_true[rows], self._metric.y_pred[rows])


def add_without_rare(
    result: Evaluation,
    target: str,
    truth: np.ndarray,
    guesses: dict[str, np.ndarray],
    support: np.ndarray,
    settings: Settings,
    groups,
) -> None:
    """Rows `..._without_rare` of every contender, where some classes are rare and some are not."""
    floor = settings.rare_class_floor
    common = np.flatnonzero(support >= floor)
    if not ((support > 0) & (support < floor)).any() or not len(common):
        return
    kept = np.isin(truth, common)
    for name, guess in guesses.items():
        for metric, words in WITHOUT_RARE.items():
            note = f"{words} averaged over the classes with at least {floor} test cells"
            prepared = Metric(metric, truth, guess, classes=common)
            add_score(result, prepared, target, name, settings, groups, shown_as=f"{metric}_without_rare", note=note)
        note = f"over the cells of classes with at least {floor} test cells"
        prepared, own = Metric("mcc", truth[kept], guess[kept]), None if groups is None else groups[kept]
        add_score(result, prepared, target, name, settings, own, shown_as="mcc_without_rare", note=note)


def per_class_table(
    names: list[str],
    truth: np.ndarray,
    guesses: dict[str, np.ndarray],
    probabilities: np.ndarray | None,
    settings: Settings,
    groups,
) -> list[dict[str, Any]]:
    """One entry per class; what is not defined (recall without test cells, precision when never predicted) is None.

    `f1_low` and `f1_high` bound the model's F1 by quantiles of resamples that have the class; auroc and auprc are of the class against
    all others.
    """
    support = np.bincount(truth, minlength=len(names))
    rare = (support > 0) & (support < settings.rare_class_floor)
    counts = ClassCounts.of_matrix(confusion(truth, guesses["model"], len(names)))
    there, predicted = support > 0, counts.predicted[0] > 0
    low, high = _bounds(truth, guesses["model"], len(names), settings, groups)
    columns = {
        "precision": (precision_by_class(counts)[0], predicted),
        "recall": (recall_by_class(counts)[0], there),
        "f1": (f1_by_class(counts)[0], there),
        "f1_low": (low, there),
        "f1_high": (high, there),
    }
    if probabilities is not None:
        columns |= _areas(truth, probabilities, there)
    if "logistic_l2" in guesses:
        control = ClassCounts.of_matrix(confusion(truth, guesses["logistic_l2"], len(names)))
        columns["f1_logistic_l2"] = (f1_by_class(control)[0], there)
    return [
        {
            "class": name,
            "support": int(support[index]),
            "predicted": int(counts.predicted[0][index]),
            **{
                column: float(values[index]) if defined[index] and np.isfinite(values[index]) else None
                for column, (values, defined) in columns.items()
            },
            "rare": bool(rare[index]),
        }
        for index, name in enumerate(names)
    ]


def _bounds(truth, guess, n_classes: int, settings: Settings, groups) -> tuple[np.ndarray, np.ndarray]:
    low, high = np.full(n_classes, np.nan), np.full(n_classes, np.nan)
    if groups is not None and len(np.unique(np.asarray(groups).astype(str))) == 1:
        return low, high
    scores = ByClass("f1", truth, guess)
    values = resampled(scores, settings.resamples, settings.seed, groups)
    tail = (1 - settings.level) / 2
    for place, label in enumerate(scores.labels):
        own = values[np.isfinite(values[:, place]), place]
        if len(own):
            low[label], high[label] = np.quantile(own, [tail, 1 - tail])
    return low, high


def _areas(truth: np.ndarray, probabilities: np.ndarray, there: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    found = {name: np.full(len(there), np.nan) for name in ("auroc", "auprc")}
    once = np.ones((1, len(truth)))
    for label in np.flatnonzero(there):
        ranking = Ranking(truth == label, probabilities[:, label])
        found["auroc"][label] = ranking.auroc(once)[0]
        found["auprc"][label] = ranking.average_precision(once)[0]
    return {name: (values, there) for name, values in found.items()}
