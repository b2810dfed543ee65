"""Metrics over weighted observations, vectorised over resamples: weights (R, n) in, values (R,) out.

Macro averages run over the classes that occur among the labels or the predictions, as in scikit-learn.
"""

from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np

from bmfm_pipeline.errors import ConfigError
from bmfm_pipeline.evaluation.metric_kinds.arrays import (
    codes_of_both,
    numbers,
    one_column,
    plain_array,
    refuse_no_probabilities,
    refuse_unknown,
    score_codes,
)
from bmfm_pipeline.evaluation.metric_kinds.classes import (
    BY_CLASS,
    CLASS_METRICS,
    OVER_ALL,
    ClassCounts,
    confusion,
    divided,
    f1_by_class,
    macro,
    precision_by_class,
    recall_by_class,
)
from bmfm_pipeline.evaluation.metric_kinds.numbers import VALUE_METRICS
from bmfm_pipeline.evaluation.metric_kinds.scores import (
    AREAS,
    SCORE_METRICS,
    TOP_METRICS,
    Ranking,
    log_losses,
    mean_over_classes,
    within_top,
)

__all__ = [
    "ALL_METRICS",
    "BY_CLASS",
    "CLASS_METRICS",
    "OVER_ALL",
    "SCORE_METRICS",
    "VALUE_METRICS",
    "ClassCounts",
    "Metric",
    "Ranking",
    "confusion",
    "f1_by_class",
    "precision_by_class",
    "recall_by_class",
]
Weights = np.ndarray
ALL_METRICS = (*CLASS_METRICS, *SCORE_METRICS, *VALUE_METRICS)
PROPORTIONS = ("accuracy", *TOP_METRICS, "zero_accuracy")


class Metric:
    """A metric of given observations that can be evaluated under many weightings.

    Parameters
    ----------
    name : one of ALL_METRICS, or a function (y_true, y_pred) -> float, which is called once per resample.
    y_true, y_pred : class labels (n,) for CLASS_METRICS; for SCORE_METRICS y_pred are scores, (n,) of the greater of two labels or
        (n, C) with y_true class ids 0..C-1 (or C different labels, in sorted order), which are probabilities for log_loss and
        perplexity; numbers (n,) for VALUE_METRICS.
    classes : f1, precision and recall are averaged over these labels only.

    Raises ConfigError for other shapes and for observations whose label is unknown.
    """

    def __init__(self, name: str | Callable, y_true, y_pred, classes: Sequence | None = None):
        self.name = name if isinstance(name, str) else getattr(name, "__name__", "metric")
        self.function = None if isinstance(name, str) else name
        self.y_true, self.y_pred = plain_array(y_true), plain_array(y_pred)
        if len(self.y_true) != len(self.y_pred):
            raise ConfigError(f"y_true has {len(self.y_true)} observations, y_pred has {len(self.y_pred)}")
        if not len(self.y_true):
            raise ConfigError("there is no observation to compute a metric from")
        self._classes = classes
        if self.function is not None:
            return
        if name not in ALL_METRICS:
            raise ConfigError(f"unknown metric '{name}'; known: {', '.join(ALL_METRICS)}")
        self.y_true = one_column("y_true", self.y_true)
        refuse_unknown("y_true", self.y_true, ignored=name not in VALUE_METRICS)
        if name in SCORE_METRICS:
            scores = numbers(f"{name}: y_pred", self.y_pred)
            self.y_pred = scores if scores.ndim == 2 and scores.shape[1] > 1 else one_column("y_pred", scores)
            self._codes = score_codes(name, self.y_true, self.y_pred)
            self._check_scores()
            return
        self.y_pred = one_column("y_pred", self.y_pred)
        if name in VALUE_METRICS:
            self.y_true, self.y_pred = (
                numbers(f"{name}: {side}", values)
                for side, values in (("y_true", self.y_true), ("y_pred", self.y_pred))
            )
            return
        refuse_unknown("y_pred", self.y_pred, ignored=False)
        self._names, codes = codes_of_both(self.y_true, self.y_pred)
        self._true, self._pred = codes[: self.n], codes[self.n :]

    def _check_scores(self) -> None:
        if self.name in ("log_loss", "perplexity"):
            refuse_no_probabilities(self.name, self.y_pred)
        width = 2 if self.y_pred.ndim == 1 else self.y_pred.shape[1]
        if self.name in TOP_METRICS and (self.y_pred.ndim == 1 or width <= TOP_METRICS[self.name]):
            raise ConfigError(
                f"{self.name} needs scores of more than {TOP_METRICS[self.name]} classes, y_pred has those of {width}"
            )

    @property
    def n(self) -> int:
        return len(self.y_true)

    @property
    def labels(self) -> np.ndarray:
        """(C,) the distinct labels of a class metric, sorted."""
        return self._names

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
            return OVER_ALL[self.name](self.counts(weights))
        if self.name in BY_CLASS:
            return self._macro(self.counts(weights))
        if self.name in SCORE_METRICS:
            return self._of_scores(weights)
        return VALUE_METRICS[self.name](self.y_true, self.y_pred, weights)

    def value(self) -> float:
        return float(self.values(np.ones((1, self.n)))[0])

    def at(self, rows: np.ndarray) -> "Metric":
        """The same metric of these observations alone."""
        return Metric(self.function or self.name, self.y_true[rows], self.y_pred[rows], self._classes)

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

    def counts(self, weights: Weights) -> ClassCounts:
        """Of a class metric, the sums per class (R, C) that it is made of; the classes are `labels`."""
        return ClassCounts(*np.split((self._indicator @ weights.T).T, 3, axis=1))

    def _macro(self, counts: ClassCounts) -> np.ndarray:
        if self._classes is None:
            return macro(self.name, counts)
        return macro(self.name, counts, np.isin(self._names, np.asarray(self._classes).astype(self._names.dtype)))

    @cached_property
    def _rankings(self) -> list[Ranking]:
        """One per class that has cells of its own and of others; the areas of the rest are not defined."""
        columns = self.y_pred[:, None] if self.y_pred.ndim == 1 else self.y_pred
        labels = [1] if self.y_pred.ndim == 1 else range(columns.shape[1])
        wanted = [(self._codes == label, column) for label, column in zip(labels, columns.T, strict=True)]
        return [Ranking(positive, scores) for positive, scores in wanted if positive.any()]

    @cached_property
    def _of_each(self) -> np.ndarray:
        """(n,) what each observation adds to a metric that is a mean over them."""
        if self.name in TOP_METRICS:
            return within_top(self._codes, self.y_pred, TOP_METRICS[self.name])
        return log_losses(self._codes, self.y_pred)

    def _of_scores(self, weights: Weights) -> np.ndarray:
        """nan where a score is nan."""
        if np.isnan(self.y_pred).any():
            return np.full(len(weights), np.nan)
        if self.name in AREAS:
            return mean_over_classes(AREAS[self.name], self._rankings, weights)
        mean = divided(weights @ self._of_each, weights.sum(axis=1), np.nan)
        return np.exp(mean) if self.name == "perplexity" else mean
