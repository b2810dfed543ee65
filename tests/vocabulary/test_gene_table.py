"""The table of HGNC: what is read of it, and which gene a name is."""

import gzip
import zipfile

import pytest
from gene_files import ROWS, hgnc_text, write_hgnc

from bmfm_pipeline.errors import DataError
from bmfm_pipeline.vocabulary.gene_table import GeneTable, read_hgnc, split_compound


@pytest.fixture
def table(tmp_path) -> GeneTable:
    return read_hgnc(write_hgnc(tmp_path))


def test_withdrawn_entries_are_left_out(table):
    assert len(table) == len(ROWS) - 1 and table.match("OLD1~withdrawn").how == "unknown"


@pytest.mark.parametrize(
    ("name", "how", "symbol"),
    [
        ("CD3D", "symbol", "CD3D"),
        ("T3D", "previous", "CD3D"),
        ("RNF171", "alias", "MARCHF1"),
        ("ENSG00000167286", "ensembl", "CD3D"),
        ("ENSG00000167286.12", "ensembl", "CD3D"),
        ("HGNC:1673", "hgnc_id", "CD3D"),
        ("OCT1", "ambiguous", None),
        ("cd3d", "unknown", None),
        ("ENSG00000999999", "unknown", None),
        ("", "unknown", None),
    ],
)
def test_what_a_name_is(table, name, how, symbol):
    match = table.match(name)
    assert (match.how, match.gene and match.gene.symbol) == (how, symbol)


def test_an_ambiguous_name_lists_its_genes(table):
    assert [gene.symbol for gene in table.match("OCT1").candidates] == ["POU2F1", "SLC22A1"]


def test_approved_symbols_win_over_previous_ones_and_those_over_aliases(tmp_path):
    rows = [
        ("HGNC:1", "AAA", "x", "Approved", "", "", ""),
        ("HGNC:2", "BBB", "x", "Approved", "CCC", "AAA", ""),
        ("HGNC:3", "DDD", "x", "Approved", "AAA", "CCC", ""),
    ]
    table = read_hgnc(write_hgnc(tmp_path, rows))
    assert table.match("AAA").gene.symbol == "AAA"
    assert table.match("CCC").gene.symbol == "DDD"


@pytest.mark.parametrize(
    ("name", "symbol"),
    [
        ("CD3D_ENSG00000167286.12", "CD3D"),
        ("T3D_ENSG00000000001", "CD3D"),  # an id of another release: the symbol tells
        ("ANY_ENSG00000075624", "ACTB"),
        ("ENSG00000075624.3|anything", "ACTB"),
        ("B4_ENSG00000000001", None),  # an alias beside a strange id tells too little
        ("CD3D", None),
    ],
)
def test_compounds(table, name, symbol):
    match = table.match_compound(name)
    assert (match.gene and match.gene.symbol) == symbol


def test_parts_of_a_compound():
    assert split_compound("Y_RNA_ENSG00000201801.1") == ("Y_RNA", "ENSG00000201801")
    assert split_compound("A1BG-AS1") is None


@pytest.mark.parametrize(
    ("name", "symbol"),
    [("cd3d", "CD3D"), ("C1ORF159", "C1orf159"), ("march-i", "MARCHF1"), ("ensg00000075624", "ACTB")],
)
def test_letters_case(table, name, symbol):
    match = table.match_case(name)
    assert (match.how, match.gene.symbol) == ("case", symbol)


def test_protein_coding_genes(table):
    assert "CD3D" in table.protein_coding and "MALAT1" not in table.protein_coding


def test_a_table_survives_as_text(table):
    assert GeneTable.from_text(table.to_text()).genes == table.genes


def test_packed_tables_are_the_same(tmp_path, table):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(hgnc_text().encode()))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("hgnc_complete_set.txt", hgnc_text())
        archive.writestr("__MACOSX/._hgnc_complete_set.txt", "x")
    assert read_hgnc(tmp_path / "a.txt.gz").genes == read_hgnc(tmp_path / "a.zip").genes == table.genes


def test_a_changed_file_is_read_again(tmp_path, table):
    path = write_hgnc(tmp_path, ROWS[:3])
    assert len(read_hgnc(path)) == 3


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"gene,ensembl\nCD3D,ENSG1\n", "has no column hgnc_id, symbol"),
        (b"\xff\xfe\x00\x01", "is not readable text"),
        (b"PK\x03\x04 cut short", "is not readable text"),
        (hgnc_text([]).encode(), "lists no approved gene"),
        (b"", "has no column"),
    ],
)
def test_files_that_are_no_table(tmp_path, content, words):
    path = tmp_path / "table.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        read_hgnc(path)
    assert str(path) in str(caught.value) and "bmfm genes download" in str(caught.value)


def test_no_file(tmp_path):
    with pytest.raises(DataError, match="bmfm genes download"):
        read_hgnc(tmp_path / "absent.txt")


def test_the_complete_set_of_2018(data_dir):
    table = read_hgnc(data_dir / "genes" / "hgnc_complete_set.zip")
    assert (len(table), len(table.protein_coding)) == (41077, 19090)
    assert table.match("GNB2L1").gene.symbol == "RACK1" and table.match("SEPT2").how == "symbol"
