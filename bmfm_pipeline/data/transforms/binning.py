"""Binning of expression values into whole numbers, the last step of most chains."""

import zlib
from typing import Literal

import numpy as np
from pydantic import Field, model_validator
from scipy import sparse

from bmfm_pipeline.data.transforms.steps import Step


class Bin(Step):
    """Whole values from 0; zeros stay zero.

    int_cast rounds up and clips at num_bins - 1 (no num_bins: no clipping). percentile gives each value above zero of a cell the
    percentile interval it lies in, 1 to num_bins. value_binning does so by num_bins quantile edges and draws at random among the
    intervals that a value belongs to when edges coincide; the draw depends on `seed` and on the cell's own values, so a cell
    is binned alike in training and prediction, whatever cells are beside it.
    """

    num_bins: int | None = Field(None, gt=1)
    binning_method: Literal["int_cast", "percentile", "value_binning"] = "percentile"
    seed: int = 0

    @model_validator(mode="after")
    def _needs_bins(self) -> "Bin":
        if self.binning_method != "int_cast" and self.num_bins is None:
            raise ValueError(f"num_bins is needed for binning_method {self.binning_method}")
        return self

    def values(self, chunk: sparse.csr_matrix, names: list[str]) -> sparse.csr_matrix:
        if self.binning_method == "int_cast":
            np.ceil(chunk.data, out=chunk.data)
            if self.num_bins:
                np.minimum(chunk.data, np.float32(self.num_bins - 1), out=chunk.data)
            return chunk
        if self.binning_method == "percentile":
            from bmfm_pipeline.data.kernels import percentile_bins

            percentile_bins(chunk.indptr, chunk.data, np.linspace(0, 100, self.num_bins + 1) / 100)
            return chunk
        for row in range(chunk.shape[0]):
            values = chunk.data[chunk.indptr[row] : chunk.indptr[row + 1]]
            above = values > 0
            if above.any():
                values[above] = self._quantile(values[above])
        return chunk

    def _quantile(self, values: np.ndarray) -> np.ndarray:
        edges = np.quantile(values, np.linspace(0, 1, self.num_bins))
        low, high = np.digitize(values, edges, right=True), np.digitize(values, edges)
        random = np.random.default_rng([self.seed, zlib.crc32(np.ascontiguousarray(values).tobytes())])
        return np.maximum(np.ceil(random.random(len(values)) * (high - low) + low), 1)

    @property
    def n_values(self) -> int | None:
        """How many different values can come out, zero included."""
        if self.num_bins is None:
            return None
        return self.num_bins if self.binning_method == "int_cast" else self.num_bins + 1
