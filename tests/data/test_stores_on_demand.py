"""Many files as one store: few are open at a time, and rows are those of a store that has all open."""

import functools
import os
import pickle

import numpy as np
import pandas as pd
from scipy import sparse

from bmfm_pipeline.data.processed import ProcessedWriter
from bmfm_pipeline.data.stores import on_demand
from bmfm_pipeline.data.stores.h5ad import CellStore
from bmfm_pipeline.data.stores.joined import JoinedStore
from bmfm_pipeline.data.stores.opening import open_store


def _write(path, number: int) -> None:
    generator = np.random.default_rng(number)
    genes = [f"G{gene}" for gene in generator.permutation(12)[:8]]
    cells = sparse.random(6, 8, 0.5, "csr", random_state=generator).astype(np.float32)
    obs = pd.DataFrame({"kind": ["a", "b"] * 3}, index=[f"{number}-{row}" for row in range(6)])
    with ProcessedWriter(path, obs, genes, cells.shape) as writer:
        writer.matrix("X", np.diff(cells.indptr), cells.data.dtype)
        writer.fill("X", cells)


def test_rows_are_the_same_and_few_files_stay_open(tmp_path, monkeypatch):
    monkeypatch.setattr(on_demand, "MOST_OPEN", 3)
    monkeypatch.setattr(on_demand, "_opened", functools.lru_cache(maxsize=3)(CellStore))
    paths = [tmp_path / f"{number}.h5ad" for number in range(20)]
    for number, path in enumerate(paths):
        _write(path, number)
    before = len(os.listdir("/proc/self/fd"))
    store = open_store(paths)
    rows = np.random.default_rng(0).permutation(store.n_cells)
    found = store.rows(rows)
    # One mapped file may hold three descriptors; twenty would hold sixty.
    assert len(os.listdir("/proc/self/fd")) - before <= 9
    whole = JoinedStore([CellStore(path) for path in paths])
    assert store.var_names == whole.var_names and (store.obs_names == whole.obs_names).all()
    assert (found != whole.rows(rows)).nnz == 0
    assert (store.row_sizes == whole.row_sizes).all() and (store.column("kind") == whole.column("kind")).all()
    again = pickle.loads(pickle.dumps(store))
    assert (again.rows(rows[:5]) != found[:5]).nnz == 0
