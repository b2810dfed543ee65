"""The processed file opens in anndata and scanpy, lies flat on disk, and CellStore reads it by row without loading it."""

import pickle

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from bmfm_pipeline.data.processed import ProcessedWriter
from bmfm_pipeline.data.sources import open_source
from bmfm_pipeline.data.store import CellStore
from bmfm_pipeline.data.transforms import build_chain
from bmfm_pipeline.errors import DataError

STEPS = [
    {"transform_name": "NormalizeTotalTransform", "transform_args": {"target_sum": 10000.0}},
    {"transform_name": "LogTransform", "transform_args": {"base": 2}},
    {"transform_name": "BinTransform", "transform_args": {"num_bins": 10, "binning_method": "int_cast"}},
]


@pytest.fixture
def processed(make_h5ad, tmp_path):
    random = np.random.default_rng(1)
    counts = sparse.csr_matrix(random.poisson(1, (30, 12)).astype(np.float32))
    counts[0, 0] = 70_000
    obs = {
        "celltype": ["A", "B", None] * 10,
        "age": [float(index) for index in range(29)] + [np.nan],
        "batch": pd.Categorical(["x", "y"] * 15),
    }
    source = open_source(make_h5ad(counts, obs=obs))
    split = np.array(["train"] * 20 + ["dev"] * 4 + ["test"] * 6)
    build_chain(STEPS).run(source, None, tmp_path / "processed.h5ad", {"split": split})
    return tmp_path / "processed.h5ad"


def test_layout_on_disk(processed):
    with h5py.File(processed, "r") as file:
        for matrix in ("X", "layers/counts"):
            for part, dtype in (("indices", np.int32), ("indptr", np.int64)):
                assert file[matrix][part].dtype == dtype
            for part in ("data", "indices", "indptr"):
                assert file[matrix][part].chunks is None and file[matrix][part].compression is None
        assert file["X/data"].dtype == np.uint8
        assert file["layers/counts/data"].dtype == np.uint32  # 70,000 does not fit 16 bits


def test_anndata_and_scanpy_open_it(processed):
    import scanpy

    cells = anndata.read_h5ad(processed)
    assert cells.X.has_sorted_indices and cells.shape == (30, 12)
    assert cells.obs["celltype"].dtype == "category" and cells.obs["celltype"].isna().sum() == 10
    assert cells.X.max() == 9 and cells.layers["counts"].max() == 70_000
    part = cells[:20, :6].copy()
    scanpy.pp.filter_genes(part, min_cells=1)
    scanpy.pp.normalize_total(part, target_sum=1e4)
    scanpy.pp.log1p(part)
    np.testing.assert_allclose(np.expm1(part.X.toarray()).sum(axis=1), 1e4, rtol=1e-4)


def test_store_maps_the_arrays_of_the_file(processed):
    store, cells = CellStore(processed), anndata.read_h5ad(processed)
    assert (
        isinstance(store.data, np.memmap)
        and isinstance(store.indices, np.memmap)
        and isinstance(store.counts.data, np.memmap)
    )
    np.testing.assert_array_equal(store.data, cells.X.data)
    np.testing.assert_array_equal(store.indices, cells.X.indices)
    np.testing.assert_array_equal(store.indptr, cells.X.indptr)
    assert (store.n_cells, store.n_genes) == cells.shape
    assert store.obs_names.tolist() == cells.obs_names.tolist() and store.var_names == cells.var_names.tolist()
    rows = np.array([29, 0, 5])
    np.testing.assert_array_equal(store.counts.rows(rows).toarray(), cells.layers["counts"][rows].toarray())
    assert store.obs.equals(cells.obs)


def test_store_pickles_as_its_path(processed):
    store = CellStore(processed)
    message = pickle.dumps(store)
    assert len(message) < 2000
    np.testing.assert_array_equal(pickle.loads(message).data, store.data)


def test_rows_of_a_split_and_labels(processed):
    store = CellStore(processed)
    assert store.rows_of_split("dev", "split").tolist() == [20, 21, 22, 23]
    assert store.labels("celltype", {"A": 1, "B": 0})[:4].tolist() == [1, 0, -100, 1]
    assert store.labels("celltype", {"A": 1, "B": 0}, silent=["B"])[:3].tolist() == [1, -100, -100]
    ages = store.labels("age", None)
    assert ages.dtype == np.float32 and np.isnan(ages[29]) and ages[5] == 5
    with pytest.raises(DataError, match=r"obs\['celltype'\] holds labels that the label dictionary does not know: B"):
        store.labels("celltype", {"A": 0})
    with pytest.raises(DataError, match=r"obs has no column 'tissue'; columns: .*celltype"):
        store.labels("tissue", {})


@pytest.mark.parametrize("kind", ["csc", "dense"])
def test_a_matrix_in_another_order_is_refused(make_h5ad, kind):
    counts = sparse.random(10, 5, density=0.5, format="csc", dtype=np.float32)
    path = make_h5ad(counts if kind == "csc" else counts.toarray())
    with pytest.raises(DataError, match="a processed file has CSR; make it with `bmfm preprocess`"):
        CellStore(path)


def test_a_compressed_file_is_read_instead_of_mapped(make_h5ad):
    counts = sparse.random(40, 20, density=0.4, format="csr", dtype=np.float32)
    store = CellStore(make_h5ad(counts, compression="gzip"))
    np.testing.assert_array_equal(store.data, counts.data)


def test_writer_fills_in_pieces(tmp_path):
    counts = sparse.random(50, 9, density=0.3, format="csr", dtype=np.float32, random_state=0)
    obs = pd.DataFrame(index=[f"c{index}" for index in range(50)])
    with ProcessedWriter(tmp_path / "out.h5ad", obs, [f"g{index}" for index in range(9)], (50, 9)) as writer:
        writer.matrix("X", np.diff(counts.indptr), np.dtype(np.float32))
        for start in range(0, 50, 7):
            writer.fill("X", counts[start : start + 7])
    np.testing.assert_array_equal(anndata.read_h5ad(tmp_path / "out.h5ad").X.toarray(), counts.toarray())
