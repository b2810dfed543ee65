"""Confidence intervals from stored predictions: resampled once, never by running the model again."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from bmfm_pipeline.errors import ConfigError
from bmfm_pipeline.evaluation.metrics import Metric

RESAMPLING = ("bootstrap_quantiles", "bootstrap_t_interval", "bca")
METHODS = (*RESAMPLING, "binomial", "wilson")
CHUNK = 250_000  # weights held at once: they stay in the processor's cache


@dataclass(frozen=True)
class Interval:
    """A value and its bounds. `n` is the number of observations; `low` and `high` are None where they are not defined."""

    value: float
    low: float | None
    high: float | None
    n: int | None
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
    resamples : of the first three; binomial and wilson draw none and are centred on the metric itself.
    groups : observations of one group (donor, study) are resampled together.

    Resamples in which the metric is not defined are left out. Raises ConfigError when the method does not fit the metric.
    """
    return interval_of(
        Metric(metric, y_true, y_pred), method=method, resamples=resamples, level=level, seed=seed, groups=groups
    )


def interval_of(
    metric: Metric,
    *,
    method: str,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    groups=None,
    centre_on_resamples: bool = False,
) -> Interval:
    """confidence_interval of a prepared metric. `centre_on_resamples`: binomial and wilson take the mean over resamples as estimate."""
    if method not in METHODS:
        raise ConfigError(f"unknown interval method '{method}'; known: {', '.join(METHODS)}")
    if not 0 < level < 1:
        raise ConfigError(f"level must lie between 0 and 1, found {level}")
    value = metric.value()
    if method in RESAMPLING:
        values = resampled(metric, resamples, seed, groups)
        return Interval(value, *_from_resamples(values, method, level, metric, groups), metric.n, method)
    if not metric.is_proportion:
        raise ConfigError(
            f"{method} is an interval of a proportion of independent observations; {metric.name} is none (accuracy is); "
            "use bootstrap_quantiles"
        )
    if groups is not None:
        raise ConfigError(
            f"{method} takes observations as independent and cannot respect groups; use bootstrap_quantiles"
        )
    estimates = resampled(metric, resamples, seed) if centre_on_resamples else [value]
    return Interval(value, *interval_from_values(estimates, method=method, level=level, n=metric.n), metric.n, method)


def resampled(metric: Metric, resamples: int, seed: int, groups=None) -> np.ndarray:
    """(resamples,) values of the metric under resampling with replacement; the same seed gives the same resamples for any metric."""
    if resamples < 1:
        raise ConfigError(f"resamples must be at least 1, found {resamples}")
    codes = _group_codes(groups, metric.n)
    block = max(1, CHUNK // metric.n)
    generator = np.random.default_rng(seed)
    values = [
        metric.values(draw_weights(generator, min(block, resamples - start), metric.n, codes))
        for start in range(0, resamples, block)
    ]
    return np.concatenate(values)


def _group_codes(groups, n: int) -> np.ndarray | None:
    if groups is None:
        return None
    groups = np.asarray(groups)
    if groups.shape != (n,):
        raise ConfigError(f"groups has shape {groups.shape}; one group per observation is expected, shape ({n},)")
    return np.unique(groups.astype(str), return_inverse=True)[1]


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
    one_group = groups is not None and len(np.unique(np.asarray(groups).astype(str))) == 1
    # Of one group every resample is the same: that says nothing about other groups.
    if not len(values) or one_group:
        return None, None
    if method == "bca":
        return _bca(values, metric, level, groups)
    return interval_from_values(values, method=method, level=level)


def interval_from_values(
    values: Sequence[float] | float, *, method: str, level: float = 0.95, n: int | None = None
) -> tuple[float | None, float | None]:
    """(low, high) from values of a metric over resamples.

    binomial and wilson lie around their mean, with `n` observations. bootstrap_t_interval has n - 1 degrees of freedom, n the number
    of values unless given; of a single value it has no bounds.
    """
    values = np.atleast_1d(np.asarray(values, dtype=np.float64))
    tail = (1 - level) / 2
    if method == "bootstrap_quantiles":
        low, high = np.quantile(values, [tail, 1 - tail])
        return float(low), float(high)
    if method == "bootstrap_t_interval":
        if len(values) < 2:
            return None, None
        from scipy import stats

        margin = float(stats.t.ppf(1 - tail, (n or len(values)) - 1) * values.std())
        return float(values.mean()) - margin, float(values.mean()) + margin
    if n is None:
        raise ConfigError(f"{method} needs n, the number of observations")
    if method == "binomial" and not np.all((values >= 0) & (values <= 1)):
        return None, None
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
    # At the ends the bound is the end; computed, it would miss it by rounding.
    return (0.0 if p == 0 else max(0.0, centre - margin)), (1.0 if p == 1 else min(1.0, centre + margin))


def _bca(values: np.ndarray, metric: Metric, level: float, groups) -> tuple[float | None, float | None]:
    """Bias-corrected and accelerated bootstrap interval; the acceleration comes from leaving out each unit in turn."""
    from scipy import stats

    point = metric.value()
    if not np.isfinite(point):
        return None, None
    below = (np.sum(values < point) + 0.5 * np.sum(values == point)) / len(values)
    shift = stats.norm.ppf(np.clip(below, 1e-9, 1 - 1e-9))
    left_out = _jackknife(metric, groups)
    centred = left_out.mean() - left_out if len(left_out) else left_out
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
    """Values of the metric without each observation, or without each group; empty when there is but one."""
    codes = _group_codes(groups, metric.n)
    if codes is None:
        # Cells with the same label and the same prediction leave the same metric behind: one of them is enough.
        codes = np.arange(metric.n)
        units, sets = metric.alike()
    else:
        units = np.arange(int(codes.max()) + 1)
        sets = units
    if codes.max() == 0:
        return np.array([])
    block = max(1, CHUNK // metric.n)
    values = [
        metric.values((codes[None, :] != units[start : start + block, None]).astype(np.float64))
        for start in range(0, len(units), block)
    ]
    found = np.concatenate(values)[sets]
    return found[np.isfinite(found)]
