"""Metrics over weighted observations, vectorised over resamples: weights (R, n) in, values (R,) out.

Class metrics need three sums per class (hits, true, predicted), so a resample costs one sparse product, whatever the number of
classes. Macro averages run over the classes that occur among the labels or the predictions, as in scikit-learn.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from bmfm_pipeline.config.losses import IGNORED_LABEL
from bmfm_pipeline.errors import ConfigError

Weights = np.ndarray


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


def confusion(y_true: np.ndarray, y_pred: np.ndarray, n_classes: int) -> np.ndarray:
    """(C, C) counts, rows true, columns predicted; y_* are class ids 0..C-1."""
    pairs = np.asarray(y_true, dtype=np.int64) * n_classes + np.asarray(y_pred, dtype=np.int64)
    return np.bincount(pairs, minlength=n_classes * n_classes).reshape(n_classes, n_classes)


def _divide(top: np.ndarray, bottom: np.ndarray, empty: float = 0.0) -> np.ndarray:
    return np.divide(top, bottom, out=np.full(np.broadcast(top, bottom).shape, empty), where=bottom != 0)


def accuracy_of(counts: ClassCounts) -> np.ndarray:
    return _divide(counts.hits.sum(axis=1), counts.true.sum(axis=1))


def recall_by_class(counts: ClassCounts) -> np.ndarray:
    return _divide(counts.hits, counts.true)


def precision_by_class(counts: ClassCounts) -> np.ndarray:
    return _divide(counts.hits, counts.predicted)


def f1_by_class(counts: ClassCounts) -> np.ndarray:
    return _divide(2 * counts.hits, counts.true + counts.predicted)


def mcc_of(counts: ClassCounts) -> np.ndarray:
    """Matthews correlation for any number of classes (Gorodkin 2004); 0 where it is not defined."""
    total = counts.true.sum(axis=1)
    top = counts.hits.sum(axis=1) * total - (counts.true * counts.predicted).sum(axis=1)
    spread = (total**2 - (counts.predicted**2).sum(axis=1)) * (total**2 - (counts.true**2).sum(axis=1))
    return _divide(top, np.sqrt(spread))


BY_CLASS = {"f1": f1_by_class, "precision": precision_by_class, "recall": recall_by_class}
OVER_ALL = {"accuracy": accuracy_of, "mcc": mcc_of}
CLASS_METRICS = (*OVER_ALL, *BY_CLASS)


class Ranking:
    """Cells by falling score, for the areas under the curves of one class; cells of equal score count as one step."""

    def __init__(self, positive: np.ndarray, scores: np.ndarray):
        self.order = np.argsort(-scores, kind="stable")
        ranked = scores[self.order]
        starts = np.flatnonzero(np.append(True, ranked[1:] != ranked[:-1]))
        run = np.cumsum(np.append(True, ranked[1:] != ranked[:-1])) - 1
        at = np.flatnonzero(positive[self.order])
        self.positives = self.order[at]
        # How many cells lie above a positive, and how many up to the end of its run of equal scores.
        self.above = starts[run[at]]
        self.upto = np.append(starts[1:], len(scores))[run[at]]
        self.last_of_run = np.searchsorted(run[at], run[at], side="right") - 1

    def _sums(self, weights: Weights) -> tuple[np.ndarray, np.ndarray]:
        """(R, n + 1) weight of the first k cells, and (R, P) weights of the positives."""
        sums = np.zeros((len(weights), weights.shape[1] + 1))
        np.cumsum(np.take(weights, self.order, axis=1), axis=1, out=sums[:, 1:])
        return sums, np.take(weights, self.positives, axis=1)

    def auroc(self, weights: Weights) -> np.ndarray:
        """By rank sums (Mann and Whitney 1947), ties counting half."""
        sums, hits = self._sums(weights)
        positives, total = hits.sum(axis=1), sums[:, -1]
        ranks = total[:, None] - (np.take(sums, self.above, axis=1) + np.take(sums, self.upto, axis=1)) / 2
        return _divide((hits * ranks).sum(axis=1) - positives**2 / 2, positives * (total - positives), np.nan)

    def average_precision(self, weights: Weights) -> np.ndarray:
        """Sum over steps of the recall gained times the precision there, as in scikit-learn."""
        sums, hits = self._sums(weights)
        found = np.take(np.cumsum(hits, axis=1), self.last_of_run, axis=1)
        gained = hits * _divide(found, np.take(sums, self.upto, axis=1))
        return _divide(gained.sum(axis=1), hits.sum(axis=1), np.nan)


SCORE_METRICS = {"auroc": Ranking.auroc, "auprc": Ranking.average_precision}


def mse(y_true: np.ndarray, y_pred: np.ndarray, weights: Weights) -> np.ndarray:
    return _divide(weights @ (y_true - y_pred) ** 2, weights.sum(axis=1))


def mae(y_true: np.ndarray, y_pred: np.ndarray, weights: Weights) -> np.ndarray:
    return _divide(weights @ np.abs(y_true - y_pred), weights.sum(axis=1))


def pcc(y_true: np.ndarray, y_pred: np.ndarray, weights: Weights) -> np.ndarray:
    """Pearson correlation; nan where a side is constant up to rounding."""
    shares = weights / np.maximum(weights.sum(axis=1, keepdims=True), 1)
    x, y = (values - (shares @ values)[:, None] for values in (y_true, y_pred))
    spreads = []
    for values, centred in ((y_true, x), (y_pred, y)):
        spread = np.einsum("rn,rn,rn->r", shares, centred, centred)
        rounding = (4 * np.finfo(np.float64).eps * np.abs(values).max()) ** 2
        spreads.append(np.where(spread > rounding, spread, 0.0))
    covariance = np.einsum("rn,rn,rn->r", shares, x, y)
    return np.clip(_divide(covariance, np.sqrt(spreads[0]) * np.sqrt(spreads[1]), np.nan), -1, 1)


VALUE_METRICS = {"mse": mse, "mae": mae, "pcc": pcc}
ALL_METRICS = (*CLASS_METRICS, *SCORE_METRICS, *VALUE_METRICS)
PROPORTIONS = ("accuracy",)


class Metric:
    """A metric of given observations that can be evaluated under many weightings.

    Parameters
    ----------
    name : one of ALL_METRICS, or a function (y_true, y_pred) -> float, which is called once per resample.
    y_true, y_pred : class labels (n,) for accuracy, f1, precision, recall, mcc; for auroc and auprc y_pred are scores, (n,) of the
        greater of two labels or (n, C) with y_true class ids 0..C-1 (or C different labels, in sorted order); numbers (n,) for mse,
        mae, pcc.
    classes : f1, precision and recall are averaged over these labels only.

    Raises ConfigError for other shapes and for observations whose label is unknown.
    """

    def __init__(self, name: str | Callable, y_true, y_pred, classes: Sequence | None = None):
        self.name = name if isinstance(name, str) else getattr(name, "__name__", "metric")
        self.function = None if isinstance(name, str) else name
        self.y_true, self.y_pred = _plain_array(y_true), _plain_array(y_pred)
        if len(self.y_true) != len(self.y_pred):
            raise ConfigError(f"y_true has {len(self.y_true)} observations, y_pred has {len(self.y_pred)}")
        if not len(self.y_true):
            raise ConfigError("there is no observation to compute a metric from")
        self._classes = classes
        if self.function is not None:
            return
        if name not in ALL_METRICS:
            raise ConfigError(f"unknown metric '{name}'; known: {', '.join(ALL_METRICS)}")
        self.y_true = _one_column("y_true", self.y_true)
        _refuse_unknown("y_true", self.y_true, ignored=name not in VALUE_METRICS)
        if name in SCORE_METRICS:
            scores = _numbers(f"{name}: y_pred", self.y_pred)
            self.y_pred = scores if scores.ndim == 2 and scores.shape[1] > 1 else _one_column("y_pred", scores)
            self._codes = _score_codes(name, self.y_true, self.y_pred)
            return
        self.y_pred = _one_column("y_pred", self.y_pred)
        if name in VALUE_METRICS:
            self.y_true, self.y_pred = (
                _numbers(f"{name}: {side}", values)
                for side, values in (("y_true", self.y_true), ("y_pred", self.y_pred))
            )
            return
        _refuse_unknown("y_pred", self.y_pred, ignored=False)
        self._names, codes = _codes(self.y_true, self.y_pred)
        self._true, self._pred = codes[: self.n], codes[self.n :]

    @property
    def n(self) -> int:
        return len(self.y_true)

    @property
    def is_proportion(self) -> bool:
        """Whether it is the share of independent observations for which something holds."""
        return self.function is None and self.name in PROPORTIONS

    def values(self, weights: Weights) -> np.ndarray:
        """(R,) values under whole-number weights (R, n)."""
        if self.function is not None:
            index = np.arange(self.n)
            chosen = (np.repeat(index, row.astype(int)) for row in weights)
            return np.array([float(self.function(self.y_true[rows], self.y_pred[rows])) for rows in chosen])
        if self.name in OVER_ALL:
            return OVER_ALL[self.name](self._counts(weights))
        if self.name in BY_CLASS:
            return self._macro(self._counts(weights))
        if self.name in SCORE_METRICS:
            return self._mean_over_classes(weights)
        return VALUE_METRICS[self.name](self.y_true, self.y_pred, weights)

    def value(self) -> float:
        return float(self.values(np.ones((1, self.n)))[0])

    def alike(self) -> tuple[np.ndarray, np.ndarray]:
        """One representative of each set of observations that act alike, and which set each observation is in."""
        if self.function is None and self.name in CLASS_METRICS:
            _, first, sets = np.unique(
                self._true * len(self._names) + self._pred, return_index=True, return_inverse=True
            )
            return first, sets
        return np.arange(self.n), np.arange(self.n)

    @cached_property
    def _indicator(self):
        """(3C, n) sparse: in which sums each observation takes part."""
        from scipy import sparse

        size, index = len(self._names), np.arange(self.n)
        right = np.flatnonzero(self._true == self._pred)
        rows = np.concatenate([self._true[right], size + self._true, 2 * size + self._pred])
        columns = np.concatenate([right, index, index])
        return sparse.csr_matrix((np.ones(len(rows)), (rows, columns)), shape=(3 * size, self.n))

    def _counts(self, weights: Weights) -> ClassCounts:
        return ClassCounts(*np.split((self._indicator @ weights.T).T, 3, axis=1))

    def _macro(self, counts: ClassCounts) -> np.ndarray:
        present = (counts.true + counts.predicted) > 0
        if self._classes is not None:
            present = present & np.isin(self._names, np.asarray(self._classes).astype(self._names.dtype))
        return _divide((BY_CLASS[self.name](counts) * present).sum(axis=1), present.sum(axis=1))

    @cached_property
    def _rankings(self) -> list[Ranking]:
        """One per class that has cells of its own and of others; the areas of the rest are not defined."""
        columns = self.y_pred[:, None] if self.y_pred.ndim == 1 else self.y_pred
        labels = [1] if self.y_pred.ndim == 1 else range(columns.shape[1])
        wanted = [(self._codes == label, column) for label, column in zip(labels, columns.T, strict=True)]
        return [Ranking(positive, scores) for positive, scores in wanted if positive.any()]

    def _mean_over_classes(self, weights: Weights) -> np.ndarray:
        """Mean over the classes for which the metric is defined; nan if there are none, or a score is nan."""
        if np.isnan(self.y_pred).any() or not self._rankings:
            return np.full(len(weights), np.nan)
        values = np.stack([SCORE_METRICS[self.name](ranking, weights) for ranking in self._rankings])
        known = np.isfinite(values)
        return _divide(np.where(known, values, 0).sum(axis=0), known.sum(axis=0), np.nan)


def _plain_array(values) -> np.ndarray:
    found = np.asarray(values)
    # Columns of a table come as objects: read what they hold, so that 1 and 1.0 are one class.
    return np.asarray(found.tolist()) if found.dtype == object and found.ndim == 1 else found


def _one_column(name: str, values: np.ndarray) -> np.ndarray:
    if values.ndim == 2 and values.shape[1] == 1:
        return values[:, 0]
    if values.ndim != 1:
        raise ConfigError(f"{name} has shape {values.shape}; one value per observation is expected, shape (n,)")
    return values


def _numbers(name: str, values: np.ndarray) -> np.ndarray:
    try:
        return values.astype(np.float64)
    except (TypeError, ValueError):
        raise ConfigError(f"{name} holds {values.dtype} values; numbers are expected") from None


def _refuse_unknown(name: str, values: np.ndarray, *, ignored: bool) -> None:
    if values.dtype == object:
        unknown = np.array([value is None or value != value for value in values])
    elif values.dtype.kind == "f":
        unknown = np.isnan(values)
    else:
        unknown = np.zeros(len(values), dtype=bool)
    if ignored and values.dtype.kind in "if":
        unknown |= values == IGNORED_LABEL
    if unknown.any():
        raise ConfigError(
            f"{name}: {int(unknown.sum())} of {len(values)} observations have no known label (None, nan or {IGNORED_LABEL}), "
            f"the first in row {int(np.flatnonzero(unknown)[0])}; leave those out first"
        )


def _codes(y_true: np.ndarray, y_pred: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct labels of both, sorted, and the codes of y_true followed by those of y_pred."""
    if y_true.dtype.kind in "biuf" and y_pred.dtype.kind in "biuf":
        both = np.concatenate([y_true, y_pred])
    else:
        both = np.concatenate([y_true.astype(str), y_pred.astype(str)])
    return np.unique(both, return_inverse=True)


def _score_codes(name: str, y_true: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Class ids of the scores' columns; for one column of scores, 1 where the label is the greater of two."""
    labels, codes = np.unique(y_true, return_inverse=True)
    numeric = y_true.dtype.kind in "biuf"
    if scores.ndim == 1:
        if len(labels) > 2:
            raise ConfigError(
                f"{name}: one score per observation fits two labels, y_true holds {len(labels)}; pass scores of shape (n, C)"
            )
        return (y_true == 1).astype(int) if numeric and set(labels.tolist()) <= {0, 1} else codes
    width = scores.shape[1]
    if numeric and np.all(labels == labels.astype(int)) and labels[0] >= 0 and labels[-1] < width:
        return y_true.astype(int)
    if len(labels) == width:
        return codes
    raise ConfigError(
        f"{name}: y_pred has {width} columns, so y_true must hold class ids 0 to {width - 1}; found {', '.join(map(str, labels[:5]))}"
    )
