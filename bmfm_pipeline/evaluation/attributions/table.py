"""What the attributions of a class's cells say together: mean and spread over cells, and whether a gene stands out from others."""

from collections.abc import Sequence

import numpy as np
from scipy import sparse, stats

TOP = 20
# Of the table by gene, behind its name.
COLUMNS = (
    "mean", "sd", "n_cells", "n_present", "ci_low", "ci_high", "p_ttest", "p_null", "q_null", "highlight", "mean_logit",
)  # fmt: skip
# As a gene counts as standing out in the older way: Bonferroni over genes at .05, and this mean of normed scores.
HIGHLIGHT_ALPHA, HIGHLIGHT_MEAN = 0.05, 0.1


def class_table(
    scores: sparse.csr_matrix,
    logits: sparse.csr_matrix,
    *,
    level: float = 0.95,
    resamples: int = 1000,
    permutations: int = 200,
    seed: int = 0,
    groups: np.ndarray | None = None,
) -> tuple[dict[str, np.ndarray], float | None]:
    """Columns by gene, and how stable the top is: the mean share of the TOP genes that stay among them when cells are resampled.

    `scores` and `logits` (cells, genes) are normed and plain attributions of one class in cells of that class; a gene that a cell does not
    show counts as 0 there. Genes that no cell shows have no row: `column` says which gene a row is about.

    mean, sd, ci_low, ci_high: of the scores over cells, the interval from resampled cells, whole `groups` of them where given. p_ttest:
    one-sample t-test of the mean against 0. p_null, q_null: how often a gene's mean would be as far from what is expected when
    the scores of each cell are dealt to its genes at random, and the same after Benjamini-Hochberg. highlight: by t-test and size.
    mean_logit: mean of the plain attributions, points of the class's score.
    """
    scores = sparse.csr_matrix(scores, dtype=np.float64)
    scores.sum_duplicates()
    cells = scores.shape[0]
    present = np.asarray((scores != 0).sum(axis=0)).ravel() if scores.nnz else np.zeros(scores.shape[1], dtype=np.int64)
    kept = np.flatnonzero(present)
    scores, logits, present = scores[:, kept], sparse.csr_matrix(logits)[:, kept], present[kept]
    mean = np.asarray(scores.mean(axis=0)).ravel()
    squares = np.asarray(scores.multiply(scores).mean(axis=0)).ravel()
    blank = np.full(len(kept), np.nan)
    sd = np.sqrt(np.maximum(squares - mean**2, 0.0) * cells / (cells - 1)) if cells > 1 else blank
    low, high, stability = _bootstrap(scores, mean, level, resamples, seed, groups)
    p_null = permutation_p_values(scores, mean, present, permutations, seed)
    p_ttest = _t_test(mean, sd, cells)
    with np.errstate(invalid="ignore"):
        highlight = (p_ttest * len(kept) < HIGHLIGHT_ALPHA) & (np.abs(mean) > HIGHLIGHT_MEAN)
    table = {
        "column": kept,
        "mean": mean,
        "sd": sd,
        "n_cells": np.full(len(kept), cells),
        "n_present": present,
        "ci_low": low,
        "ci_high": high,
        "p_ttest": p_ttest,
        "p_null": p_null,
        "q_null": benjamini_hochberg(p_null),
        "highlight": highlight,
        "mean_logit": np.asarray(logits.mean(axis=0)).ravel(),
    }
    order = np.argsort(-mean, kind="stable")
    return {name: values[order] for name, values in table.items()}, stability


