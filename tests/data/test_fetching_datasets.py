"""A dataset from a web server: built, recorded, resumed, and refused when its content is another."""

import hashlib

import anndata
import pytest
from tenx_files import LABELS, counts_of, files_of, label_lines, matrix_text, tar_of
from web_server import serving

from bmfm_pipeline.config import DatasetEntry, load_entry
from bmfm_pipeline.data.sources.fetching import download_dataset
from bmfm_pipeline.errors import ConfigError, DataError, StorageError
from bmfm_pipeline.storage import downloads, read_json

COUNTS = counts_of()
ARCHIVE = tar_of(files_of(COUNTS))


@pytest.fixture
def site(monkeypatch):
    monkeypatch.setattr(downloads, "BACKOFF", 0.001)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving() as made:
        made.put("/m.tar.gz", ARCHIVE)
        made.put("/labels.txt", label_lines())
        yield made


@pytest.fixture
def entry(site):
    """A dataset of 30 cells, described as zheng68k is."""
    plain = load_entry("zheng68k").model_dump()
    plain |= {"name": "small", "cells": 30, "genes": 12, "expected_labels": {"celltype": list(LABELS)}}
    plain["source"]["env"] = "BMFM_TARGETS_SMALL_DATA"
    plain["source"]["file"] = "h5ad/small.h5ad"
    plain["source"]["download"]["files"] = {
        "matrix": {"url": f"{site.address}/m.tar.gz"},
        "labels": {"url": f"{site.address}/labels.txt", "sha256": hashlib.sha256(label_lines()).hexdigest()},
    }
    return DatasetEntry.model_validate(plain)


def test_the_packaged_zheng68k_names_both_files_and_its_eleven_labels():
    entry = load_entry("zheng68k")
    files = entry.source.download.files
    assert files["matrix"].url.startswith("https://cf.10xgenomics.com/") and files["matrix"].url.endswith(".tar.gz")
    assert files["labels"].sha256 and entry.cells == 68579
    assert len(entry.expected_labels[entry.source.download.label_column]) == 11


def test_the_label_file_of_zheng68k_is_the_one_with_that_sum(data_dir):
    from bmfm_pipeline.data.sources.fetching import _read_labels
    from bmfm_pipeline.storage import hash_file

    entry = load_entry("zheng68k")
    path = data_dir / "zheng68k_labels" / "zheng17_bulk_lables.txt"
    assert hash_file(path) == entry.source.download.files["labels"].sha256
    labels = _read_labels(path)
    assert len(labels) == entry.cells and sorted(set(labels)) == entry.expected_labels["celltype"]


