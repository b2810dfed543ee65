"""Mean profiles of perturbations, and the genes that each of them changes, from one pass over processed cells."""

from dataclasses import dataclass

import numpy as np

from bmfm_pipeline.data.kernels import add_group_moments

BLOCK = 20_000  # cells read together


@dataclass(frozen=True)
class GroupMoments:
    """Of each of P groups of cells: `cells` (P,), `means` (P, G) and `variances` (P, G) of the values, the latter over cells - 1 (0 for one)."""

    cells: np.ndarray
    means: np.ndarray
    variances: np.ndarray


def group_moments(store, groups: np.ndarray, n_groups: int) -> GroupMoments:
    """Moments of the values of a store by group; groups (cells,) are numbers below n_groups, -1 for none."""
    groups = np.asarray(groups, dtype=np.int64)
    sums, squares = np.zeros((n_groups, store.n_genes)), np.zeros((n_groups, store.n_genes))
    rows = np.flatnonzero(groups >= 0)
    for start in range(0, len(rows), BLOCK):
        block = rows[start : start + BLOCK]
        indptr, indices, data = store.gather(block)
        add_group_moments(indptr, indices, data, groups[block], sums, squares)
    cells = np.bincount(groups[rows], minlength=n_groups)
    number = np.maximum(cells, 1)[:, None]
    means = sums / number
    variances = np.maximum(squares - number * means**2, 0) / np.maximum(number - 1, 1)
    return GroupMoments(cells, means, variances)


def welch_scores(moments: GroupMoments, reference: int) -> np.ndarray:
    """(P, G) Welch's t of every group against the group `reference`; 0 where neither varies.

    What scanpy.tl.rank_genes_groups gives as scores with method="t-test" and a reference group.
    """
    error = moments.variances / np.maximum(moments.cells, 1)[:, None]
    error = np.sqrt(error + error[reference])
    difference = moments.means - moments.means[reference]
    return np.divide(difference, error, out=np.zeros_like(difference), where=error > 0)


def ranked_genes(scores: np.ndarray, most: int) -> np.ndarray:
    """(P, most) columns by falling absolute score; the first column where scores are equal."""
    return np.argsort(-np.abs(scores), axis=1, kind="stable")[:, :most]
