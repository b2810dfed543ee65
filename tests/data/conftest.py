"""Small h5ad files of known content."""

import contextlib
import resource

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse


def counts_of(n_cells: int = 60, n_genes: int = 25, seed: int = 0) -> sparse.csr_matrix:
    """Whole counts, about half of them zero, no empty row or column."""
    random = np.random.default_rng(seed)
    dense = random.poisson(1.0, (n_cells, n_genes)).astype(np.float32)
    dense[:, 0] += 1
    dense[0] += 1
    return sparse.csr_matrix(dense)


@pytest.fixture
def make_h5ad(tmp_path):
    """Write an h5ad: make_h5ad(X=..., obs={...}, genes=[...], cells=[...], layers=..., raw=...) -> path."""

    def make(X=None, obs=None, genes=None, cells=None, layers=None, raw=None, var=None, name="input.h5ad", **write):
        X = counts_of() if X is None else X
        n_cells, n_genes = X.shape
        cells = [f"cell{index}" for index in range(n_cells)] if cells is None else cells
        genes = [f"GENE{index}" for index in range(n_genes)] if genes is None else genes
        obs = {"celltype": [("A", "B", "C")[index % 3] for index in range(n_cells)]} if obs is None else obs
        table = anndata.AnnData(
            X,
            obs=pd.DataFrame(obs, index=pd.Index(cells, dtype=object)),
            var=pd.DataFrame(var or {}, index=pd.Index(genes, dtype=object)),
            layers=layers,
        )
        if raw is not None:
            table.raw = anndata.AnnData(raw, obs=table.obs[[]], var=table.var)
        path = tmp_path / name
        table.write_h5ad(path, **write)
        return path

    return make


@pytest.fixture
def file_size_limit():
    """file_size_limit(bytes): within it no file may grow larger, as on a full disk."""

    @contextlib.contextmanager
    def limited(size: int):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited
