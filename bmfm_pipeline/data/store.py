"""CellStore: the rows of a processed h5ad by number, memory-mapped, shared between workers."""

import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from bmfm_pipeline.errors import DataError


@dataclass
class CSRArrays:
    """One CSR matrix as its three arrays: data (nnz,), indices (nnz,), indptr (cells + 1,)."""

    data: np.ndarray
    indices: np.ndarray
    indptr: np.ndarray
    shape: tuple[int, int]

    def rows(self, rows: np.ndarray):
        """The chosen rows as a scipy CSR matrix."""
        from scipy import sparse

        matrix = sparse.csr_matrix((self.data, self.indices, self.indptr), shape=self.shape, copy=False)
        return matrix[np.asarray(rows)]


class CellStore:
    """Opens a processed h5ad (CSR, contiguous, uncompressed) without loading it; falls back to reading when it is chunked.

    `matrix` is X, and `data`, `indices`, `indptr` are its arrays; `counts` those of layers["counts"], or None. Pickles as its path.
    """

    def __init__(self, path: str | Path):
        import h5py

        self.path = Path(path)
        with h5py.File(self.path, "r") as file:
            matrix = _matrix(file, "X", self.path)
            self.matrix = matrix
            self.data, self.indices, self.indptr, self.shape = matrix.data, matrix.indices, matrix.indptr, matrix.shape
            self.counts = _matrix(file, "layers/counts", self.path) if "layers/counts" in file else None
            self.obs_names = _index(file["obs"])
            self.var_names = _index(file["var"]).tolist()
        self._obs = None

    def __reduce__(self):
        return CellStore, (self.path,)

    @property
    def n_cells(self) -> int:
        return self.shape[0]

    @property
    def n_genes(self) -> int:
        return self.shape[1]

    @property
    def obs(self):
        """The obs table as a pandas DataFrame, read when first asked for."""
        if self._obs is None:
            import h5py
            from anndata.io import read_elem

            with h5py.File(self.path, "r") as file:
                self._obs = read_elem(file["obs"])
        return self._obs

    @cached_property
    def cell_keys(self) -> np.ndarray:
        """int64 (cells,): a checksum of each cell's name, which makes its random draws the same in every file that holds it."""
        return keys_of(self.obs_names)

    def column(self, name: str) -> np.ndarray:
        """One obs column as an object array, without importing anndata."""
        import h5py

        with h5py.File(self.path, "r") as file:
            if name not in file["obs"]:
                raise DataError(
                    f"{self.path}: obs has no column '{name}'; columns: {', '.join(sorted(file['obs'].keys()))}"
                )
            return _column(file["obs"][name])

    def rows_of_split(self, split: str, column: str) -> np.ndarray:
        """int64 row numbers whose `column` says `split`."""
        return np.flatnonzero(self.column(column) == split).astype(np.int64)

    def labels(self, column: str, label_dict: dict[str, int] | None, silent: list[str] | None = None) -> np.ndarray:
        """Class ids (int64) of all cells, -100 where missing or silent; with no dictionary, float32 values, nan where missing."""
        values = self.column(column)
        if label_dict is None:
            return np.array([np.nan if _missing(value) else float(value) for value in values], dtype=np.float32)
        names = {name: -100 if silent and name in silent else index for name, index in label_dict.items()}
        texts = [None if _missing(value) else str(value) for value in values]
        unknown = sorted(
            {text for text in texts if text is not None and text not in names and text not in (silent or [])}
        )
        if unknown:
            raise DataError(
                f"{self.path}: obs['{column}'] holds labels that the label dictionary does not know: {', '.join(unknown[:10])}; "
                "extend label_dict.json by appending them with the next free ids, or rebuild it by preprocessing anew"
            )
        return np.array([-100 if text is None else names.get(text, -100) for text in texts], dtype=np.int64)


def keys_of(names: Iterable[str]) -> np.ndarray:
    """int64 checksums (CRC-32) of cell names; two cells that share one only share their random draws."""
    return np.fromiter((zlib.crc32(str(name).encode()) for name in names), dtype=np.int64)


def _missing(value) -> bool:
    return value is None or (isinstance(value, float) and np.isnan(value)) or value in ("nan", "")


def _matrix(file, name: str, path: Path) -> CSRArrays:
    import h5py

    group = file.get(name)
    kind = group.attrs.get("encoding-type", "") if isinstance(group, h5py.Group) else "array"
    if kind != "csr_matrix":
        raise DataError(
            f"{path}: {name} is stored as {kind or 'an unknown encoding'}, a processed file has CSR; make it with `bmfm preprocess`"
        )
    shape = tuple(int(size) for size in group.attrs["shape"])
    return CSRArrays(*(_mapped(group[part], path) for part in ("data", "indices", "indptr")), shape)


def _mapped(dataset, path: Path) -> np.ndarray:
    offset = dataset.id.get_offset()
    if offset is None or dataset.chunks is not None or dataset.size == 0:
        return dataset[:]
    return np.memmap(path, dtype=dataset.dtype, mode="r", offset=offset, shape=dataset.shape)


def _index(group) -> np.ndarray:
    name = group.attrs.get("_index", "_index")
    return _column(group[name])


def _column(node) -> np.ndarray:
    import h5py

    if isinstance(node, h5py.Group):
        if "categories" in node:
            codes = node["codes"][:]
            categories = _column(node["categories"])
            values = np.empty(len(codes), dtype=object)
            known = codes >= 0
            values[known] = categories[codes[known]]
            values[~known] = np.nan
            return values
        values = node["values"]  # nullable arrays
        filled = (values.asstr()[:] if h5py.check_string_dtype(values.dtype) else values[:]).astype(object)
        filled[node["mask"][:].astype(bool)] = np.nan
        return filled
    if h5py.check_string_dtype(node.dtype) is not None:
        return np.asarray(node.asstr()[:], dtype=object)
    return node[:].astype(object)
