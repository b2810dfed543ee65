"""The matrices of a store as compiled kernels read them: CSR arrays and the rows of a batch in them."""

import numpy as np

from bmfm_pipeline.errors import ConfigError, DataError


class CellMatrix:
    """A matrix of cells by genes that offers `indptr`, `indices` and `data`, or `gather(rows)` when it is not `contiguous`."""

    def __init__(self, matrix, n_cells: int | None = None):
        self._matrix = matrix
        self.contiguous = bool(getattr(matrix, "contiguous", True))
        self._arrays = _views((matrix.indptr, matrix.indices, matrix.data)) if self.contiguous else None
        self.n_cells = len(self._arrays[0]) - 1 if self._arrays is not None else n_cells
        shape = getattr(matrix, "shape", None)
        if shape is not None:
            self.n_genes = int(shape[1])
        else:
            self.n_genes = int(self._arrays[1].max(initial=-1)) + 1 if self._arrays is not None else 0
        self.longest = int(np.diff(self._arrays[0]).max(initial=0)) if self._arrays is not None else None

    def select(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(row numbers, indptr, indices, data) in which the chosen rows can be found, in their order."""
        if self._arrays is not None:
            return (rows, *self._arrays)
        return (np.arange(len(rows)), *_views(self._matrix.gather(rows)))


def _views(matrix) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """indptr, indices and data as plain read-only views: one compiled kernel for memory maps and arrays alike."""
    arrays = (np.asarray(matrix[0], dtype=np.int64), np.asarray(matrix[1]), np.asarray(matrix[2]))
    if arrays[0].ndim != 1 or len(arrays[0]) < 1:
        raise DataError("the store's indptr is empty")
    if len(arrays[1]) != len(arrays[2]) or int(arrays[0][-1]) > len(arrays[2]) or np.any(np.diff(arrays[0]) < 0):
        raise DataError(
            f"the store's arrays do not fit: indptr ends at {int(arrays[0][-1])}, {len(arrays[1])} indices, {len(arrays[2])} values"
        )
    if arrays[2].dtype.kind not in "iufb":
        raise ConfigError(f"the store's values are of type {arrays[2].dtype}; numbers are needed")
    views = tuple(array.view() for array in arrays)
    for view in views:
        view.flags.writeable = False
    return views