def test_it_is_built_where_it_is_looked_for_with_labels_in_order_and_a_record(entry, site, tmp_path):
    seen = []
    found = download_dataset(entry, on_progress=lambda *at: seen.append(at))
    path = tmp_path / "data-home" / "small" / "h5ad" / "small.h5ad"
    cells = anndata.read_h5ad(path)
    assert found["file"] == str(path) and found["made"] and found["labels"] == dict.fromkeys(LABELS, 10)
    assert (cells.X.toarray() == COUNTS).all()
    assert list(cells.obs["celltype"]) == label_lines().decode().splitlines()
    assert {what for what, _, _ in seen} == {"matrix", "labels", "build"}
    record = read_json(found["provenance"])
    assert record["sources"]["matrix"]["sha256"] == hashlib.sha256(ARCHIVE).hexdigest()
    assert record["sources"]["matrix"]["url"] == f"{site.address}/m.tar.gz" and record["cells"] == 30
    assert record["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_second_call_fetches_nothing_and_a_lost_h5ad_is_built_from_what_was_fetched(entry, site, tmp_path):
    path = tmp_path / "to" / "h5ad" / "small.h5ad"
    download_dataset(entry, tmp_path / "to")
    first = path.read_bytes()
    assert download_dataset(entry, tmp_path / "to") == {"file": str(path), "made": False}
    path.unlink()
    assert download_dataset(entry, tmp_path / "to")["made"] and path.read_bytes() == first
    assert len(site.asked) == 2


def test_a_cut_download_goes_on(entry, site, tmp_path):
    site.put("/m.tar.gz", ARCHIVE, cuts=[100])
    assert download_dataset(entry, tmp_path)["cells"] == 30
    assert ("/m.tar.gz", "bytes=100-") in site.asked


def test_another_content_than_at_the_first_download_is_refused_until_it_is_accepted(entry, site, tmp_path):
    download_dataset(entry, tmp_path)
    (tmp_path / "h5ad" / "small.h5ad").unlink()
    (tmp_path / "h5ad" / "downloads" / "m.tar.gz").unlink()
    other = tar_of(files_of(counts_of(seed=1)))
    site.put("/m.tar.gz", other)
    with pytest.raises(
        StorageError, match=r"recorded at the first download, in .*small.provenance.json: `--sha256 matrix=SUM`"
    ):
        download_dataset(entry, tmp_path)
    assert not (tmp_path / "h5ad" / "small.h5ad").exists()
    accepted = hashlib.sha256(other).hexdigest()
    assert download_dataset(entry, tmp_path, sums={"matrix": accepted})["made"]
    assert read_json(tmp_path / "h5ad" / "small.provenance.json")["sources"]["matrix"]["sha256"] == accepted


def test_a_wrong_sum_is_refused(entry, site, tmp_path):
    site.put("/labels.txt", label_lines() + b"\n")
    with pytest.raises(StorageError, match="is not the expected one and was refused"):
        download_dataset(entry, tmp_path)


def test_a_mirror_takes_the_place_of_an_address(entry, site, tmp_path):
    site.put("/mirror/other-name.tgz", ARCHIVE)
    site.pages.pop("/m.tar.gz")
    found = download_dataset(entry, tmp_path, urls={"matrix": f"{site.address}/mirror/other-name.tgz"})
    assert found["cells"] == 30
    with pytest.raises(ConfigError, match=r"--url matrx=\.\.\.: small has no such file; it has matrix, labels"):
        download_dataset(entry, tmp_path / "x", urls={"matrx": "https://host/a"})


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (label_lines(29), "labels.txt: labels 29 cells, and small has 30"),
        (label_lines(30).replace(b"CD34+", b"CD35+"), r"1 labels are not those of small: CD35\+; expected CD14"),
        (label_lines(12) + b"\n" + label_lines(17), "line 13: has no label"),
        (b"\xff\xfe\x00\xd8", "is no text of one label a line"),
    ],
)
def test_labels_that_do_not_fit_are_refused(entry, site, tmp_path, labels, said):
    site.put("/labels.txt", labels)
    with pytest.raises(DataError, match=said):
        download_dataset(entry, tmp_path, sums={"labels": hashlib.sha256(labels).hexdigest()})
    assert not (tmp_path / "h5ad" / "small.h5ad").exists()


def test_a_shorter_matrix_is_refused(entry, site, tmp_path):
    folder = "filtered_matrices_mex/hg19/"
    files = files_of(COUNTS) | {folder + "matrix.mtx": matrix_text(COUNTS[:29])}
    site.put("/m.tar.gz", tar_of(files))
    with pytest.raises(DataError, match=r"the matrix has 29 columns but barcodes\.tsv has 30 lines"):
        download_dataset(entry, tmp_path)


def test_an_h5ad_is_fetched_as_it_is_and_another_file_is_not_taken_for_one(entry, site, tmp_path, mini_h5ad):
    plain = entry.model_dump()
    plain["source"]["download"] = {"format": "h5ad", "files": {"h5ad": {"url": f"{site.address}/cells.h5ad"}}}
    direct = DatasetEntry.model_validate(plain)
    site.put("/cells.h5ad", mini_h5ad.read_bytes())
    found = download_dataset(direct, tmp_path / "a")
    assert (found["cells"], found["genes"]) == (700, 765)
    site.put("/cells.h5ad", b"<html>log in</html>")
    with pytest.raises(DataError, match=r"is no h5ad file, and is kept as .*small.h5ad.refused"):
        download_dataset(direct, tmp_path / "b")
    assert [path.name for path in (tmp_path / "b" / "h5ad").iterdir()] == ["small.h5ad.refused"]
    site.put("/cells.h5ad", mini_h5ad.read_bytes())
    assert download_dataset(direct, tmp_path / "b")["cells"] == 700


def test_a_dataset_without_a_download_says_what_to_do(tmp_path):
    with pytest.raises(ConfigError, match="zheng68k-mini: needs no download"):
        download_dataset(load_entry("zheng68k-mini"), tmp_path)
    with pytest.raises(
        ConfigError, match=r"hbones: .* by hand from https.*below the folder that BMFM_TARGETS_HBONES_DATA"
    ):
        download_dataset(load_entry("hbones"), tmp_path)
