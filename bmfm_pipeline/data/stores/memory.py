"""Cells that lie in memory: for small data, prediction, and code that makes its cells itself."""

from collections.abc import Sequence

import numpy as np

from bmfm_pipeline.data.stores.base import ContiguousStore
from bmfm_pipeline.data.stores.matrices import normalised
from bmfm_pipeline.errors import DataError


class MemoryStore(ContiguousStore):
    """A store over arrays. Unsorted indices and entries that name one place twice are put in order, in a copy.

    matrix, counts: scipy sparse or dense (cells, genes). obs: a pandas DataFrame with a row per cell, in order; its index is not
    read. Raises DataError when sizes do not fit.
    """

    def __init__(self, matrix, obs_names: Sequence[str], var_names: Sequence[str], *, obs=None, counts=None):
        self.name = "cells in memory"
        self.matrix = normalised(matrix, "matrix")
        self.counts = None if counts is None else normalised(counts, "counts")
        self._obs_names = np.asarray([str(name) for name in obs_names], dtype=object)
        self._var_names = [str(name) for name in var_names]
        found = {"obs_names": len(self._obs_names), "obs": self.n_cells if obs is None else len(obs)}
        for what, size in found.items():
            if size != self.n_cells:
                raise DataError(f"{what} has {size} entries, the matrix {self.n_cells} rows")
        if len(self._var_names) != self.n_genes:
            raise DataError(f"var_names has {len(self._var_names)} entries, the matrix {self.n_genes} columns")
        if self.counts is not None and self.counts.shape != self.shape:
            raise DataError(f"counts are {self.counts.shape}, the matrix {self.shape}: cells x genes must be the same")
        self._obs = obs

    @classmethod
    def from_anndata(cls, adata, counts: str | None = "counts") -> "MemoryStore":
        """X of an AnnData, and its layer `counts` where there is one."""
        layer = adata.layers[counts] if counts is not None and counts in adata.layers else None
        return cls(adata.X, adata.obs_names, adata.var_names, obs=adata.obs, counts=layer)

    @property
    def obs_names(self) -> np.ndarray:
        return self._obs_names

    @property
    def obs_columns(self) -> list[str]:
        return [] if self._obs is None else [str(name) for name in self._obs.columns]

    @property
    def obs(self):
        if self._obs is None:
            import pandas as pd

            self._obs = pd.DataFrame(index=pd.Index(self._obs_names, dtype=object))
        return self._obs

    def _read_column(self, name: str) -> np.ndarray:
        values = self._obs[name].astype(object).to_numpy(dtype=object, copy=True)
        values[self._obs[name].isna().to_numpy()] = np.nan
        return values
