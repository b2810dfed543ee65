"""Confidence intervals from stored predictions: resampled once, never by running the model again."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from bmfm_pipeline.errors import ConfigError
from bmfm_pipeline.evaluation.metrics import Metric
from bmfm_pipeline.evaluation.resampling import CHUNK, codes_of, resampled, strata_of_groups

RESAMPLING = ("bootstrap_quantiles", "bootstrap_t_interval", "bca")
METHODS = (*RESAMPLING, "binomial", "wilson")


@dataclass(frozen=True)
class Interval:
    """A value and its bounds. `n` is the number of observations; `low` and `high` are None where they are not defined.

    `left_out`: resamples in which the metric is not defined, which the bounds do without.
    """

    value: float
    low: float | None
    high: float | None
    n: int | None
    method: str
    left_out: int = 0


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
    strata=None,
) -> Interval:
    """A metric of predictions and its interval.

    Parameters
    ----------
    metric : of class labels accuracy, balanced_accuracy, f1, f1_weighted, precision, recall, mcc; of scores, y_pred (n,) or (n, C),
        auroc, auprc, log_loss, perplexity, top3_accuracy, top5_accuracy; of numbers mse, rmse, mae, pcc, r2, spearman, zero_accuracy;
        or a function (y_true, y_pred) -> float.
    method : bootstrap_quantiles (quantiles of the resampled metric), bootstrap_t_interval (Student t with resamples - 1 degrees
        of freedom around their mean, scale their standard deviation), bca (bias-corrected and accelerated, Efron 1987), binomial
        (normal approximation, not clipped) and wilson (Wilson 1927), the last two for proportions, with n the observations.
    resamples : of the first three; binomial and wilson draw none and are centred on the metric itself.
    groups : (n,), observations of one group (donor, study) are resampled together.
    strata : (n,), each stratum keeps its number of observations, such as y_true for resampling within classes: the interval is
        then about other cells of the same composition.

    Resamples in which the metric is not defined are left out and counted. Raises ConfigError when the method does not fit the
    metric, for binomial and wilson with groups or strata, and for groups that have observations of several strata.
    """
    return interval_of(
        Metric(metric, y_true, y_pred),
        method=method,
        resamples=resamples,
        level=level,
        seed=seed,
        groups=groups,
        strata=strata,
    )


def interval_of(
    metric: Metric,
    *,
    method: str,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    groups=None,
    strata=None,
    centre_on_resamples: bool = False,
) -> Interval:
    """confidence_interval of a prepared metric. `centre_on_resamples`: binomial and wilson take the mean over resamples as estimate."""
    if method not in METHODS:
        raise ConfigError(f"unknown interval method '{method}'; known: {', '.join(METHODS)}")
    if not 0 < level < 1:
        raise ConfigError(f"level must lie between 0 and 1, found {level}")
    value = metric.value()
    if method in RESAMPLING:
        values = resampled(metric, resamples, seed, groups, strata)
        return interval_from_resamples(metric, values, method=method, level=level, groups=groups, strata=strata)
    if not metric.is_proportion:
        raise ConfigError(
            f"{method} is an interval of a proportion of independent observations; {metric.name} is none (accuracy is); "
            "use bootstrap_quantiles"
        )
    if groups is not None:
        raise ConfigError(
            f"{method} takes observations as independent and cannot respect groups; use bootstrap_quantiles"
        )
    if strata is not None:
        raise ConfigError(
            f"{method} takes the number of observations of each class as drawn too and cannot respect strata; use bootstrap_quantiles"
        )
    estimates = resampled(metric, resamples, seed) if centre_on_resamples else [value]
    return Interval(value, *interval_from_values(estimates, method=method, level=level, n=metric.n), metric.n, method)


def interval_from_resamples(
    metric: Metric, values: np.ndarray, *, method: str, level: float = 0.95, groups=None, strata=None
) -> Interval:
    """interval_of by one of RESAMPLING from values (R,) that the metric has already in resamples of its observations."""
    bounds = _from_resamples(values, method, level, metric, groups, strata)
    return Interval(metric.value(), *bounds, metric.n, method, int(len(values) - np.isfinite(values).sum()))


def _from_resamples(
    values: np.ndarray, method: str, level: float, metric: Metric, groups, strata
) -> tuple[float | None, float | None]:
    values = values[np.isfinite(values)]
    codes = codes_of("groups", groups, metric.n)
    # Of one group every resample is the same: that says nothing about other groups.
    if not len(values) or (codes is not None and codes.max() == 0):
        return None, None
    if method == "bca":
        return _bca(values, metric, level, codes, codes_of("strata", strata, metric.n))
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


def _bca(
    values: np.ndarray, metric: Metric, level: float, codes: np.ndarray | None, layers: np.ndarray | None
) -> tuple[float | None, float | None]:
    """Bias-corrected and accelerated bootstrap interval; the acceleration comes from leaving out each unit in turn."""
    from scipy import stats

    point = metric.value()
    if not np.isfinite(point):
        return None, None
    below = (np.sum(values < point) + 0.5 * np.sum(values == point)) / len(values)
    shift = stats.norm.ppf(np.clip(below, 1e-9, 1 - 1e-9))
    acceleration = _acceleration(metric, codes, layers)
    tail = (1 - level) / 2
    quantiles = []
    for z in stats.norm.ppf([tail, 1 - tail]):
        moved = shift + z
        bottom = 1 - acceleration * moved
        # At or beyond the pole the correction has no bound: the outermost resample is what is left.
        quantiles.append(stats.norm.cdf(shift + moved / bottom) if bottom > 0 else float(moved > 0))
    low, high = np.quantile(values, quantiles)
    return float(low), float(high)


def _acceleration(metric: Metric, codes: np.ndarray | None, layers: np.ndarray | None) -> float:
    """Skewness of the influence of the units, observations or groups, by stratum (Efron 1987, section 7; scipy does the same)."""
    left_out, of_unit = _jackknife(metric, codes)
    if layers is None:
        strata = np.zeros(len(of_unit), dtype=np.int64)
    else:
        strata = layers if codes is None else strata_of_groups(codes, layers)
    top = bottom = 0.0
    for stratum in np.unique(strata):
        own = left_out[of_unit[strata == stratum]]
        own = own[np.isfinite(own)]
        if len(own):
            influence = (len(own) - 1) * (own.mean() - own)
            top += (influence**3).sum() / len(own) ** 3
            bottom += (influence**2).sum() / len(own) ** 2
    return float(top / (6 * bottom**1.5)) if bottom > 0 else 0.0


def _jackknife(metric: Metric, codes: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """(values of the metric without one unit, which of them is that of each unit); a unit is an observation or a group of `codes`."""
    if codes is None:
        # Cells with the same label and the same prediction leave the same metric behind: one of them is enough.
        codes = np.arange(metric.n)
        units, of_unit = metric.alike()
    else:
        units = of_unit = np.arange(int(codes.max()) + 1)
    if codes.max() == 0:
        return np.array([np.nan]), of_unit
    if hasattr(metric, "without_each"):
        return metric.without_each(codes), of_unit
    block = max(1, CHUNK // metric.n)
    values = [
        metric.values((codes[None, :] != units[start : start + block, None]).astype(np.float64))
        for start in range(0, len(units), block)
    ]
    return np.concatenate(values), of_unit
