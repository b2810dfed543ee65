"""10x archives read as a stream: the same counts as scipy reads, whatever the order, and a sentence for what is wrong."""

import gzip
import hashlib
import io
import tarfile

import anndata
import numpy as np
import pytest
import scipy.io
from tenx_files import barcode_lines, counts_of, files_of, gene_lines, matrix_text, tar_of

from bmfm_pipeline.data.sources import matrix_market, open_source
from bmfm_pipeline.data.sources.tenx import write_h5ad
from bmfm_pipeline.errors import DataError

FOLDER = "filtered_matrices_mex/hg19/"
COUNTS = counts_of()


def archive(tmp_path, counts=COUNTS, name="cells.tar.gz", **changed):
    """An archive with some of its files replaced (bytes), or left out (None)."""
    files = {**files_of(counts), **{FOLDER + key.replace("_", "."): value for key, value in changed.items()}}
    path = tmp_path / name
    tar_of({key: value for key, value in files.items() if value is not None}, path)
    return path


@pytest.mark.parametrize("block", [1, 37, 4 << 20])
def test_counts_are_those_that_scipy_reads_however_the_text_is_cut(tmp_path, monkeypatch, block):
    monkeypatch.setattr(matrix_market, "BLOCK", block)
    seen = []
    found = write_h5ad(archive(tmp_path), tmp_path / "a.h5ad", on_progress=lambda *at: seen.append(at))
    cells = anndata.read_h5ad(tmp_path / "a.h5ad")
    expected = scipy.io.mmread(io.BytesIO(matrix_text(COUNTS))).T.toarray()
    assert (cells.X.toarray() == expected).all() and (expected == COUNTS).all()
    assert cells.X.has_sorted_indices and cells.X.dtype == np.float32 and cells.X.indices.dtype == np.int32
    assert found == {"cells": 30, "genes": 12, "values": (COUNTS > 0).sum(), "repeated_symbols": 1}
    assert seen[-1] == (found["values"],) * 2


def test_names_are_barcodes_and_symbols_and_a_repeated_symbol_is_seen(tmp_path):
    write_h5ad(archive(tmp_path), tmp_path / "a.h5ad", lambda barcodes: {"n": np.arange(len(barcodes))})
    cells = anndata.read_h5ad(tmp_path / "a.h5ad")
    assert list(cells.obs_names[:2]) == ["ACGTACGTACGT00-1", "ACGTACGTACGT01-1"]
    assert list(cells.var_names[:2]) == ["GENE0", "GENE1"] and cells.var_names[-1] == "GENE0_ENSG00000000011"
    assert cells.var["gene_ids"].iloc[0] == "ENSG00000000000" and cells.obs["n"].iloc[-1] == 29
    assert open_source(tmp_path / "a.h5ad").shape == (30, 12)


def test_the_same_archive_gives_the_same_bytes(tmp_path):
    sums = set()
    for name in ("a.h5ad", "b.h5ad"):
        write_h5ad(archive(tmp_path), tmp_path / name)
        sums.add(hashlib.sha256((tmp_path / name).read_bytes()).hexdigest())
    assert len(sums) == 1


def test_the_layout_of_later_versions_is_read_too(tmp_path):
    lines = [line + b"\tGene Expression" for line in gene_lines().splitlines()]
    files = {
        "out/matrix.mtx.gz": gzip.compress(matrix_text(COUNTS, kind="real", falling=False)),
        "out/features.tsv.gz": gzip.compress(b"\n".join(lines)),
        "out/barcodes.tsv.gz": gzip.compress(barcode_lines()),
        "out/web_summary.html": b"<html>",
    }
    tar_of(files, tmp_path / "a.tar.gz")
    write_h5ad(tmp_path / "a.tar.gz", tmp_path / "a.h5ad")
    assert (anndata.read_h5ad(tmp_path / "a.h5ad").X.toarray() == COUNTS).all()


def test_whole_numbers_may_be_written_with_a_point(tmp_path):
    text = matrix_text(COUNTS, kind="real").replace(b" 2\n", b" 2.000\n").replace(b"\n", b"\r\n")
    write_h5ad(archive(tmp_path, matrix_mtx=text), tmp_path / "a.h5ad")
    assert (anndata.read_h5ad(tmp_path / "a.h5ad").X.toarray() == COUNTS).all()


