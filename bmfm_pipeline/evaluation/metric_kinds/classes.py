"""Metrics of predicted classes, from three sums per class: a resample costs one sparse product, whatever the number of classes."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ClassCounts:
    """Weighted counts per class, each (R, C): cells predicted right, cells of the class, cells predicted as the class."""

    hits: np.ndarray
    true: np.ndarray
    predicted: np.ndarray

    @classmethod
    def of_matrix(cls, matrix: np.ndarray) -> "ClassCounts":
        """From one confusion matrix (C, C), rows true."""
        return cls(np.diagonal(matrix)[None], matrix.sum(axis=1)[None], matrix.sum(axis=0)[None])

    @property
    def present(self) -> np.ndarray:
        """(R, C) whether a class is among the labels or the predictions: macro averages run over these, as in scikit-learn."""
        return (self.true + self.predicted) > 0


def confusion(y_true: np.ndarray, y_pred: np.ndarray, n_classes: int) -> np.ndarray:
    """(C, C) counts, rows true, columns predicted; y_* are class ids 0..C-1."""
    pairs = np.asarray(y_true, dtype=np.int64) * n_classes + np.asarray(y_pred, dtype=np.int64)
    return np.bincount(pairs, minlength=n_classes * n_classes).reshape(n_classes, n_classes)


def divided(top: np.ndarray, bottom: np.ndarray, empty: float = 0.0) -> np.ndarray:
    """top / bottom, and `empty` where bottom is 0."""
    return np.divide(top, bottom, out=np.full(np.broadcast(top, bottom).shape, empty), where=bottom != 0)


def accuracy_of(counts: ClassCounts) -> np.ndarray:
    return divided(counts.hits.sum(axis=1), counts.true.sum(axis=1))


def balanced_accuracy_of(counts: ClassCounts) -> np.ndarray:
    """Mean recall over the classes that have cells. Macro recall also counts, as 0, classes that are only predicted."""
    there = counts.true > 0
    return divided((recall_by_class(counts) * there).sum(axis=1), there.sum(axis=1), np.nan)


def weighted_f1_of(counts: ClassCounts) -> np.ndarray:
    """Mean F1 over classes, each counting by its cells."""
    return divided((f1_by_class(counts) * counts.true).sum(axis=1), counts.true.sum(axis=1))


def mcc_of(counts: ClassCounts) -> np.ndarray:
    """Matthews correlation for any number of classes (Gorodkin 2004); 0 where it is not defined."""
    total = counts.true.sum(axis=1)
    top = counts.hits.sum(axis=1) * total - (counts.true * counts.predicted).sum(axis=1)
    spread = (total**2 - (counts.predicted**2).sum(axis=1)) * (total**2 - (counts.true**2).sum(axis=1))
    return divided(top, np.sqrt(spread))


def recall_by_class(counts: ClassCounts) -> np.ndarray:
    return divided(counts.hits, counts.true)


def precision_by_class(counts: ClassCounts) -> np.ndarray:
    return divided(counts.hits, counts.predicted)


def f1_by_class(counts: ClassCounts) -> np.ndarray:
    return divided(2 * counts.hits, counts.true + counts.predicted)


def macro(name: str, counts: ClassCounts, chosen: np.ndarray | None = None) -> np.ndarray:
    """(R,) mean of a metric of BY_CLASS over the classes present, of those `chosen` (C,) where given."""
    present = counts.present if chosen is None else counts.present & chosen
    return divided((BY_CLASS[name](counts) * present).sum(axis=1), present.sum(axis=1))


BY_CLASS = {"f1": f1_by_class, "precision": precision_by_class, "recall": recall_by_class}
OVER_ALL = {
    "accuracy": accuracy_of,
    "mcc": mcc_of,
    "balanced_accuracy": balanced_accuracy_of,
    "f1_weighted": weighted_f1_of,
}
CLASS_METRICS = (*OVER_ALL, *BY_CLASS)
