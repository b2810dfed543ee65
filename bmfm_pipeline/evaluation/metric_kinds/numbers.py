"""Metrics of predicted numbers."""

import numpy as np

from bmfm_pipeline.evaluation.metric_kinds.classes import divided


def _mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return divided(weights @ values, weights.sum(axis=1))


def mse(y_true: np.ndarray, y_pred: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return _mean((y_true - y_pred) ** 2, weights)


def rmse(y_true: np.ndarray, y_pred: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return np.sqrt(mse(y_true, y_pred, weights))


def mae(y_true: np.ndarray, y_pred: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return _mean(np.abs(y_true - y_pred), weights)


def r2(y_true: np.ndarray, y_pred: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Share of the variance explained; below 0 where the mean would do better, nan where the truth is constant up to rounding."""
    shares = _shares(weights)
    centred = y_true - (shares @ y_true)[:, None]
    spread = _spread(y_true, centred, shares)
    return 1 - divided(shares @ (y_true - y_pred) ** 2, spread, np.nan)


def pcc(y_true: np.ndarray, y_pred: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Pearson correlation; nan where a side is constant up to rounding."""
    shares = _shares(weights)
    x, y = (values - (shares @ values)[:, None] for values in (y_true, y_pred))
    return _correlation(x, y, (_spread(y_true, x, shares), _spread(y_pred, y, shares)), shares)


def spearman(y_true: np.ndarray, y_pred: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Correlation of ranks, equal values at the middle of their ranks; ranks are those within each resample."""
    shares = _shares(weights)
    centred = []
    for values in (y_true, y_pred):
        ranks = _ranks(values, shares)
        centred.append(ranks - np.einsum("rn,rn->r", shares, ranks)[:, None])
    spreads = [np.einsum("rn,rn,rn->r", shares, ranks, ranks) for ranks in centred]
    # Ranks are shares of the observations: where all are equal, rounding leaves far less than one rank of a million.
    return _correlation(*centred, [np.where(spread > 1e-18, spread, 0.0) for spread in spreads], shares)


def zero_accuracy(y_true: np.ndarray, y_pred: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """How often truth and prediction (rounded to a whole number) agree on being zero."""
    return _mean(((y_true == 0) == says_zero(y_pred)).astype(np.float64), weights)


def says_zero(y_pred: np.ndarray) -> np.ndarray:
    """Where a predicted number rounds to zero."""
    return np.round(y_pred) == 0


def _shares(weights: np.ndarray) -> np.ndarray:
    return weights / np.maximum(weights.sum(axis=1, keepdims=True), 1)


def _spread(values: np.ndarray, centred: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """(R,) variance of values (n,) that are centred (R, n); 0 where it is but rounding."""
    spread = np.einsum("rn,rn,rn->r", shares, centred, centred)
    rounding = (4 * np.finfo(np.float64).eps * np.abs(values).max()) ** 2
    return np.where(spread > rounding, spread, 0.0)


def _correlation(x: np.ndarray, y: np.ndarray, spreads, shares: np.ndarray) -> np.ndarray:
    covariance = np.einsum("rn,rn,rn->r", shares, x, y)
    return np.clip(divided(covariance, np.sqrt(spreads[0]) * np.sqrt(spreads[1]), np.nan), -1, 1)


def _ranks(values: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """(R, n) share of the observations below each one, plus half of those equal to it."""
    order = np.argsort(values, kind="stable")
    changes = np.append(True, values[order][1:] != values[order][:-1])
    run, starts = np.cumsum(changes) - 1, np.flatnonzero(changes)
    sums = np.zeros((len(shares), len(values) + 1))
    np.cumsum(np.take(shares, order, axis=1), axis=1, out=sums[:, 1:])
    place = np.empty(len(values), dtype=np.int64)
    place[order] = run
    ends = np.append(starts[1:], len(values))
    return np.take((np.take(sums, starts, axis=1) + np.take(sums, ends, axis=1)) / 2, place, axis=1)


VALUE_METRICS = {
    "mse": mse,
    "rmse": rmse,
    "mae": mae,
    "pcc": pcc,
    "r2": r2,
    "spearman": spearman,
    "zero_accuracy": zero_accuracy,
}