def test_members_are_written_nowhere(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    files = {"../../escaped.txt": b"x", str(tmp_path / "absolute.txt"): b"x", **files_of(COUNTS)}
    data = tar_of(files, folder / "a.tar.gz")
    with tarfile.open(fileobj=gzip.GzipFile(fileobj=io.BytesIO(data))) as tar:
        assert "../../escaped.txt" in tar.getnames()
    write_h5ad(folder / "a.tar.gz", folder / "a.h5ad")
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["a.h5ad", "a.tar.gz"]


def test_a_link_is_no_file(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        member = tarfile.TarInfo("matrix.mtx")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(member)
    with pytest.raises(DataError, match=r"is no 10x matrix archive: it has no matrix.mtx, genes.tsv"):
        write_h5ad(tmp_path / "a.tar", tmp_path / "a.h5ad")


BAD = {
    "no genes": ({"genes_tsv": None}, r"has no genes.tsv \(or features.tsv\)"),
    "few genes": ({"genes_tsv": gene_lines(11)}, "the matrix has 12 rows but genes.tsv has 11 lines"),
    "many cells": ({"barcodes_tsv": barcode_lines(31)}, "the matrix has 30 columns but barcodes.tsv has 31 lines"),
    "repeated cell": ({"barcodes_tsv": b"A\n" * 30}, "29 barcodes are given twice"),
    "no header": ({"matrix_mtx": b"1 1 1\n"}, "is no Matrix Market coordinate file; its first line is '1 1 1'"),
    "fractions": (
        {"matrix_mtx": matrix_text(COUNTS, "real").replace(b" 2\n", b" 2.5\n")},
        r"matrix.mtx, line \d+: expected row, column and a whole number up to 2147483647, found '\d+ \d+ 2.5'",
    ),
    "negative": ({"matrix_mtx": matrix_text(COUNTS).replace(b" 2\n", b" -2\n")}, "a whole number .* found '.* -2'"),
    "huge": ({"matrix_mtx": matrix_text(COUNTS).replace(b" 2\n", b" 99999999999\n")}, "a whole number .*99999999999"),
    "two words": ({"matrix_mtx": matrix_text(COUNTS).replace(b" 2\n", b"\n")}, r"line \d+: expected row, column"),
    "outside": ({"matrix_mtx": matrix_text(COUNTS).replace(b"\n11 ", b"\n13 ")}, r"a row number lies outside 1..12"),
    "short": (
        {"matrix_mtx": b"".join(matrix_text(COUNTS).splitlines(True)[:-3])},
        r"promises \d+ values and has \d+; it is cut short",
    ),
    "binary": ({"genes_tsv": b"\xff\xfe\x00" * 9}, "is no text"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_said_and_nothing_is_left(tmp_path, case):
    changed, said = BAD[case]
    path = archive(tmp_path, **changed)
    with pytest.raises(DataError, match=said):
        write_h5ad(path, tmp_path / "a.h5ad")
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_cells_must_come_in_order_and_no_gene_twice(tmp_path):
    head = b"%%MatrixMarket matrix coordinate integer general\n12 30 2\n"
    for lines, said in ((b"1 2 1\n1 1 1\n", "do not come in order"), (b"4 2 1\n4 2 3\n", "two values for one gene")):
        with pytest.raises(DataError, match=said):
            write_h5ad(archive(tmp_path, matrix_mtx=head + lines), tmp_path / "a.h5ad")


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_a_cut_archive_is_named(tmp_path, share):
    path = archive(tmp_path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(DataError, match=r"cut short .*remove it and fetch it again"):
        write_h5ad(path, tmp_path / "a.h5ad")


def test_what_is_no_archive_is_named(tmp_path):
    (tmp_path / "a.tar.gz").write_bytes(b"<html>log in</html>")
    with pytest.raises(DataError, match="is no readable tar archive"):
        write_h5ad(tmp_path / "a.tar.gz", tmp_path / "a.h5ad")


def test_two_genomes_in_one_archive_are_refused(tmp_path):
    files = files_of(COUNTS)
    both = files | {name.replace("hg19", "mm10"): content for name, content in files.items()}
    tar_of(both, tmp_path / "a.tar.gz")
    with pytest.raises(DataError, match=r"holds more than one barcodes.tsv .*give an archive of one genome"):
        write_h5ad(tmp_path / "a.tar.gz", tmp_path / "a.h5ad")
