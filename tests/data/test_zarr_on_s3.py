"""A zarr store on s3 is read where it lies: the chunks asked for, tried again when the connection breaks."""

import pickle

import numpy as np
import pytest
from s3_server import Proxy
from test_stores import anndata_zarr, random_cells

from bmfm_pipeline.data import open_store
from bmfm_pipeline.errors import StorageError
from bmfm_pipeline.storage import RemoteError, remote


@pytest.fixture
def zarr_on_s3(s3, tmp_path):
    matrix = random_cells(200, 50, density=0.8)
    folder = anndata_zarr(tmp_path / "cells.zarr", matrix, obs={"celltype": list("AB") * 100}, chunk=500)
    for file in folder.rglob("*"):
        if file.is_file():
            s3.put(f"cells.zarr/{file.relative_to(folder)}", file.read_bytes())
    return f"{s3.uri}/cells.zarr", matrix


def test_rows_come_from_the_bucket_and_only_as_many_chunks_as_they_need(zarr_on_s3, s3):
    uri, matrix = zarr_on_s3
    with Proxy(s3.server) as proxy:
        s3.through(proxy)
        store = open_store(uri)
        assert store.shape == (200, 50) and store.column("celltype")[:2].tolist() == ["A", "B"]
        before = proxy.passed
        rows = np.array([199, 0, 199])
        np.testing.assert_array_equal(store.rows(rows).toarray(), matrix[rows].toarray())
        assert 4 <= store.cache.reads <= 8 and 2_000 < proxy.passed - before < 20_000
    s3.directly()
    copy = pickle.loads(pickle.dumps(store))
    np.testing.assert_array_equal(copy.rows(np.arange(200)).toarray(), matrix.toarray())


def test_broken_connections_and_what_is_missing(zarr_on_s3, s3, monkeypatch, caplog):
    uri, matrix = zarr_on_s3
    monkeypatch.setattr(remote, "_FIRST_WAIT", 0.02)
    monkeypatch.setenv("BMFM_RETRIES", "3")
    with pytest.raises(StorageError, match=r"no.zarr: .*no zarr group"):
        open_store(f"{s3.uri}/no.zarr")
    with Proxy(s3.server, cut_after=700, cuts=2) as proxy:
        s3.through(proxy)
        store = open_store(uri)
        np.testing.assert_array_equal(store.rows(np.arange(200)).toarray(), matrix.toarray())
        assert proxy.cut == 2 and caplog.text.count("; retry ") >= 1
    monkeypatch.setenv("BMFM_RETRIES", "0")
    store.cache._chunks.clear()
    with pytest.raises(RemoteError, match="could not be reached"):
        store.rows([7])
