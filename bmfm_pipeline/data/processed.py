"""The processed file: a standard h5ad whose arrays lie contiguous and uncompressed, so that training memory-maps them."""

import contextlib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import sparse

from bmfm_pipeline.data.stores.matrices import is_ascending
from bmfm_pipeline.errors import DataError
from bmfm_pipeline.storage import check_room


def smallest_integer(peak: float) -> np.dtype:
    """The smallest unsigned integer type that holds values up to `peak` exactly."""
    for kind in (np.uint8, np.uint16, np.uint32):
        if peak <= np.iinfo(kind).max:
            return np.dtype(kind)
    return np.dtype(np.uint64)


def smallest_exact(data: np.ndarray) -> np.ndarray:
    """`data` in the smallest unsigned integer type that holds every value exactly; float32 where a value is no whole number or negative."""
    if not len(data):
        return data.astype(np.uint8)
    low, peak = data.min(), data.max()
    if low >= 0 and peak < 2**64:  # false for NaN
        whole = data.astype(smallest_integer(float(peak)))
        if (whole == data).all():
            return whole
    return data.astype(np.float32, copy=False)


@dataclass
class SpooledMatrix:
    """A CSR matrix of which the number of rows and values is known once its last block was added."""

    indices: list[tuple] = field(default_factory=list)
    data: list[tuple] = field(default_factory=list)
    lengths: list[np.ndarray] = field(default_factory=list)

    @property
    def dtype(self) -> np.dtype:
        """The smallest type that holds every value exactly."""
        return max((kind for _, _, kind in self.data), key=_width, default=np.dtype(np.uint8))


def _width(kind: np.dtype) -> int:
    return kind.itemsize + 8 * (kind.kind == "f")


class Spool:
    """Blocks of CSR rows in a file in `folder`, until their sizes are known: nothing is computed twice.

    Without a `name` the file goes when it is closed, or with the process; with one it is kept, for another process to open.
    """

    def __init__(self, folder: Path, name: str | None = None):
        folder.mkdir(parents=True, exist_ok=True)
        if name is None:
            self._file = tempfile.TemporaryFile(dir=folder, prefix=".rows-")  # noqa: SIM115  closed by __exit__
        else:
            self._file = open(folder / name, "w+b")  # noqa: SIM115  closed by __exit__
        self._end = 0

    @classmethod
    def opened(cls, path: Path) -> "Spool":
        """A file that is complete, to read."""
        spool = cls.__new__(cls)
        spool._file = open(path, "rb")  # noqa: SIM115  closed by __exit__
        return spool

    def __enter__(self) -> "Spool":
        return self

    def __exit__(self, *error) -> None:
        with contextlib.suppress(OSError):
            self._file.close()

    def add(self, matrix: SpooledMatrix, block: sparse.csr_matrix, like: SpooledMatrix | None = None) -> None:
        """Append the rows of `block`; with `like` its indices are those that `like` just got."""
        if like is None and not block.has_sorted_indices:
            block.sort_indices()
        matrix.indices.append(
            like.indices[-1] if like is not None else self._put(block.indices.astype(np.int32, copy=False))
        )
        matrix.data.append(self._put(smallest_exact(block.data)))
        matrix.lengths.append(np.diff(block.indptr).astype(np.int32))

    def _put(self, array: np.ndarray) -> tuple[int, int, np.dtype]:
        self._file.write(np.ascontiguousarray(array))
        place = (self._end, len(array), array.dtype)
        self._end += array.nbytes
        return place

    def get(self, place: tuple[int, int, np.dtype]) -> np.ndarray:
        offset, size, kind = place
        self._file.seek(offset)
        return np.fromfile(self._file, dtype=kind, count=size)


class ProcessedWriter:
    """Writes obs, var and CSR matrices whose sizes are known: preallocated, then filled block by block in row order.

    Indices are int32 and sorted within rows (a gene named twice in one is a DataError), indptr is int64. anndata and scanpy open the result.
    """

    def __init__(self, path: Path, obs: pd.DataFrame, gene_names: list[str], shape: tuple[int, int]):
        self.path, self.obs, self.gene_names, self.shape = Path(path), obs, gene_names, shape
        self._position: dict[str, int] = {}

    def __enter__(self) -> "ProcessedWriter":
        import h5py
        from anndata.io import write_elem

        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = h5py.File(self.path, "w")
        self.file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        obs = self.obs.copy()
        for name in obs.columns:  # text columns as categories: smaller, and what scanpy expects of labels
            if obs[name].dtype == object:
                obs[name] = obs[name].map(lambda value: value if pd.isna(value) else str(value)).astype("category")
        write_elem(self.file, "obs", obs)
        write_elem(self.file, "var", pd.DataFrame(index=pd.Index(self.gene_names, dtype=object)))
        for name in ("uns", "obsm", "varm", "obsp", "varp", "layers"):
            write_elem(self.file, name, {})
        return self

    def matrix(self, name: str, lengths: np.ndarray, dtype: np.dtype, like: str | None = None) -> None:
        """Preallocate the CSR matrix `name` with `lengths` stored values per row; `like` names a matrix that stores values at the same places.

        Its indices and indptr are then stored once and linked, which readers do not notice.
        """
        index_bytes = 0 if like else 4
        check_room(
            self.path.parent,
            int(np.sum(lengths, dtype=np.int64)) * (np.dtype(dtype).itemsize + index_bytes) + 8 * len(lengths),
        )
        group = self.file.create_group(name)
        group.attrs.update(
            {"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": np.array(self.shape, dtype=np.int64)}
        )
        indptr = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
        group.create_dataset("data", shape=(int(indptr[-1]),), dtype=dtype)
        if like:
            group["indices"], group["indptr"] = self.file[like]["indices"], self.file[like]["indptr"]
        else:
            group.create_dataset("indptr", data=indptr)
            group.create_dataset("indices", shape=(int(indptr[-1]),), dtype=np.int32)
        self._position[name] = 0

    def copy(self, name: str, parts: Sequence[tuple[Spool, SpooledMatrix]], like: str | None = None) -> None:
        """Write a matrix that lies in `parts`, one below the other, as `name`: one kind of array after the other, block by block."""
        lengths = [some for _, matrix in parts for some in matrix.lengths]
        kind = max((matrix.dtype for _, matrix in parts), key=_width)
        self.matrix(name, np.concatenate(lengths) if lengths else np.array([], dtype=np.int64), kind, like)
        for array in ("data",) if like else ("data", "indices"):
            target, start = self.file[name][array], 0
            for spool, matrix in parts:
                for place in getattr(matrix, array):
                    if place[1]:
                        target[start : start + place[1]] = spool.get(place).astype(target.dtype, copy=False)
                    start += place[1]

    def fill(self, name: str, block: sparse.csr_matrix) -> None:
        """Append the rows of `block`."""
        if not block.nnz:
            return
        if not block.has_sorted_indices:
            block.sort_indices()
        if not is_ascending(block.indptr, block.indices):
            raise DataError(
                f"{self.path}: a cell names the same gene twice in {name}; sum such entries first (`matrix.sum_duplicates()`)"
            )
        group = self.file[name]
        start = self._position[name]
        group["data"][start : start + block.nnz] = block.data
        group["indices"][start : start + block.nnz] = block.indices
        self._position[name] = start + block.nnz

    def __exit__(self, kind, *error) -> None:
        # When writing failed, closing fails too, with a less telling error.
        with contextlib.suppress(*([OSError, RuntimeError] if kind is not None else [])):
            self.file.flush()
            self.file.close()
