"""h5ad files as a stream of rows: CSR, CSC or dense, compressed or not; X, a layer, or .raw. Never loaded whole."""

import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from bmfm_pipeline.data.sources.tables import read_index, read_table, table_length, text
from bmfm_pipeline.errors import DataError

# Stored values held at a time: 4 MB of CSR arrays, which stay in the processor's caches.
VALUES_PER_CHUNK = 500_000
# Largest HDF5 chunk that is kept unpacked while it is read in parts, in bytes.
_LARGEST_CHUNK = 256 << 20
DUPLICATE_GENES = ("refuse", "sum", "first")


def _stamp(path: Path) -> tuple[int, int, int]:
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


class CellSource:
    """One matrix of an h5ad file (cells x genes) with its obs and var tables, read in row chunks.

    `layer` is None for X, "raw" for .raw, or the name of a layer. A column-major matrix is turned into rows once, in a file in
    the folder `scratch` (null: a temporary one that goes with this object). `duplicate_genes` merges columns of one name: "sum"
    adds their values, "first" keeps the first column; "refuse" leaves them, for the check to report.
    Raises DataError when the file is missing, is no h5ad, has no such layer, or changes while it is being read.
    """

    first_row = 0  # the number of the first cell in its chunks
    cell_names_cure = "make them unique, e.g. adata.obs_names_make_unique()"

    def __init__(
        self,
        path: str | Path,
        layer: str | None = None,
        duplicate_genes: str = "refuse",
        scratch: str | Path | None = None,
    ):
        import h5py

        self.path = Path(path)
        self.layer = layer
        self._scratch = scratch
        self._rows = None
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
        # Before anndata 0.7 the parts of .raw were called raw.X and raw.var.
        self._raw = "raw.X" if "raw.X" in file else "raw/X"
        self.has_raw = self._raw in file
        self.unused = [name for name in ("obsm", "varm", "obsp", "varp") if name in file and len(file[name])]
        self.matrix_name = self._find_matrix()
        self._var_group = self._raw.replace("X", "var") if self.layer == "raw" else "var"
        node = file[self.matrix_name]
        if isinstance(node, h5py.Group):
            kind = node.attrs.get("encoding-type") or f"{text(node.attrs.get('h5sparse_format', ''))}_matrix"
            if kind not in ("csr_matrix", "csc_matrix"):
                raise DataError(
                    f"{self.path}: {self.matrix_name} is stored as '{kind}'; CSR, CSC and dense matrices are read"
                )
            self.encoding = kind[:3]
            shape = node.attrs.get("shape", node.attrs.get("h5sparse_shape"))
            self.n_stored = int(node["data"].shape[0])
            parts = [node["data"], node["indices"]]
        else:
            if node.ndim != 2:
                raise DataError(f"{self.path}: {self.matrix_name} has {node.ndim} dimensions; cells x genes are needed")
            self.encoding, shape, self.n_stored = "dense", node.shape, int(node.size)
            parts = [node]
        chunks = [int(np.prod(part.chunks)) * part.dtype.itemsize for part in parts if part.chunks]
        # HDF5 keeps no chunk larger than its cache and would unpack it again for every part that is read.
        self._cache = min(max([1 << 20, *(2 * size for size in chunks)]), _LARGEST_CHUNK)
        self.n_cells, self._n_columns = (int(size) for size in shape)
        n_columns = table_length(self.path, file, self._var_group)
        n_rows = table_length(self.path, file, "obs")
        if n_columns != self._n_columns or n_rows != self.n_cells:
            transposed = (n_rows, n_columns) == (self._n_columns, self.n_cells)
            cure = "the matrix is transposed: rows must be cells" if transposed else "the file is damaged"
            raise DataError(
                f"{self.path}: {self.matrix_name} is {self.n_cells} x {self._n_columns}, but obs has {n_rows} rows and "
                f"{self._var_group} {n_columns}; {cure}"
            )

    def _find_matrix(self) -> str:
        if self.layer is None:
            return "X"
        if self.layer == "raw":
            if not self.has_raw:
                raise DataError(f"{self.path}: has no .raw; layers: {', '.join(self.layers) or 'none'}")
            return self._raw
        if self.layer not in self.layers:
            also = " and 'raw'" if self.has_raw else ""
            raise DataError(
                f"{self.path}: has no layer '{self.layer}'; layers: {', '.join(self.layers) or 'none'}{also}"
            )
        return f"layers/{self.layer}"

    @cached_property
    def obs(self):
        """The obs table (pandas DataFrame, one row per cell)."""
        return self._read("obs", read_table)

    @cached_property
    def var(self):
        """The var table of the columns as they are read (after merging duplicates)."""
        table = self._read(self._var_group, read_table)
        return table if self._merged is None else table.iloc[self._merged[1]]

    @cached_property
    def obs_names(self) -> np.ndarray:
        """Cell names, object array of str."""
        return self._read("obs", read_index)

    @cached_property
    def _column_names(self) -> np.ndarray:
        return self._read(self._var_group, read_index)

    def _read(self, name: str, how):
        import h5py

        try:
            with h5py.File(self.path, "r") as file:
                return how(self.path, file, name)
        except OSError as error:
            raise self._cut_short(error) from None

    def _cut_short(self, error: OSError) -> DataError:
        return DataError(f"{self.path}: could not be read to its end ({error}); fetch or write it again")

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

    def forget_tables(self) -> None:
        """Let go of tables and names; they are read again when they are asked for."""
        for name in ("obs", "var", "obs_names", "var_names", "_column_names"):
            self.__dict__.pop(name, None)

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

    def iter_chunks(self, rows_per_chunk: int | None = None, first: int = 0) -> Iterator[tuple[int, "object"]]:
        """Yield (first row, scipy CSR float32 with sorted indices and no stored zeros) over all cells in file order.

        A chunk has at most `rows_per_chunk` rows and, unless one row alone has more, about two million stored values. Chunks that begin
        before row `first` are left out and not read; the others are the same whatever `first` is.
        """
        import h5py

        from bmfm_pipeline.data.sources.row_reading import read_rows

        self.verify_unchanged()
        try:
            with h5py.File(self.path, "r", rdcc_nbytes=self._cache) as file:
                for start, chunk in read_rows(self, file[self.matrix_name], rows_per_chunk, first):
                    yield start, self._clean(chunk)
        except OSError as error:
            raise self._cut_short(error) from None
        self.verify_unchanged()

    def first_rows(self, n_rows: int):
        """Up to `n_rows` first cells, as `iter_chunks` gives them, without turning a column-major file into rows."""
        import h5py
        from scipy import sparse

        from bmfm_pipeline.data.sources.transposition import first_rows

        if self.encoding == "csc":
            with h5py.File(self.path, "r", rdcc_nbytes=self._cache) as file:
                return self._clean(first_rows(self, file[self.matrix_name], n_rows))
        if self.n_cells == 0:
            return sparse.csr_matrix((0, self.n_genes), dtype=np.float32)
        return next(self.iter_chunks(n_rows))[1]

    def row_file(self, node):
        """The rows of the open column-major matrix `node`, made when first asked for."""
        from bmfm_pipeline.data.sources.transposition import transpose

        if self._rows is None or not self._rows.path.exists():
            folder = self._scratch
            if folder is None:
                folder = tempfile.mkdtemp(prefix="bmfm-rows-")
                weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
            self._rows = transpose(self, node, Path(folder))
        return self._rows

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


def open_source(
    path: str | Path, layer: str | None = None, duplicate_genes: str = "refuse", scratch: str | Path | None = None
) -> CellSource:
    """Open an h5ad file for reading row by row; see CellSource."""
    return CellSource(path, layer, duplicate_genes, scratch)