def _t_test(mean: np.ndarray, sd: np.ndarray, cells: int) -> np.ndarray:
    """(genes,) two-sided p; nan for a single cell, and 0 or 1 where all cells agree."""
    if cells < 2:
        return np.full(len(mean), np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = mean / (sd / np.sqrt(cells))
    return np.where(sd > 0, 2 * stats.t.sf(np.abs(t), cells - 1), np.where(mean == 0, 1.0, 0.0))


def _bootstrap(
    scores: sparse.csr_matrix, mean: np.ndarray, level: float, resamples: int, seed: int, groups: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, float | None]:
    """(low, high, stability of the top genes); nan and None where there is a single cell or group."""
    cells = scores.shape[0]
    _, group = np.unique(np.arange(cells) if groups is None else groups, return_inverse=True)
    count = int(group.max(initial=-1)) + 1
    if count < 2 or not len(mean):
        return np.full(len(mean), np.nan), np.full(len(mean), np.nan), None
    rng = np.random.default_rng([seed & 0xFFFFFFFF, 1])
    draws = rng.multinomial(count, np.full(count, 1 / count), size=resamples)[:, group].astype(np.float32)
    draws /= draws.sum(axis=1, keepdims=True)
    means = (scores.T.astype(np.float32) @ draws.T).T
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail], axis=0)
    top = min(TOP, len(mean))
    best = np.zeros(len(mean), dtype=bool)
    best[np.argsort(-mean, kind="stable")[:top]] = True
    found = np.argpartition(-means, top - 1, axis=1)[:, :top]
    return low, high, float(best[found].mean())


def permutation_p_values(
    scores: sparse.csr_matrix, mean: np.ndarray, present: np.ndarray, permutations: int, seed: int
) -> np.ndarray:
    """(genes,): p of each gene's mean when every cell deals its scores to its genes at random; two-sided.

    Under this null the expectation and variance of a mean are known, so means are compared as distances in standard deviations. Null
    distances of genes that similar numbers of cells show (by powers of two) are pooled, without which p could not be below
    1 / permutations. A cell that shows a single gene, or the same score everywhere, says nothing.
    """
    if not scores.nnz:
        return np.ones(len(mean))
    cells, lengths = scores.shape[0], np.diff(scores.indptr)
    rows = np.repeat(np.arange(cells), lengths)
    per_row = np.maximum(lengths, 1)
    centre = np.bincount(rows, scores.data, cells) / per_row
    spread = np.maximum(np.bincount(rows, scores.data**2, cells) / per_row - centre**2, 0.0)
    genes = len(mean)
    expected = np.bincount(scores.indices, centre[rows], genes) / cells
    deviation = np.sqrt(np.bincount(scores.indices, spread[rows], genes)) / cells
    usable = deviation > 1e-12
    scale = np.where(usable, deviation, 1.0)
    own = np.where(usable, np.abs(mean - expected) / scale, 0.0)
    rng = np.random.default_rng([seed & 0xFFFFFFFF, 2])
    null = np.empty((permutations, genes), dtype=np.float32)
    for number in range(permutations):
        dealt = scores.data[np.argsort(rows + rng.random(len(rows)))]
        means = np.bincount(scores.indices, dealt, genes) / cells
        null[number] = np.where(usable, np.abs(means - expected) / scale, 0.0)
    p = np.ones(genes)
    kinds = np.floor(np.log2(np.maximum(present, 1))).astype(np.int64)
    for kind in np.unique(kinds):
        members = np.flatnonzero((kinds == kind) & usable)
        pooled = np.sort(null[:, members], axis=None)
        # A hair below, so that rounding of the single-precision distances never makes a gene rarer than itself.
        above = len(pooled) - np.searchsorted(pooled, own[members].astype(np.float32) * (1 - 1e-6))
        p[members] = (above + 1) / (len(pooled) + 1)
    return p


def benjamini_hochberg(p: Sequence[float]) -> np.ndarray:
    """False discovery rates of Benjamini and Hochberg (1995): the smallest rate at which each is among the discoveries."""
    p = np.asarray(p, dtype=np.float64)
    count = len(p)
    if not count:
        return p
    order = np.argsort(-p)
    rates = np.minimum.accumulate(p[order] * count / np.arange(count, 0, -1))
    found = np.empty(count)
    found[order] = np.minimum(rates, 1.0)
    return found
