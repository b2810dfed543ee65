"""h5ad files as a stream of rows: CSR, CSC or dense, compressed or not; X, a layer, or .raw. Never loaded whole."""

import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from bmfm_pipeline.errors import DataError

# Stored values held at a time; about 24 MB of CSR arrays.
VALUES_PER_CHUNK = 2_000_000
# Stored values of one row block gathered from a column-major file per scan of that file.
VALUES_PER_SCAN = 16_000_000
DUPLICATE_GENES = ("refuse", "sum", "first")


def _stamp(path: Path) -> tuple[int, int, int]:
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


class CellSource:
    """One matrix of an h5ad file (cells x genes) with its obs and var tables, read in row chunks.

    `layer` is None for X, "raw" for .raw, or the name of a layer. `duplicate_genes` merges columns of one name: "sum"
    adds their values, "first" keeps the first column; "refuse" leaves them, for the check to report.
    Raises DataError when the file is missing, is no h5ad, has no such layer, or changes while it is being read.
    """

    def __init__(self, path: str | Path, layer: str | None = None, duplicate_genes: str = "refuse"):
        import h5py

        self.path = Path(path)
        self.layer = layer
        if duplicate_genes not in DUPLICATE_GENES:
            raise DataError(f"duplicate_genes: must be one of {', '.join(DUPLICATE_GENES)}; found {duplicate_genes!r}")
        self.duplicate_genes = duplicate_genes
        if not self.path.exists():
            raise DataError(f"{self.path}: no such file; name an existing h5ad file")
        if self.path.is_dir():
            raise DataError(f"{self.path}: is a folder; name the h5ad file itself")
        self._stamp = _stamp(self.path)
        try:
            with h5py.File(self.path, "r") as file:
                self._describe(file)
        except OSError as error:
            raise DataError(
                f"{self.path}: is not a readable h5ad (HDF5) file, or is cut short ({error}); "
                "write it with anndata's `adata.write_h5ad(...)`, or fetch it again"
            ) from None

    def _describe(self, file) -> None:
        import h5py

        absent = [name for name in ("obs", "var") if name not in file]
        if "X" not in file and self.layer is None:
            absent.insert(0, "X")
        if absent:
            raise DataError(
                f"{self.path}: is HDF5 but not an h5ad: it has no {', '.join(absent)} (it has {', '.join(file) or 'nothing'}); "
                "write it with anndata's `adata.write_h5ad(...)`"
            )
        self.layers = [*file["layers"]] if "layers" in file else []
        self.has_raw = "raw" in file and "X" in file["raw"]
        self.unused = [name for name in ("obsm", "varm", "obsp", "varp") if name in file and len(file[name])]
        self.matrix_name = self._find_matrix()
        self._var_group = "raw/var" if self.layer == "raw" else "var"
        node = file[self.matrix_name]
        if isinstance(node, h5py.Group):
            kind = node.attrs.get("encoding-type") or f"{_text(node.attrs.get('h5sparse_format', ''))}_matrix"
            if kind not in ("csr_matrix", "csc_matrix"):
                raise DataError(
                    f"{self.path}: {self.matrix_name} is stored as '{kind}'; CSR, CSC and dense matrices are read"
                )
            self.encoding = kind[:3]
            shape = node.attrs.get("shape", node.attrs.get("h5sparse_shape"))
            self.n_stored = int(node["data"].shape[0])
        else:
            if node.ndim != 2:
                raise DataError(f"{self.path}: {self.matrix_name} has {node.ndim} dimensions; cells x genes are needed")
            self.encoding, shape, self.n_stored = "dense", node.shape, int(node.size)
        self.n_cells, self._n_columns = (int(size) for size in shape)
        if len(self._column_names) != self._n_columns:
            raise DataError(
                f"{self.path}: {self.matrix_name} has {self._n_columns} columns but {self._var_group} has {len(self._column_names)} names"
            )
        if len(self.obs_names) != self.n_cells:
            raise DataError(
                f"{self.path}: {self.matrix_name} has {self.n_cells} rows but obs has {len(self.obs_names)} names"
            )

    def _find_matrix(self) -> str:
        if self.layer is None:
            return "X"
        if self.layer == "raw":
            if not self.has_raw:
                raise DataError(f"{self.path}: has no .raw; layers: {', '.join(self.layers) or 'none'}")
            return "raw/X"
        if self.layer not in self.layers:
            also = " and 'raw'" if self.has_raw else ""
            raise DataError(
                f"{self.path}: has no layer '{self.layer}'; layers: {', '.join(self.layers) or 'none'}{also}"
            )
        return f"layers/{self.layer}"

    @cached_property
    def obs(self):
        """The obs table (pandas DataFrame, one row per cell)."""
        table = self._read_table("obs")
        table.index = table.index.astype(str)
        return table

    @cached_property
    def var(self):
        """The var table of the columns as they are read (after merging duplicates)."""
        table = self._read_table(self._var_group)
        table.index = table.index.astype(str)
        return table if self._merged is None else table.iloc[self._merged[1]]

    def _read_table(self, name: str):
        import h5py
        import pandas as pd
        from anndata.io import read_elem

        with h5py.File(self.path, "r") as file:
            if isinstance(file[name], h5py.Dataset):
                raise DataError(
                    f"{self.path}: {name} is stored in the format of anndata before 0.7; open it with anndata and write it again"
                )
            table = read_elem(file[name])
        if not isinstance(table, pd.DataFrame):
            raise DataError(f"{self.path}: {name} is not a table")
        return table

    @cached_property
    def obs_names(self) -> np.ndarray:
        """Cell names, object array of str."""
        return self._read_index("obs")

    @cached_property
    def _column_names(self) -> np.ndarray:
        return self._read_index(self._var_group)

    def _read_index(self, name: str) -> np.ndarray:
        import h5py

        with h5py.File(self.path, "r") as file:
            node = file[name]
            if isinstance(node, h5py.Dataset) or _text(node.attrs.get("_index", "")) not in node:
                return np.asarray(self._read_table(name).index.astype(str), dtype=object)
            index = node[_text(node.attrs["_index"])]
            if isinstance(index, h5py.Dataset) and h5py.check_string_dtype(index.dtype) is not None:
                return np.asarray(index.asstr()[:], dtype=object)
        return np.asarray(self._read_table(name).index.astype(str), dtype=object)

    @cached_property
    def _merged(self) -> tuple[np.ndarray, np.ndarray] | None:
        """(target column of each stored column or -1, stored column kept for each target), or None when names are unique."""
        import pandas as pd

        if self.duplicate_genes == "refuse":
            return None
        codes, _ = pd.factorize(self._column_names)
        _, first = np.unique(codes, return_index=True)
        if len(first) == len(codes):
            return None
        target = codes.astype(np.int32)
        if self.duplicate_genes == "first":
            repeated = np.ones(len(codes), dtype=bool)
            repeated[first] = False
            target[repeated] = -1
        return target, first

    @cached_property
    def var_names(self) -> list[str]:
        """Gene names of the columns as they are read (after merging duplicates)."""
        return (self._column_names if self._merged is None else self._column_names[self._merged[1]]).tolist()

    @property
    def where(self) -> str:
        """The matrix as it is called in messages: X, layers/NAME or raw/X."""
        return self.matrix_name

    @property
    def shape(self) -> tuple[int, int]:
        return self.n_cells, self.n_genes

    @property
    def n_genes(self) -> int:
        return len(self.var_names)

    @property
    def content_hash(self) -> str:
        """sha256 of the file."""
        from bmfm_pipeline.storage import content_hash

        return content_hash(str(self.path))

    def verify_unchanged(self) -> None:
        """Raise DataError when the file is no longer the one that was opened."""
        try:
            same = _stamp(self.path) == self._stamp
        except FileNotFoundError:
            same = False
        if not same:
            raise DataError(
                f"{self.path}: changed while it was being read (size, time or file differ from when it was opened); "
                "nothing was published. Wait until it is complete and run again"
            )

    def iter_chunks(self, rows_per_chunk: int | None = None) -> Iterator[tuple[int, "object"]]:
        """Yield (first row, scipy CSR float32 with sorted indices and no stored zeros) over all cells in file order.

        A chunk has at most `rows_per_chunk` rows and, unless one row alone has more, about two million stored values.
        """
        import h5py

        from bmfm_pipeline.data.sources.row_reading import read_rows

        self.verify_unchanged()
        try:
            with h5py.File(self.path, "r") as file:
                for start, chunk in read_rows(self, file[self.matrix_name], rows_per_chunk):
                    yield start, self._clean(chunk)
        except OSError as error:
            raise DataError(f"{self.path}: could not be read to its end ({error}); fetch or write it again") from None
        self.verify_unchanged()

    def _clean(self, chunk):
        if self._merged is not None:
            from scipy import sparse

            target = self._merged[0]
            columns = target[chunk.indices]
            if self.duplicate_genes == "first":
                kept = columns >= 0
                ends = np.concatenate(([0], np.cumsum(kept)))[chunk.indptr]
                chunk = sparse.csr_matrix((chunk.data[kept], columns[kept], ends), shape=(chunk.shape[0], self.n_genes))
            else:
                chunk = sparse.csr_matrix((chunk.data, columns, chunk.indptr), shape=(chunk.shape[0], self.n_genes))
        chunk.sum_duplicates()
        if not chunk.data.all():
            chunk.eliminate_zeros()
        return chunk


def open_source(path: str | Path, layer: str | None = None, duplicate_genes: str = "refuse") -> CellSource:
    """Open an h5ad file for reading row by row; see CellSource."""
    return CellSource(path, layer, duplicate_genes)


def _text(value) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
