"""Metrics that are functions of sums over cells: what a cell adds is counted once, however many observations it has."""

from collections.abc import Callable

import numpy as np

from bmfm_pipeline.evaluation.metric_kinds.classes import divided

# (R, S) sums -> (R,) values.
OfSums = Callable[[np.ndarray], np.ndarray]


class Sums:
    """(R, S) sums over resamples, to evaluate several metrics on the same ones. `rows` (n, S): what each cell adds."""

    def __init__(self, rows: np.ndarray):
        self.rows = np.asarray(rows, dtype=np.float64)

    @property
    def n(self) -> int:
        return len(self.rows)

    def values(self, weights: np.ndarray) -> np.ndarray:
        """(R, S) sums under weights (R, n)."""
        return weights @ self.rows

    def at(self, rows: np.ndarray) -> "Sums":
        return Sums(self.rows[rows])

    def alike(self) -> tuple[np.ndarray, np.ndarray]:
        """All cells differ."""
        return np.arange(self.n), np.arange(self.n)


class SumsMetric:
    """A metric of n cells from sums of what each adds; it offers what `evaluation.metrics.Metric` does.

    Parameters
    ----------
    name : as rows show it.
    rows : (n, S) numbers that each cell adds.
    function : (R, S) sums -> (R,) values.
    is_proportion : whether it is the share of the cells for which something holds.
    """

    def __init__(self, name: str, rows: np.ndarray, function: OfSums, is_proportion: bool = False):
        self.name, self.function, self.is_proportion = name, function, is_proportion
        self.sums = Sums(rows)

    @property
    def n(self) -> int:
        return self.sums.n

    def values(self, weights: np.ndarray) -> np.ndarray:
        """(R,) values under weights (R, n)."""
        return self.function(self.sums.values(weights))

    def value(self) -> float:
        return float(self.function(self.sums.rows.sum(axis=0, keepdims=True))[0])

    def at(self, rows: np.ndarray) -> "SumsMetric":
        return SumsMetric(self.name, self.sums.rows[rows], self.function, self.is_proportion)

    def alike(self) -> tuple[np.ndarray, np.ndarray]:
        return self.sums.alike()

    def without_each(self, codes: np.ndarray) -> np.ndarray:
        """Values without each group of `codes` (n,), whole numbers from 0: a subtraction each."""
        grouped = np.zeros((int(codes.max()) + 1, self.sums.rows.shape[1]))
        np.add.at(grouped, codes, self.sums.rows)
        return self.function(self.sums.rows.sum(axis=0) - grouped)


def mean_of(name: str, values: np.ndarray, counts: np.ndarray | None = None, is_proportion: bool = False) -> SumsMetric:
    """sum of values (n,) over sum of counts (n,), 1 each where not given; values that are nan leave their cell out."""
    known = np.isfinite(values)
    counts = known.astype(np.float64) if counts is None else np.where(known, counts, 0.0)
    rows = np.stack([np.where(known, values, 0.0), counts], axis=1)
    return SumsMetric(name, rows, ratio, is_proportion)


def ratio(sums: np.ndarray) -> np.ndarray:
    """The first sum over the second."""
    return divided(sums[:, 0], sums[:, 1], np.nan)
