"""Cells of any store as a zarr folder whose chunks suit random rows; anndata's own are hundreds of times larger than a row."""

import warnings
from itertools import pairwise
from pathlib import Path

import numpy as np

from bmfm_pipeline.data.stores.base import LOG_VALUES, BaseStore
from bmfm_pipeline.data.stores.matrices import Matrix, running_sizes
from bmfm_pipeline.errors import StorageError
from bmfm_pipeline.storage import disk_errors, local_path

VALUES_PER_CHUNK = 8192
_VALUES_AT_ONCE = 1 << 22


def write_zarr(
    store: BaseStore, target: str | Path, values_per_chunk: int = VALUES_PER_CHUNK, chunks_per_file: int | None = None
) -> Path:
    """Write values, counts, obs and gene names of `store` to the local folder `target`, which anndata and `open_store` read.

    chunks_per_file: put so many chunks into one file (zarr's shards), for data sets whose files would be too many; reading a chunk
    then takes one more request. Raises StorageError when `target` exists.
    """
    import pandas as pd
    import zarr
    from anndata.io import write_elem

    target = local_path(target)
    if target.exists():
        raise StorageError(f"{target}: exists and is not overwritten; remove it or name another folder")
    with disk_errors(target):
        partial = target.with_name(f".{target.name}.part")
        group = zarr.open_group(str(partial), mode="w", zarr_format=3)
        group.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        write_elem(group, "obs", store.obs)
        write_elem(group, "var", pd.DataFrame(index=pd.Index(store.var_names, dtype=object)))
        for name in ("uns", "obsm", "varm", "obsp", "varp", "layers"):
            write_elem(group, name, {})
        for name, matrix in (("X", store.matrix), ("layers/counts", store.counts), (LOG_VALUES, store.log_values)):
            if matrix is not None:
                _write_matrix(group.create_group(name), matrix, values_per_chunk, chunks_per_file)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that zarr 3 has yet to standardise what anndata and this room read
            zarr.consolidate_metadata(str(partial))
        partial.rename(target)
    return target


def _write_matrix(group, matrix: Matrix, chunk: int, per_file: int | None) -> None:
    """Copy block by block of rows; sizes are counted first, for a store's `row_sizes` may be upper bounds."""
    group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": list(matrix.shape)})
    blocks = list(pairwise([0, *_row_blocks(matrix.row_sizes)]))
    indptr = running_sizes(np.concatenate([np.zeros(0, np.int64), *(_sizes(matrix, *block) for block in blocks)]))
    group.create_array("indptr", data=indptr)
    layout = {"shape": (int(indptr[-1]),), "chunks": (chunk,), "shards": (chunk * per_file,) if per_file else None}
    data = _Appending(group.create_array("data", dtype=matrix.dtype, **layout), chunk * (per_file or 1))
    indices = _Appending(group.create_array("indices", dtype=np.int32, **layout), chunk * (per_file or 1))
    for first, last in blocks:
        _, columns, values = matrix.gather(np.arange(first, last))
        data.add(values)
        indices.add(columns)
    data.finish()
    indices.finish()


def _sizes(matrix: Matrix, first: int, last: int) -> np.ndarray:
    if matrix.contiguous:
        return matrix.row_sizes[first:last]
    return np.diff(matrix.gather(np.arange(first, last))[0])


class _Appending:
    """Writes an array whole files at a time: writing a part of a file reads it back first."""

    def __init__(self, array, block: int):
        self.array, self.block = array, block
        self._waiting, self._written = np.zeros(0, array.dtype), 0

    def add(self, values: np.ndarray) -> None:
        self._waiting = np.concatenate([self._waiting, values])
        self._write(len(self._waiting) // self.block * self.block)

    def finish(self) -> None:
        self._write(len(self._waiting))

    def _write(self, size: int) -> None:
        if size:
            self.array[self._written : self._written + size] = self._waiting[:size]
            self._waiting, self._written = self._waiting[size:], self._written + size


def _row_blocks(sizes: np.ndarray) -> list[int]:
    """Ends of blocks of rows with about four million values each."""
    ends = running_sizes(sizes)
    wanted = np.arange(_VALUES_AT_ONCE, int(ends[-1]) + _VALUES_AT_ONCE, _VALUES_AT_ONCE)
    found = np.searchsorted(ends, wanted, side="left")
    return sorted({*np.clip(found, 1, len(sizes)).tolist(), len(sizes)} - {0}) if len(sizes) else []
