"""The processed file: a standard h5ad whose arrays lie contiguous and uncompressed, so that training memory-maps them."""

import contextlib
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import sparse

from bmfm_pipeline.storage import check_room


def smallest_integer(peak: float) -> np.dtype:
    """The smallest unsigned integer type that holds values up to `peak` exactly."""
    for kind in (np.uint8, np.uint16, np.uint32):
        if peak <= np.iinfo(kind).max:
            return np.dtype(kind)
    return np.dtype(np.uint64)


class ProcessedWriter:
    """Writes obs, var and CSR matrices whose sizes are known: preallocated, then filled block by block in row order.

    Indices are int32 and sorted within rows, indptr is int64. anndata and scanpy open the result.
    """

    def __init__(self, path: Path, obs: pd.DataFrame, gene_names: list[str], shape: tuple[int, int]):
        self.path, self.obs, self.gene_names, self.shape = Path(path), obs, gene_names, shape
        self._position: dict[str, int] = {}

    def __enter__(self) -> "ProcessedWriter":
        import h5py
        from anndata.io import write_elem

        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = h5py.File(self.path, "w")
        self._file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        obs = self.obs.copy()
        for name in obs.columns:  # text columns as categories: smaller, and what scanpy expects of labels
            if obs[name].dtype == object:
                obs[name] = obs[name].map(lambda value: value if pd.isna(value) else str(value)).astype("category")
        write_elem(self._file, "obs", obs)
        write_elem(self._file, "var", pd.DataFrame(index=pd.Index(self.gene_names, dtype=object)))
        for name in ("uns", "obsm", "varm", "obsp", "varp", "layers"):
            write_elem(self._file, name, {})
        return self

    def matrix(self, name: str, lengths: np.ndarray, dtype: np.dtype) -> None:
        """Preallocate the CSR matrix `name` with `lengths` stored values per row."""
        check_room(
            self.path.parent, int(np.sum(lengths, dtype=np.int64)) * (np.dtype(dtype).itemsize + 4) + 8 * len(lengths)
        )
        group = self._file.create_group(name)
        group.attrs.update(
            {"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": np.array(self.shape, dtype=np.int64)}
        )
        indptr = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
        group.create_dataset("indptr", data=indptr)
        group.create_dataset("data", shape=(int(indptr[-1]),), dtype=dtype)
        group.create_dataset("indices", shape=(int(indptr[-1]),), dtype=np.int32)
        self._position[name] = 0

    def fill(self, name: str, block: sparse.csr_matrix) -> None:
        """Append the rows of `block`."""
        if not block.nnz:
            return
        if not block.has_sorted_indices:
            block.sort_indices()
        group = self._file[name]
        start = self._position[name]
        group["data"][start : start + block.nnz] = block.data
        group["indices"][start : start + block.nnz] = block.indices
        self._position[name] = start + block.nnz

    def __exit__(self, kind, *error) -> None:
        # When writing failed, closing fails too, with a less telling error.
        with contextlib.suppress(*([OSError, RuntimeError] if kind is not None else [])):
            self._file.flush()
            self._file.close()
