"""Sparse matrices of cells by genes that are read by row: the interface, and the one whose arrays lie in memory or a mapped file."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bmfm_pipeline.errors import DataError

Gathered = tuple[np.ndarray, np.ndarray, np.ndarray]


class Matrix(ABC):
    """Cells by genes, read by row."""

    shape: tuple[int, int]
    contiguous = False

    @property
    @abstractmethod
    def row_sizes(self) -> np.ndarray:
        """int64 (cells,): stored values of each row, or an upper bound of it."""

    @property
    @abstractmethod
    def dtype(self) -> np.dtype:
        """The type of `data` in every answer of `gather`."""

    @abstractmethod
    def _gather(self, rows: np.ndarray) -> Gathered:
        """`gather` for valid row numbers."""

    def gather(self, rows: np.ndarray) -> Gathered:
        """(indptr (B + 1,) int64, indices int32, data) of just these rows, in this order, columns ascending within a row.

        Raises DataError for a row that does not exist.
        """
        rows = np.asarray(rows, dtype=np.int64)
        if len(rows) and (rows.min() < 0 or rows.max() >= self.shape[0]):
            raise DataError(f"rows {rows.min()}..{rows.max()} asked for, the store has rows 0..{self.shape[0] - 1}")
        return self._gather(rows)

    def rows(self, rows: np.ndarray):
        """The chosen rows as a scipy CSR matrix; negative numbers count from the end, a boolean array chooses where it is True."""
        from scipy import sparse

        rows = np.asarray(rows)
        if rows.dtype == bool:
            rows = np.flatnonzero(rows)
        rows = rows.astype(np.int64, copy=False)
        indptr, indices, data = self.gather(np.where(rows < 0, rows + self.shape[0], rows))
        matrix = sparse.csr_matrix((data, indices, indptr), shape=(len(rows), self.shape[1]), copy=False)
        matrix.has_canonical_format = True
        return matrix


@dataclass(repr=False)
class CSRArrays(Matrix):
    """One CSR matrix as its three arrays: data (nnz,), indices (nnz,), indptr (cells + 1,)."""

    data: np.ndarray
    indices: np.ndarray
    indptr: np.ndarray
    shape: tuple[int, int]
    contiguous = True

    @property
    def row_sizes(self) -> np.ndarray:
        return np.diff(self.indptr).astype(np.int64, copy=False)

    @property
    def dtype(self) -> np.dtype:
        return self.data.dtype.newbyteorder("=")

    def _gather(self, rows: np.ndarray) -> Gathered:
        starts, ends = np.asarray(self.indptr)[rows], np.asarray(self.indptr)[rows + 1]
        # Views without the memmap class: slicing them is several times faster.
        indices, data = np.asarray(self.indices), np.asarray(self.data)
        return (
            running_sizes(ends - starts),
            joined([indices[a:b] for a, b in zip(starts.tolist(), ends.tolist(), strict=True)], indices.dtype),
            joined([data[a:b] for a, b in zip(starts.tolist(), ends.tolist(), strict=True)], data.dtype),
        )


def running_sizes(sizes: np.ndarray) -> np.ndarray:
    """indptr of rows of these sizes."""
    indptr = np.zeros(len(sizes) + 1, dtype=np.int64)
    np.cumsum(sizes, out=indptr[1:])
    return indptr


def joined(pieces: list[np.ndarray], dtype: np.dtype) -> np.ndarray:
    """The pieces one after the other, in native byte order."""
    dtype = np.dtype(dtype).newbyteorder("=")
    return np.concatenate([np.zeros(0, dtype), *pieces]).astype(dtype, copy=False)


def row_numbers(indptr: np.ndarray) -> np.ndarray:
    """For each stored value, the number of its row."""
    return np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))


def is_ascending(indptr: np.ndarray, indices: np.ndarray) -> bool:
    """Whether columns ascend strictly within every row."""
    if len(indices) < 2:
        return True
    rising = indices[1:] > indices[:-1]
    starts = indptr[1:-1]
    rising[starts[(starts > 0) & (starts < len(indices))] - 1] = True
    return bool(rising.all())


def in_order(gathered: Gathered, width: int, what: str) -> Gathered:
    """The same rows with columns ascending. Raises DataError when a row names a column twice or one that does not exist."""
    indptr, indices, data = gathered
    if len(indices) and (indices.min() < 0 or indices.max() >= width):
        raise DataError(f"{what}: a row names gene column {indices.max()}, but there are {width}; the file is damaged")
    if is_ascending(indptr, indices):
        return gathered
    order = np.argsort(row_numbers(indptr) * np.int64(width) + indices)
    indices, data = indices[order], data[order]
    if not is_ascending(indptr, indices):
        raise DataError(
            f"{what}: a row holds the same gene column twice; the file is damaged or was not summed up: open it with anndata, call "
            "`adata.X.sum_duplicates()` and write it again"
        )
    return indptr, indices, data


def normalised(matrix, what: str):
    """A scipy CSR matrix as CSRArrays with int32 indices ascending within rows; entries that name one place twice are summed."""
    from scipy import sparse

    if not sparse.issparse(matrix) or matrix.format != "csr":
        matrix = sparse.csr_matrix(matrix)
    if not (matrix.has_sorted_indices and is_ascending(matrix.indptr, matrix.indices)):
        matrix = matrix.copy()
        matrix.has_sorted_indices = matrix.has_canonical_format = False
        matrix.sum_duplicates()
    if matrix.shape[1] > np.iinfo(np.int32).max:
        raise DataError(f"{what}: {matrix.shape[1]} gene columns are more than can be numbered")
    indices = matrix.indices.astype(np.int32, copy=False)
    return CSRArrays(matrix.data, indices, matrix.indptr.astype(np.int64, copy=False), tuple(map(int, matrix.shape)))


def mapped(dataset, path: Path) -> np.ndarray:
    """An h5py dataset as an array: memory-mapped where it lies contiguous, else read."""
    offset = dataset.id.get_offset()
    if offset is None or dataset.chunks is not None or dataset.size == 0:
        return dataset[:]
    return np.memmap(path, dtype=dataset.dtype, mode="r", offset=offset, shape=dataset.shape)
