"""Stores of which only some are open at a time: thousands of files would need more open files than a process may have."""

import functools
from pathlib import Path

import numpy as np

from bmfm_pipeline.data.stores.base import BaseStore
from bmfm_pipeline.data.stores.h5ad import CellStore
from bmfm_pipeline.data.stores.matrices import Gathered, Matrix

# Files that a process holds open, three maps each.
MOST_OPEN = 64


@functools.lru_cache(maxsize=MOST_OPEN)
def _opened(path: Path) -> CellStore:
    return CellStore(path)


@functools.lru_cache(maxsize=MOST_OPEN)
def _shared(names: tuple[str, ...]) -> list[str]:
    """Files of one study often have the same genes: their list is held once."""
    return list(names)


class OnDemandMatrix(Matrix):
    """A matrix of a processed h5ad that is opened when rows are asked for. Sizes of rows are held: 4 bytes a cell."""

    def __init__(self, path: Path, counts: bool, opened: Matrix):
        self._path, self._counts = path, counts
        self.shape, self._dtype = opened.shape, opened.dtype
        self._row_sizes = opened.row_sizes.astype(np.int32)

    @property
    def row_sizes(self) -> np.ndarray:
        return self._row_sizes.astype(np.int64)

    @property
    def dtype(self) -> np.dtype:
        return self._dtype

    def _gather(self, rows: np.ndarray) -> Gathered:
        store = _opened(self._path)
        return (store.counts if self._counts else store.matrix).gather(rows)


class OnDemandStore(BaseStore):
    """A processed h5ad that is opened to be described, and again for its rows and columns, as one of at most MOST_OPEN."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.name = str(self.path)
        store = CellStore(self.path)
        self.matrix = OnDemandMatrix(self.path, False, store.matrix)
        self.counts = None if store.counts is None else OnDemandMatrix(self.path, True, store.counts)
        self._var_names, self._obs_columns = _shared(tuple(store.var_names)), store.obs_columns

    def __reduce__(self):
        return OnDemandStore, (self.path,)

    @property
    def obs_names(self) -> np.ndarray:
        return CellStore(self.path).obs_names

    @property
    def obs_columns(self) -> list[str]:
        return self._obs_columns

    @property
    def obs(self):
        return CellStore(self.path).obs

    def _read_column(self, name: str) -> np.ndarray:
        return _opened(self.path)._read_column(name)
