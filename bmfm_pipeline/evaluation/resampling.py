"""The bootstrap's draws: observations, or whole groups of them, with replacement, over all or within strata.

Observations that act alike on the metrics at hand (of class labels: those of the same label and the same predictions) are drawn by
their number at once, from a multinomial distribution. That is how often they are drawn one by one, so nothing changes but the time.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from bmfm_pipeline.errors import ConfigError
from bmfm_pipeline.evaluation.metrics import Metric

CHUNK = 250_000  # weights held at once: they stay in the processor's cache


def resampled(metric: Metric, resamples: int, seed: int, groups=None, strata=None) -> np.ndarray:
    """(resamples,) values of the metric under resampling with replacement; `groups` and `strata` as in resampled_together."""
    return resampled_together([metric], resamples, seed, groups, strata)[0]


def resampled_together(
    metrics: Sequence[Metric], resamples: int, seed: int, groups=None, strata=None
) -> list[np.ndarray]:
    """Of each metric (resamples,) values, in each resample of the same observations: what differs between them is no luck of the draw.

    Parameters
    ----------
    metrics : of the same n observations.
    groups : (n,), observations of one group are drawn together.
    strata : (n,), as many observations (or groups) are drawn of each stratum as it has.
    """
    if resamples < 1:
        raise ConfigError(f"resamples must be at least 1, found {resamples}")
    n = metrics[0].n
    if any(metric.n != n for metric in metrics):
        raise ConfigError(f"metrics of {', '.join(str(metric.n) for metric in metrics)} observations cannot be paired")
    first, sets = _alike(metrics)
    if len(first) > n // 4:
        draws = Draws(n, seed, groups, strata)
    else:
        metrics = [metric.at(first) for metric in metrics]
        draws = Draws(n, seed, groups, strata, sets)
    found: list[list[np.ndarray]] = [[] for _ in metrics]
    for weights in draws.blocks(resamples):
        for values, metric in zip(found, metrics, strict=True):
            values.append(metric.values(weights))
    return [np.concatenate(values) for values in found]


def _alike(metrics: Sequence[Metric]) -> tuple[np.ndarray, np.ndarray]:
    """One representative of each set of observations that act alike on all metrics, and the set of each observation."""
    first, sets = metrics[0].alike()
    for metric in metrics[1:]:
        if len(first) == metric.n:
            break
        others, other_sets = metric.alike()
        _, first, sets = np.unique(sets * len(others) + other_sets, return_index=True, return_inverse=True)
    # By first occurrence, so that the draws depend neither on the names of classes nor on which metric comes first.
    order = np.argsort(first)
    return first[order], np.argsort(order)[sets]


def codes_of(what: str, values, n: int) -> np.ndarray | None:
    """(n,) whole numbers from 0, one for each distinct value; None of None. Raises ConfigError for another shape."""
    if values is None:
        return None
    values = np.asarray(values)
    if values.shape != (n,):
        one = what.removesuffix("s") if what == "groups" else "stratum"
        raise ConfigError(f"{what} has shape {values.shape}; one {one} per observation is expected, shape ({n},)")
    return np.unique(values if values.dtype.kind in "biu" else values.astype(str), return_inverse=True)[1]


def draw_weights(generator: np.random.Generator, resamples: int, n: int, codes: np.ndarray | None = None) -> np.ndarray:
    """(resamples, n): how often each observation is drawn; whole groups of `codes` together when given."""
    if codes is not None:
        return _drawn(generator, resamples, int(codes.max()) + 1)[:, codes]
    return _drawn(generator, resamples, n)


def _drawn(generator: np.random.Generator, resamples: int, units: int) -> np.ndarray:
    """(resamples, units): how often each of `units` is drawn in as many draws as there are units."""
    drawn = generator.integers(0, units, size=(resamples, units))
    drawn += np.arange(resamples)[:, None] * units
    counts = np.bincount(drawn.ravel(), minlength=resamples * units)
    return counts.reshape(resamples, units).astype(np.float64)


class Draws:
    """Resamples of n observations as weights, block by block; the same seed gives the same ones, whatever the size of a block.

    With `sets` (n,) the weights are those of each set of observations, else of each observation.
    """

    def __init__(self, n: int, seed: int, groups=None, strata=None, sets: np.ndarray | None = None):
        self.n, self.sets = n, sets
        codes, layers = codes_of("groups", groups, n), codes_of("strata", strata, n)
        # Groups of one observation each are no groups.
        self.codes = None if codes is None or codes.max() + 1 == n else codes
        self.width = n if sets is None else int(sets.max()) + 1
        of_units = layers
        if layers is not None and self.codes is not None:
            of_units = strata_of_groups(self.codes, layers)
        self._strata = [None] if of_units is None else [np.flatnonzero(of_units == s) for s in np.unique(of_units)]
        # A stream of its own for each stratum: what one draws does not depend on how many resamples the others drew before.
        seeds = [seed] if of_units is None else [[seed, number] for number in range(len(self._strata))]
        self._generators = [np.random.default_rng(each) for each in seeds]

    def blocks(self, resamples: int) -> Iterator[np.ndarray]:
        """Weights (some resamples, n or sets) until there are `resamples`."""
        block = max(1, CHUNK // self.width)
        for start in range(0, resamples, block):
            yield self.draw(min(block, resamples - start))

    def draw(self, resamples: int) -> np.ndarray:
        """The next (resamples, n or sets) weights."""
        if self.codes is None:
            return self._of_observations(resamples) if self.sets is None else self._of_sets(resamples)
        units = int(self.codes.max()) + 1
        counts = self._by_stratum(resamples, units, _drawn)
        if self.sets is None:
            return counts[:, self.codes]
        return (self._table(units).T @ counts.T).T

    def _by_stratum(self, resamples: int, units: int, draw) -> np.ndarray:
        if self._strata[0] is None:
            return draw(self._generators[0], resamples, units)
        found = np.zeros((resamples, units))
        for generator, members in zip(self._generators, self._strata, strict=True):
            found[:, members] = draw(generator, resamples, len(members))
        return found

    def _of_observations(self, resamples: int) -> np.ndarray:
        return self._by_stratum(resamples, self.n, _drawn)

    def _of_sets(self, resamples: int) -> np.ndarray:
        found = np.zeros((resamples, self.width))
        for generator, members in zip(self._generators, self._strata, strict=True):
            sets = self.sets if members is None else self.sets[members]
            sizes = np.bincount(sets, minlength=self.width)
            there = np.flatnonzero(sizes)
            share = sizes[there] / len(sets)
            found[:, there] += generator.multinomial(len(sets), share / share.sum(), size=resamples)
        return found

    def _table(self, units: int):
        """(groups, sets) sparse: how many observations of each set each group has."""
        from scipy import sparse

        return sparse.csr_matrix((np.ones(self.n), (self.codes, self.sets)), shape=(units, self.width))


def strata_of_groups(codes: np.ndarray, layers: np.ndarray) -> np.ndarray:
    """The stratum of each group; ConfigError where a group has observations of several."""
    of_group = np.zeros(int(codes.max()) + 1, dtype=np.int64)
    of_group[codes] = layers
    if (of_group[codes] != layers).any():
        torn = len(np.unique(codes[of_group[codes] != layers]))
        raise ConfigError(
            f"strata: {torn} of {len(of_group)} groups have observations of several strata, so groups cannot be resampled whole "
            "within strata; give one of the two"
        )
    return of_group
