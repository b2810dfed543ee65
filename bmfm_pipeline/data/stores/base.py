"""What every store of cells offers: a matrix of values, counts where there are any, obs columns by name, labels."""

import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import cached_property

import numpy as np

from bmfm_pipeline.data.label_values import encode_classes, encode_members, encode_numbers
from bmfm_pipeline.data.stores.matrices import Matrix
from bmfm_pipeline.errors import DataError

# Where a processed file keeps the values of log-normalised input, before bins were made of them.
LOG_VALUES = "layers/log_normalised"


class BaseStore(ABC):
    """Cells by row number. Safe to read from several threads; pickles without its data where it lies in files.

    `matrix` holds the values, `counts` the raw counts or None, `log_values` what log-normalised input was, or None. `contiguous` tells whether `indptr`, `indices` and `data` are the
    arrays of one CSR matrix; where it is False only `gather` and `rows` give access, and `row_sizes` the sizes.
    """

    matrix: Matrix
    counts: Matrix | None
    log_values: Matrix | None = None
    name: str  # as messages call the store
    _var_names: list[str]

    @property
    @abstractmethod
    def obs_names(self) -> np.ndarray:
        """Cell names, object (cells,)."""

    @property
    def var_names(self) -> list[str]:
        """Gene names, one per column."""
        return self._var_names

    @property
    @abstractmethod
    def obs_columns(self) -> list[str]:
        """Names of the obs columns."""

    @property
    @abstractmethod
    def obs(self):
        """The obs table as a pandas DataFrame."""

    @abstractmethod
    def _read_column(self, name: str) -> np.ndarray:
        """An obs column that exists, as an object array."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.matrix.shape

    @property
    def n_cells(self) -> int:
        return self.shape[0]

    @property
    def n_genes(self) -> int:
        return self.shape[1]

    @property
    def contiguous(self) -> bool:
        return self.matrix.contiguous

    @property
    def row_sizes(self) -> np.ndarray:
        """int64 (cells,): stored values of each row, or an upper bound of it."""
        return self.matrix.row_sizes

    def gather(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(indptr (B + 1,) int64, indices int32, data) of just these rows, in this order, columns ascending within a row."""
        return self.matrix.gather(rows)

    def rows(self, rows: np.ndarray):
        """The chosen rows as a scipy CSR matrix."""
        return self.matrix.rows(rows)

    @cached_property
    def cell_keys(self) -> np.ndarray:
        """int64 (cells,): a checksum of each cell's name, which makes its random draws the same in every file that holds it."""
        return keys_of(self.obs_names)

    def column(self, name: str) -> np.ndarray:
        """One obs column as an object array (cells,), NaN where missing."""
        if name not in self.obs_columns:
            raise DataError(
                f"{self.name}: obs has no column '{name}'; columns: {', '.join(sorted(self.obs_columns)) or 'none'}"
            )
        return self._read_column(name)

    def rows_of_split(self, split: str, column: str) -> np.ndarray:
        """int64 row numbers whose `column` says `split`."""
        return np.flatnonzero(self.column(column) == split).astype(np.int64)

    def labels(
        self,
        column: str,
        label_dict: dict[str, int] | None,
        silent: list[str] | None = None,
        separator: str | None = None,
    ) -> np.ndarray:
        """Class ids int64 (cells,), -100 where missing or silent; with no dictionary numbers float32 (cells,), nan where missing.

        With a `separator` a cell may have several classes: float32 (cells, classes) of 0 and 1, -100 where missing or silent.
        """
        values, where = self.column(column), f"{self.name}: obs['{column}']"
        if label_dict is None:
            return encode_numbers(values, silent, where)
        if separator is not None:
            return encode_members(values, label_dict, silent, separator, where)
        return encode_classes(values, label_dict, silent, where)


class ContiguousStore(BaseStore):
    """A store whose values are the arrays of one CSR matrix."""

    @property
    def data(self) -> np.ndarray:
        return self.matrix.data

    @property
    def indices(self) -> np.ndarray:
        return self.matrix.indices

    @property
    def indptr(self) -> np.ndarray:
        return self.matrix.indptr


def keys_of(names: Iterable[str]) -> np.ndarray:
    """int64 checksums (CRC-32) of cell names; two cells that share one only share their random draws."""
    return np.fromiter((zlib.crc32(str(name).encode()) for name in names), dtype=np.int64)
