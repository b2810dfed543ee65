"""CellStore: the rows of a processed h5ad by number, memory-mapped, shared between workers."""

from functools import cached_property
from pathlib import Path

import numpy as np

from bmfm_pipeline.data.stores.base import LOG_VALUES, ContiguousStore
from bmfm_pipeline.data.stores.columns import index_of, read_column
from bmfm_pipeline.data.stores.matrices import CSRArrays, mapped
from bmfm_pipeline.data.stores.sequences import GROUP as SEQUENCES
from bmfm_pipeline.data.stores.sequences import SequenceArrays
from bmfm_pipeline.errors import DataError


class CellStore(ContiguousStore):
    """Opens a processed h5ad (CSR, contiguous, uncompressed) without loading it; falls back to reading when it is chunked.

    `matrix` is X, and `data`, `indices`, `indptr` are its arrays; `counts` and `log_values` those of layers["counts"] and
    layers["log_normalised"], or None; `sequences` the nucleotides and tokens of a file of sequences, or None. Pickles as its path.
    """

    def __init__(self, path: str | Path):
        import h5py

        self.path = Path(path)
        self.name = str(self.path)
        try:
            file = h5py.File(self.path, "r")
        except FileNotFoundError:
            raise DataError(f"{self.path}: no such file; make it with `bmfm preprocess`") from None
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read as h5ad ({error}); make it with `bmfm preprocess`") from None
        with file:
            self.matrix = _matrix(file, "X", self.path)
            self.counts = _matrix(file, "layers/counts", self.path) if "layers/counts" in file else None
            self.log_values = _matrix(file, LOG_VALUES, self.path) if LOG_VALUES in file else None
            self.sequences = SequenceArrays(self.path) if SEQUENCES in file else None
            self._var_names = index_of(file["var"]).tolist()
            self._obs_columns = [str(name) for name in file["obs"].attrs.get("column-order", [])]

    def __reduce__(self):
        return CellStore, (self.path,)

    @cached_property
    def obs_names(self) -> np.ndarray:
        import h5py

        with h5py.File(self.path, "r") as file:
            return index_of(file["obs"])

    @property
    def obs_columns(self) -> list[str]:
        return self._obs_columns

    @cached_property
    def obs(self):
        import h5py
        from anndata.io import read_elem

        with h5py.File(self.path, "r") as file:
            return read_elem(file["obs"])

    def _read_column(self, name: str) -> np.ndarray:
        import h5py

        with h5py.File(self.path, "r") as file:
            return read_column(file["obs"][name])


def _matrix(file, name: str, path: Path) -> CSRArrays:
    import h5py

    group = file.get(name)
    kind = group.attrs.get("encoding-type", "") if isinstance(group, h5py.Group) else "array"
    if kind != "csr_matrix":
        raise DataError(
            f"{path}: {name} is stored as {kind or 'an unknown encoding'}, a processed file has CSR; make it with `bmfm preprocess`"
        )
    shape = tuple(int(size) for size in group.attrs["shape"])
    return CSRArrays(*(mapped(group[part], path) for part in ("data", "indices", "indptr")), shape)
