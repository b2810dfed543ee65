"""Confidence intervals from stored predictions: resampled once, never by running the model again."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from bmfm_pipeline.errors import ConfigError
from bmfm_pipeline.evaluation.metrics import PROPORTIONS, Metric

METHODS = ("bootstrap_quantiles", "bootstrap_t_interval", "binomial", "wilson", "bca")
CHUNK = 20_000_000  # weights held at once


@dataclass(frozen=True)
class Interval:
    """A value and its bounds. `n` is the number of observations; `low` and `high` are None where they are not defined."""

    value: float
    low: float | None
    high: float | None
    n: int
    method: str


def confidence_interval(
    metric: str | Callable,
    *,
    y_true,
    y_pred,
    method: str,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    groups=None,
) -> Interval:
    """A metric of predictions and its interval.

    Parameters
    ----------
    metric : accuracy, f1, precision, recall, mcc (class labels), auroc, auprc (y_pred = scores (n,) or (n, C)), mse, mae, pcc, or a
        function (y_true, y_pred) -> float.
    method : bootstrap_quantiles (quantiles of the resampled metric), bootstrap_t_interval (Student t with resamples - 1 degrees
        of freedom around their mean, scale their standard deviation), bca (bias-corrected and accelerated, Efron 1987), binomial
        (normal approximation, not clipped) and wilson (Wilson 1927), the last two for proportions, with n the observations.
    groups : observations of one group (donor, study) are resampled together.

    Raises ConfigError when the method does not fit the metric.
    """
    if method not in METHODS:
        raise ConfigError(f"unknown interval method '{method}'; known: {', '.join(METHODS)}")
    if not 0 < level < 1:
        raise ConfigError(f"level must lie between 0 and 1, found {level}")
    prepared = Metric(metric, y_true, y_pred)
    value = prepared.value()
    if method in ("binomial", "wilson"):
        if prepared.name not in PROPORTIONS:
            raise ConfigError(
                f"{method} is an interval of a proportion of independent observations; {prepared.name} is none (accuracy is); "
                "use bootstrap_quantiles"
            )
        if groups is not None:
            raise ConfigError(
                f"{method} takes observations as independent and cannot respect groups; use bootstrap_quantiles"
            )
        return Interval(value, *_proportion(value, prepared.n, method, level), prepared.n, method)
    values = resampled(prepared, resamples, seed, groups)
    return Interval(value, *_from_resamples(values, method, level, prepared, groups), prepared.n, method)


def resampled(metric: Metric, resamples: int, seed: int, groups=None) -> np.ndarray:
    """(resamples,) values of the metric under resampling with replacement; the same seed gives the same resamples for any metric."""
    if resamples < 1:
        raise ConfigError(f"resamples must be at least 1, found {resamples}")
    values = []
    block = max(1, CHUNK // metric.n)
    generator = np.random.default_rng(seed)
    codes = None if groups is None else np.unique(np.asarray(groups).astype(str), return_inverse=True)[1]
    for start in range(0, resamples, block):
        weights = draw_weights(generator, min(block, resamples - start), metric.n, codes)
        values.append(metric.values(weights))
    return np.concatenate(values)


def draw_weights(generator: np.random.Generator, resamples: int, n: int, codes: np.ndarray | None = None) -> np.ndarray:
    """(resamples, n): how often each observation is drawn; whole groups of `codes` together when given."""
    units = n if codes is None else int(codes.max()) + 1
    drawn = generator.integers(0, units, size=(resamples, units))
    flat = np.bincount((drawn + np.arange(resamples)[:, None] * units).ravel(), minlength=resamples * units)
    counts = flat.reshape(resamples, units).astype(np.float64)
    return counts if codes is None else counts[:, codes]


def _from_resamples(
    values: np.ndarray, method: str, level: float, metric: Metric, groups
) -> tuple[float | None, float | None]:
    values = values[np.isfinite(values)]
    if not len(values):
        return None, None
    if method == "bca":
        return _bca(values, metric, level, groups)
    return interval_from_values(values, method=method, level=level)


def interval_from_values(values: Sequence[float], *, method: str, level: float = 0.95, n: int | None = None):
    """(low, high) from values of a metric over resamples; for binomial and wilson around their mean with `n` observations."""
    values = np.asarray(values, dtype=np.float64)
    tail = (1 - level) / 2
    if method == "bootstrap_quantiles":
        low, high = np.quantile(values, [tail, 1 - tail])
        return float(low), float(high)
    if method == "bootstrap_t_interval":
        if len(values) < 2:
            return None, None
        from scipy import stats

        margin = float(stats.t.ppf(1 - tail, len(values) - 1) * values.std())
        return float(values.mean()) - margin, float(values.mean()) + margin
    if n is None:
        raise ConfigError(f"{method} needs n, the number of observations")
    return _proportion(float(values.mean()), n, method, level)


def _proportion(p: float, n: int, method: str, level: float) -> tuple[float | None, float | None]:
    if not 0 <= p <= 1:
        return None, None
    from scipy import stats

    z = float(stats.norm.ppf(0.5 + level / 2))
    if method == "binomial":
        margin = z * math.sqrt(p * (1 - p) / n)
        return p - margin, p + margin
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    margin = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, centre - margin), min(1.0, centre + margin)


def _bca(values: np.ndarray, metric: Metric, level: float, groups) -> tuple[float, float]:
    from scipy import stats

    point = metric.value()
    below = (np.sum(values < point) + 0.5 * np.sum(values == point)) / len(values)
    shift = stats.norm.ppf(np.clip(below, 1e-9, 1 - 1e-9))
    left_out = _jackknife(metric, groups)
    centred = left_out.mean() - left_out
    bottom = 6 * (centred**2).sum() ** 1.5
    acceleration = float((centred**3).sum() / bottom) if bottom > 0 else 0.0
    tail = (1 - level) / 2
    quantiles = []
    for z in stats.norm.ppf([tail, 1 - tail]):
        moved = shift + z
        quantiles.append(stats.norm.cdf(shift + moved / (1 - acceleration * moved)))
    low, high = np.quantile(values, quantiles)
    return float(low), float(high)


def _jackknife(metric: Metric, groups) -> np.ndarray:
    codes = np.arange(metric.n) if groups is None else np.unique(np.asarray(groups).astype(str), return_inverse=True)[1]
    units = int(codes.max()) + 1
    block = max(1, CHUNK // metric.n)
    values = []
    for start in range(0, units, block):
        left = np.arange(start, min(start + block, units))
        values.append(metric.values((codes[None, :] != left[:, None]).astype(np.float64)))
    found = np.concatenate(values)
    return found[np.isfinite(found)]
