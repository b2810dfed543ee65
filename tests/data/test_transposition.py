"""A column-major file becomes rows on disk once, in bounded pieces, and the rows go when they are no longer needed."""

import gc
import tempfile

import numpy as np
import pytest
from scipy import sparse

from bmfm_pipeline.data.sources import h5ad, open_source, transposition
from bmfm_pipeline.errors import StorageError
from bmfm_pipeline.storage import disk_errors


def counts_of(n_cells=150, n_genes=40, seed=3):
    random = np.random.default_rng(seed)
    return sparse.csr_matrix(random.poisson(0.6, (n_cells, n_genes)).astype(np.float32))


def rows_of(source):
    return sparse.vstack([chunk for _, chunk in source.iter_chunks()]).toarray()


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(h5ad, "VALUES_PER_CHUNK", 90)
    monkeypatch.setattr(transposition, "VALUES_PER_BUCKET", 300)
    monkeypatch.setattr(transposition, "VALUES_PER_READ", 110)


@pytest.mark.parametrize("dtype", [np.float32, np.int64])
def test_rows_are_made_once_and_used_by_later_readers(make_h5ad, tmp_path, small_pieces, dtype):
    counts = counts_of()
    path, scratch = make_h5ad(counts.tocsc().astype(dtype)), tmp_path / "scratch"
    np.testing.assert_array_equal(rows_of(open_source(path, scratch=scratch)), counts.toarray())
    files = sorted(scratch.iterdir())
    assert len(files) == 2 and files[0].stat().st_size == 12 * counts.nnz
    written = [file.stat().st_mtime_ns for file in files]
    np.testing.assert_array_equal(rows_of(open_source(path, scratch=scratch)), counts.toarray())
    assert [file.stat().st_mtime_ns for file in sorted(scratch.iterdir())] == written


def test_another_file_under_the_same_name_gets_rows_of_its_own(make_h5ad, tmp_path, small_pieces):
    scratch = tmp_path / "scratch"
    for seed in (1, 2):
        path = make_h5ad(counts_of(seed=seed).tocsc())
        np.testing.assert_array_equal(rows_of(open_source(path, scratch=scratch)), counts_of(seed=seed).toarray())


def test_rows_without_a_folder_go_with_the_source(make_h5ad, tmp_path, monkeypatch, small_pieces):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    source = open_source(make_h5ad(counts_of().tocsc()))
    np.testing.assert_array_equal(rows_of(source), counts_of().toarray())
    assert list((tmp_path / "temporary").iterdir())
    del source
    gc.collect()
    assert not list((tmp_path / "temporary").iterdir())


@pytest.mark.parametrize("kind", ["csr", "csc", "dense"])
def test_first_rows_need_no_transposition(make_h5ad, tmp_path, kind):
    counts = counts_of()
    stored = {"csr": counts, "csc": counts.tocsc(), "dense": counts.toarray()}[kind]
    source = open_source(make_h5ad(stored), scratch=tmp_path / "scratch")
    np.testing.assert_array_equal(source.first_rows(20).toarray(), counts[:20].toarray())
    np.testing.assert_array_equal(source.first_rows(1000).toarray(), counts.toarray())
    assert not (tmp_path / "scratch").exists()


def test_a_disk_without_room_is_found_before_the_work(make_h5ad, tmp_path, file_size_limit):
    path = make_h5ad(counts_of(400).tocsc())
    with file_size_limit(20_000), pytest.raises(StorageError, match="full or a file size limit"):
        rows_of(open_source(path, scratch=tmp_path / "scratch"))
    assert not list((tmp_path / "scratch").iterdir())
    with disk_errors(tmp_path):
        assert rows_of(open_source(path, scratch=tmp_path / "scratch")).shape == (400, 40)
