"""Columns of a chunk after a gene step: some stay, some go, some are added up. Used on values and counts alike."""

from dataclasses import dataclass

import numpy as np
from scipy import sparse


@dataclass(frozen=True)
class ColumnMap:
    """Where each column goes. `target`: int32 (columns before,), the position after the step, -1 where the column is dropped.

    Columns with one target are added up. `size`: number of columns after the step.
    """

    target: np.ndarray
    size: int

    @classmethod
    def of(cls, columns: "np.ndarray | ColumnMap | None", n_before: int) -> "ColumnMap":
        """What a step's `genes` returned, as a map: positions that stay, a map already, or None for all columns."""
        if isinstance(columns, ColumnMap):
            return columns
        if columns is None:
            return cls(np.arange(n_before, dtype=np.int32), n_before)
        target = np.full(n_before, -1, dtype=np.int32)
        target[columns] = np.arange(len(columns), dtype=np.int32)
        return cls(target, len(columns))

    def totals(self, totals: np.ndarray) -> np.ndarray:
        """float64 (size,): per-column totals after the step from those before it."""
        kept = self.target >= 0
        return np.bincount(self.target[kept], weights=totals[kept], minlength=self.size)

    def simplified(self) -> "np.ndarray | ColumnMap | None":
        """The cheapest form of the same: None when nothing moves, positions when nothing is added up."""
        kept = np.flatnonzero(self.target >= 0)
        if (np.bincount(self.target[kept], minlength=self.size) != 1).any():
            return self
        if len(kept) == len(self.target) and (self.target == np.arange(len(self.target))).all():
            return None
        positions = np.empty(self.size, dtype=np.int64)
        positions[self.target[kept]] = kept
        return positions


def take_columns(matrix: sparse.csr_matrix, columns: "np.ndarray | ColumnMap | None") -> sparse.csr_matrix:
    """The CSR matrix with its columns selected, reordered or added up; sorted indices, same dtype."""
    if columns is None:
        return matrix
    if not isinstance(columns, ColumnMap):
        return matrix[:, columns]
    moved = columns.target[matrix.indices]
    kept = moved >= 0
    if kept.all():
        data, indptr = matrix.data.copy(), matrix.indptr.copy()
    else:
        data, moved = matrix.data[kept], moved[kept]
        indptr = np.concatenate(([0], np.cumsum(kept)))[matrix.indptr]
    result = sparse.csr_matrix((data, moved, indptr), shape=(matrix.shape[0], columns.size))
    result.sum_duplicates()
    return result
