"""A block of cells under way through a chain: the values that steps change, and the counts they started from."""

from dataclasses import dataclass

import numpy as np
from scipy import sparse

from bmfm_pipeline.data.transforms.columns import ColumnMap, take_columns

# Entries from which a compiled kernel is worth loading.
_MANY = 300_000
# Share of dropped rows from which it pays to close the gaps before the chain's end.
_GAPS = 0.25


@dataclass
class StepCount:
    """What one step left: cells, genes, and raw counts of what is left."""

    step: str
    cells: int = 0
    genes: int = 0
    counts: float = 0.0

    def add(self, block: "Block", genes: int) -> None:
        self.cells += block.n_cells
        self.genes = genes
        self.counts += block.total

    def take(self, other: "StepCount") -> None:
        """Add what the same step left of other cells."""
        self.cells += other.cells
        self.genes = other.genes
        self.counts += other.counts


class Block:
    """Rows of a source: `values` and `counts` (CSR float32, cells x genes) and `numbers`, the rows' numbers in the source.

    Values and counts share their index arrays, and at first their data, until a step makes that impossible. Rows that a filter
    drops are marked (`alive`) and leave the arrays in `settle`, for copying at every filter is what costs.
    """

    def __init__(self, first: int, chunk: sparse.csr_matrix):
        self.numbers = np.arange(first, first + chunk.shape[0])
        self.values = self.counts = chunk
        self.alive: np.ndarray | None = None
        self._totals: np.ndarray | None = None

    @property
    def n_cells(self) -> int:
        """Rows that are still in."""
        return len(self.numbers) if self.alive is None else int(np.count_nonzero(self.alive))

    @property
    def total(self) -> float:
        """Sum of the counts of the rows that are still in."""
        if self._totals is None:
            self._totals = _sums(self.counts)
        return float(self._totals.sum() if self.alive is None else self._totals[self.alive].sum())

    @property
    def shares_structure(self) -> bool:
        """Whether values and counts are stored at the same places."""
        return _same(self.values, self.counts)

    def keep(self, stays: np.ndarray | None) -> None:
        """Drop the rows where boolean `stays` (rows of the arrays,) is false."""
        if stays is None or stays.all():
            return
        self.alive = stays.copy() if self.alive is None else self.alive & stays
        if self.n_cells < (1 - _GAPS) * len(self.alive):
            self.settle()

    def settle(self) -> None:
        """Take the dropped rows out of the arrays."""
        if self.alive is None:
            return
        alive, shared, one = self.alive, self.shares_structure, self.values is self.counts
        self.numbers, self.alive = self.numbers[alive], None
        self._totals = None if self._totals is None else self._totals[alive]
        values, self.counts = self.values, _take_rows(self.counts, alive)
        if one:
            self.values = self.counts
        elif shared:
            self.values = _like(self.counts, _entries_of_rows(values, alive, values.data))
        else:
            self.values = _take_rows(values, alive)

    def own_values(self) -> sparse.csr_matrix:
        """The values, free to be changed in place: no longer the arrays of the counts."""
        if self.values is self.counts or np.shares_memory(self.values.data, self.counts.data):
            self.values = _like(self.counts, self.counts.data.copy())
        return self.values

    def take(self, columns: "np.ndarray | ColumnMap | None") -> None:
        """Select, reorder or add up the columns of values and counts."""
        if columns is None:
            return
        self._totals = None
        if isinstance(columns, np.ndarray) and self.shares_structure and self.counts.nnz >= _MANY and _ascends(columns):
            self._select(columns)
            return
        one = self.values is self.counts
        self.counts = take_columns(self.counts, columns)
        self.values = self.counts if one else take_columns(self.values, columns)
        for matrix in (self.counts, self.values):
            matrix.sort_indices()
        if (
            not one
            and np.array_equal(self.values.indptr, self.counts.indptr)
            and np.array_equal(self.values.indices, self.counts.indices)
        ):
            self.values = _like(self.counts, self.values.data)

    def _select(self, columns: np.ndarray) -> None:
        from bmfm_pipeline.data.kernels import select_columns

        matrix, shape = self.counts, (self.counts.shape[0], len(columns))
        target = np.full(matrix.shape[1], -1, dtype=np.int32)
        target[columns] = np.arange(len(columns), dtype=np.int32)
        ends = np.empty(len(matrix.indptr), dtype=matrix.indptr.dtype)
        indices = np.empty(matrix.nnz, dtype=np.int32)
        values, counts = np.empty(matrix.nnz, dtype=np.float32), np.empty(matrix.nnz, dtype=np.float32)
        size = select_columns(
            matrix.indptr, matrix.indices, self.values.data, matrix.data, target, ends, indices, values, counts
        )
        one = self.values is self.counts
        self.counts = sparse.csr_matrix((counts[:size], indices[:size], ends), shape=shape)
        self.counts.has_canonical_format = True
        self.values = self.counts if one else _like(self.counts, values[:size])

    def drop_zeros(self) -> None:
        """Take zeros out of the values; the counts stay as they are."""
        if self.values.data.all():
            return
        if self.values is self.counts or self.shares_structure:
            self.values = self.values.copy()
        self.values.eliminate_zeros()


def _ascends(columns: np.ndarray) -> bool:
    return bool((np.diff(columns) > 0).all())


def _same(one: sparse.csr_matrix, other: sparse.csr_matrix) -> bool:
    return one is other or (one.indices is other.indices and one.indptr is other.indptr)


def _like(matrix: sparse.csr_matrix, data: np.ndarray) -> sparse.csr_matrix:
    """`data` at the places where `matrix` stores its own, on the same index arrays."""
    made = sparse.csr_matrix(matrix.shape, dtype=data.dtype)
    made.data, made.indices, made.indptr = data, matrix.indices, matrix.indptr
    made.has_canonical_format = True
    return made


def _sums(matrix: sparse.csr_matrix) -> np.ndarray:
    """float64 (rows,): sum of each row."""
    sums = np.zeros(matrix.shape[0])
    filled = np.flatnonzero(np.diff(matrix.indptr))
    if len(filled):
        sums[filled] = np.add.reduceat(matrix.data, matrix.indptr[filled], dtype=np.float64)
    return sums


def _entries_of_rows(matrix: sparse.csr_matrix, alive: np.ndarray, *arrays: np.ndarray):
    """The entries of the rows that stay, for each of `arrays` (entries,): runs of rows are copied whole."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], alive, [False])))).reshape(-1, 2)
    spans = matrix.indptr[edges].tolist()
    taken = [np.concatenate([array[low:high] for low, high in spans] or [array[:0]]) for array in arrays]
    return taken if len(arrays) > 1 else taken[0]


def _take_rows(matrix: sparse.csr_matrix, alive: np.ndarray) -> sparse.csr_matrix:
    data, indices = _entries_of_rows(matrix, alive, matrix.data, matrix.indices)
    ends = np.concatenate(([0], np.cumsum(np.diff(matrix.indptr)[alive]))).astype(matrix.indptr.dtype)
    taken = sparse.csr_matrix((data, indices, ends), shape=(len(ends) - 1, matrix.shape[1]))
    taken.has_canonical_format = True
    return taken
