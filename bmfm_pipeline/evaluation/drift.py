"""How far new cells are from those that a model was tested on: genes, counts, labels, embeddings, each as one number with its limit."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from bmfm_pipeline.config.promotion import DriftLimits

# Of the numbers that permutations give by chance, a drift must exceed all but this share.
CHANCE = 0.05
_NAMED = 3


@dataclass(frozen=True)
class CellsOfASide:
    """What is compared of n cells, None where it is not known: `labels` (n,) texts, `totals` (n,) counts, `embeddings` (n, d).

    `coverage` is the share of all counts of the data in genes that the model knows. `labels` may be of more cells than the others.
    """

    labels: np.ndarray | None = None
    totals: np.ndarray | None = None
    embeddings: np.ndarray | None = None
    coverage: float | None = None


@dataclass(frozen=True)
class Drift:
    """One number: `value` beside its `limit`, and beside `chance`, what permutations stay below, where there are any."""

    name: str
    value: float
    limit: float
    chance: float | None
    drifted: bool
    sentence: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_drift(before: CellsOfASide, now: CellsOfASide, limits: DriftLimits, seed: int = 0) -> list[Drift]:
    """What can be measured of the two sides, in the order gene coverage, library size, label mix, embedding."""
    found = []
    if before.coverage and now.coverage is not None:
        found.append(gene_coverage(before.coverage, now.coverage, limits.gene_coverage))
    if _both(before.totals, now.totals):
        found.append(library_size(before.totals, now.totals, limits.library_size, limits.permutations, seed))
    if _both(before.labels, now.labels):
        found.append(label_mix(before.labels, now.labels, limits.label_mix, limits.permutations, seed))
    if _both(before.embeddings, now.embeddings, 2):
        found.append(embedding_distance(before.embeddings, now.embeddings, limits, seed))
    return found


def _both(before: np.ndarray | None, now: np.ndarray | None, fewest: int = 1) -> bool:
    return before is not None and now is not None and min(len(before), len(now)) >= fewest


def gene_coverage(before: float, now: float, limit: float) -> Drift:
    """The share of counts in known genes, as part of that of the training data. It drifts when it falls below `limit`."""
    value = now / before
    sentence = (
        f"gene coverage {value:.2f} of that in training ({100 * now:.1f} % of the counts are in genes that the model knows, in training "
        f"{100 * before:.1f} %; limit {limit:g})"
    )
    return Drift("gene_coverage", value, limit, None, value < limit, sentence)


def library_size(before: np.ndarray, now: np.ndarray, limit: float, permutations: int = 199, seed: int = 0) -> Drift:
    """log2 of the ratio of median counts a cell, of totals (n,) and (m,). It drifts when its absolute value exceeds `limit`."""
    pooled, n = np.concatenate([before, now]).astype(np.float64), len(before)

    def distance(order: np.ndarray) -> float:
        medians = np.maximum([np.median(pooled[order[:n]]), np.median(pooled[order[n:]])], 1)
        return float(np.log2(medians[1] / medians[0]))

    value = distance(np.arange(len(pooled)))
    generator = np.random.default_rng([seed, 1])
    chance = _chance([abs(distance(generator.permutation(len(pooled)))) for _ in range(permutations)])
    sentence = (
        f"library size {value:+.2f} (log2; median {np.median(now):,.0f} counts a cell, before {np.median(before):,.0f}; "
        f"limit {limit:g}, by chance below {chance:.2f})"
    )
    return Drift("library_size", value, limit, chance, abs(value) > max(limit, chance), sentence)


def label_mix(before: np.ndarray, now: np.ndarray, limit: float, permutations: int = 199, seed: int = 0) -> Drift:
    """Total variation distance of the shares of labels (n,) and (m,), texts: 0 for the same mix, 1 for nothing in common."""
    names, codes = np.unique(np.concatenate([before, now]).astype(str), return_inverse=True)
    counts, counts_now = (
        np.bincount(part, minlength=len(names)) for part in (codes[: len(before)], codes[len(before) :])
    )

    def distance(drawn: np.ndarray, rest: np.ndarray) -> np.ndarray:
        return np.abs(drawn / len(now) - rest / len(before)).sum(axis=-1) / 2

    value = float(distance(counts_now, counts))
    total = counts + counts_now
    drawn = np.random.default_rng([seed, 2]).multivariate_hypergeometric(total, len(now), size=permutations)
    chance = _chance(distance(drawn, total - drawn))
    change = counts_now / len(now) - counts / len(before)
    largest = [place for place in np.argsort(-np.abs(change), kind="stable")[:_NAMED] if change[place]]
    changes = ", ".join(
        f"{names[place]} {100 * counts[place] / len(before):.0f} -> {100 * counts_now[place] / len(now):.0f} %"
        for place in largest
    )
    sentence = (
        f"label mix {value:.2f} (limit {limit:g}, by chance below {chance:.2f}{'; ' + changes if changes else ''})"
    )
    return Drift("label_mix", value, limit, chance, value > max(limit, chance), sentence)


def embedding_distance(before: np.ndarray, now: np.ndarray, limits: DriftLimits, seed: int = 0) -> Drift:
    """Energy distance (Szekely and Rizzo 2013) of embeddings (n, d) and (m, d) as part of twice the mean distance between the sides.

    0 for the same distribution, near 1 for sides far apart; of at most `limits.cells` cells of each side.
    """
    from scipy.spatial.distance import cdist

    generator = np.random.default_rng([seed, 3])
    first, second = (_drawn(side, limits.cells, generator) for side in (before, now))
    pooled = np.concatenate([first, second]).astype(np.float64)
    distances, n = cdist(pooled, pooled), len(first)
    members = np.zeros((len(pooled), 1 + limits.permutations))
    members[:n, 0] = 1
    for place in range(1, members.shape[1]):
        members[generator.permutation(len(pooled))[:n], place] = 1
    values = _energy(distances, members, n)
    value, chance = float(values[0]), _chance(values[1:])
    sentence = f"embedding distance {value:.3f} (limit {limits.embedding:g}, by chance below {chance:.3f})"
    return Drift("embedding_distance", value, limits.embedding, chance, value > max(limits.embedding, chance), sentence)


def _energy(distances: np.ndarray, members: np.ndarray, n: int) -> np.ndarray:
    """(columns of members,) relative energy distances, unbiased, so that chance gives about 0; members (N, P) marks the first side."""
    m = len(distances) - n
    sums = distances @ members
    within = (members * sums).sum(axis=0)
    between = ((1 - members) * sums).sum(axis=0)
    others = distances.sum() - within - 2 * between
    apart = between / (n * m)
    energy = 2 * apart - within / (n * (n - 1)) - others / (m * (m - 1))
    return np.divide(np.maximum(energy, 0), 2 * apart, out=np.zeros_like(apart), where=apart > 0)


def _drawn(values: np.ndarray, most: int, generator: np.random.Generator) -> np.ndarray:
    if len(values) <= most:
        return values
    return values[np.sort(generator.choice(len(values), most, replace=False))]


def _chance(values: Any) -> float:
    return float(np.quantile(np.asarray(values), 1 - CHANCE))
