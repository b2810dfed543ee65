"""`bmfm genes`: fetching the table of names, and what a name resolves to."""

import hashlib
import json

import pytest
from gene_files import ROWS, hgnc_text, write_hgnc

from bmfm_pipeline import cli


@pytest.fixture
def genes(monkeypatch, tmp_path, capsys):
    """genes(*words) -> (exit code, stdout, stderr), with a cache of its own."""
    monkeypatch.setenv("BMFM_CACHE_DIR", str(tmp_path / "cache"))

    def run(*words):
        code = cli.main(["genes", *map(str, words)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_download_keeps_the_checksum_and_older_tables(genes, tmp_path):
    table = write_hgnc(tmp_path)
    sum_before = hashlib.sha256(table.read_bytes()).hexdigest()
    code, out, _ = genes("download", "--url", table.as_uri(), "--sha256", sum_before)
    assert code == 0 and f"{len(ROWS) - 1} genes, sha256 {sum_before}" in out and "gene_names.table=hgnc" in out
    folder = tmp_path / "cache" / "genes"
    noted = json.loads((folder / "hgnc_complete_set.json").read_text())
    assert (noted["sha256"], noted["url"]) == (sum_before, table.as_uri())
    table.write_text(hgnc_text(ROWS[:4]))
    code, out, _ = genes("download", "--url", table.as_uri(), "--json")
    found = json.loads(out)
    assert code == 0 and found["genes"] == 4 and found["sha256"] != sum_before
    assert (folder / "hgnc_complete_set.txt").read_bytes() == table.read_bytes()
    assert hashlib.sha256((folder / f"hgnc_complete_set-{sum_before[:12]}.txt").read_bytes()).hexdigest() == sum_before


@pytest.mark.parametrize(
    ("content", "words", "said"),
    [
        ("<html>Sign in</html>", [], "has no column hgnc_id"),
        (hgnc_text(), ["--sha256", "0" * 64], "is not the expected one and was refused"),
        (None, [], "absent"),
    ],
)
def test_what_is_no_table_does_not_take_the_place_of_one(genes, tmp_path, content, words, said):
    good = write_hgnc(tmp_path)
    assert genes("download", "--url", good.as_uri())[0] == 0
    other = tmp_path / "absent.txt"
    if content is not None:
        other.write_text(content)
    code, _, err = genes("download", "--url", other.as_uri(), *words)
    assert code == 2 and said in err
    assert (tmp_path / "cache" / "genes" / "hgnc_complete_set.txt").read_bytes() == good.read_bytes()


def test_show_says_what_a_name_is_and_why(genes, tmp_path):
    table = write_hgnc(tmp_path)
    code, out, _ = genes("show", "GNB2L1", "ENSG00000167286.2", "1-Mar", "OCT1", "nothing", "--table", table)
    assert code == 0
    for line in (
        "GNB2L1: RACK1 (previous symbol)",
        "ENSG00000167286.2: CD3D (Ensembl id)",
        "1-Mar: MARCHF1 (a spreadsheet made a date of the name (could also be MTARC1))",
        "OCT1: ambiguous (alias of 2 genes: POU2F1, SLC22A1)",
        "nothing: unknown",
        "    HGNC:1673  ENSG00000167286  protein-coding gene",
        "    previous: T3D",
    ):
        assert line in out
    code, out, _ = genes("show", "--json", "--table", table, "CD3D", "B4")
    assert code == 0 and [row["symbol"] for row in json.loads(out)["genes"]] == ["CD3D", "CD19"]


def test_show_without_a_table_or_a_name(genes):
    code, _, err = genes("show", "CD3D")
    assert code == 2 and "run `bmfm genes download`" in err
    code, _, err = genes("show")
    assert code == 2 and "name one or more genes" in err
    code, _, err = genes("download", "CD3D")
    assert code == 2 and "takes no names" in err
