"""Names of any kind brought to one naming: the vocabulary's own spelling, damaged names, other species."""

import gzip
import re

import pytest
from gene_files import write_hgnc, write_orthologs

from bmfm_pipeline.errors import DataError
from bmfm_pipeline.vocabulary.gene_table import GeneTable, read_hgnc
from bmfm_pipeline.vocabulary.harmonising import GeneNameMapper, describe_names
from bmfm_pipeline.vocabulary.orthologs import read_orthologs
from bmfm_pipeline.vocabulary.spreadsheet import readings


@pytest.fixture
def table(tmp_path) -> GeneTable:
    return read_hgnc(write_hgnc(tmp_path))


def targets(mapper: GeneNameMapper, names: list[str]) -> list[str | None]:
    return [entry.target for entry in mapper.resolve(names)]


def hows(mapper: GeneNameMapper, names: list[str]) -> list[str]:
    return [entry.how for entry in mapper.resolve(names)]


def test_without_a_vocabulary_the_approved_symbol_is_the_name(table):
    names = ["CD3D", "GNB2L1", "B4", "ENSG00000075624.9", "cd3e", "OCT1", "mine"]
    assert targets(GeneNameMapper(table), names) == ["CD3D", "RACK1", "CD19", "ACTB", "CD3E", "OCT1", "mine"]
    assert hows(GeneNameMapper(table), names) == [
        "symbol",
        "previous",
        "alias",
        "ensembl",
        "case",
        "ambiguous",
        "unknown",
    ]
    assert [entry.known for entry in GeneNameMapper(table).resolve(names)] == [True] * 5 + [False] * 2


def test_a_vocabulary_of_older_symbols_keeps_its_own_spelling(table):
    mapper = GeneNameMapper(table, ["GNB2L1", "MARCH1", "T3D"])
    names = ["RACK1", "MARCHF1", "ENSG00000167286", "GNB2L1", "CD19"]
    assert targets(mapper, names) == ["GNB2L1", "MARCH1", "T3D", "GNB2L1", "CD19"]
    assert targets(mapper, ["1-Mar"]) == ["MARCH1"]
    assert mapper.resolve(names)[-1].how == "not_in_vocabulary"


def test_a_vocabulary_of_ensembl_ids_is_met_too(table):
    assert targets(GeneNameMapper(table, ["ENSG00000167286"]), ["CD3D", "t3d"]) == ["ENSG00000167286"] * 2


def test_a_vocabulary_that_has_both_spellings_keeps_them_apart(table):
    assert targets(GeneNameMapper(table, ["RACK1", "GNB2L1"]), ["GNB2L1", "RACK1"]) == ["GNB2L1", "RACK1"]


def test_an_ambiguous_name_that_the_vocabulary_spells_so_is_matched(table):
    assert targets(GeneNameMapper(table, ["OCT1", "CD3D"]), ["OCT1"]) == ["OCT1"]


def test_without_a_table_a_vocabulary_forgives_case_compounds_versions_and_dates():
    mapper = GeneNameMapper(None, ["CD3D", "SEPT2", "ENSG00000075624", "C1orf159"])
    names = ["cd3d", "CD3D_ENSG00000167286.1", "2-Sep", "ENSG00000075624.4", "C1ORF159", "CD3D", "CD3D-1"]
    assert targets(mapper, names) == ["CD3D", "CD3D", "SEPT2", "ENSG00000075624", "C1orf159", "CD3D", "CD3D"]
    assert not mapper.resolve(["T3D"])[0].known


def test_a_suffix_is_cut_only_beside_the_name_it_made_unique(table):
    mapper = GeneNameMapper(table)
    assert hows(mapper, ["CD3D", "CD3D-1"]) == ["symbol", "suffix"]
    assert hows(mapper, ["CD19", "CD3D-1"]) == ["symbol", "unknown"]


class TestDates:
    @pytest.mark.parametrize(
        ("name", "symbol"),
        [
            ("1-Mar", "MARCHF1"),
            ("01-Mar", "MARCHF1"),
            ("2-Mar", "MARCHF2"),
            ("Mar-02", "MARCHF2"),
            ("2-MAR", "MARCHF2"),
            ("2-Sep", "SEPTIN2"),
            ("Sep-02", "SEPTIN2"),
            ("2-Sept", "SEPTIN2"),
            ("02. Mrz", "MARCHF2"),
            ("2006-03-02", "MARCHF2"),
            ("2006-09-02 00:00:00", "SEPTIN2"),
            ("2001-03-01", "MARCHF1"),
            ("3/2/2006", "MARCHF2"),
            ("2-Mar-06", "MARCHF2"),
            ("4-Oct", "POU5F1"),
        ],
    )
    def test_what_a_date_was(self, table, name, symbol):
        (found,) = GeneNameMapper(table).resolve([name])
        assert (found.target, found.how, found.known) == (symbol, "spreadsheet", True) and "spreadsheet" in found.why

    @pytest.mark.parametrize(
        "name", ["2-Feb", "31-Mar", "sep-2", "2006-13-01", "MARCH1", "1-Marc", "Mar", "HLA-2", "1-1-1"]
    )
    def test_what_is_no_date_or_no_gene(self, table, name):
        assert GeneNameMapper(table).resolve([name])[0].how != "spreadsheet"

    def test_the_other_gene_of_the_day_is_told(self, table):
        assert "could also be MTARC1" in GeneNameMapper(table).resolve(["1-Mar"])[0].why

    def test_a_gene_that_is_there_undamaged_is_not_the_date(self, table):
        assert targets(GeneNameMapper(table), ["MARCH1", "1-Mar"]) == ["MARCHF1", "MTARC1"]
        assert targets(GeneNameMapper(table), ["MARC1", "1-Mar"]) == ["MTARC1", "MARCHF1"]

    def test_one_date_for_two_genes_is_not_guessed(self, table):
        assert hows(GeneNameMapper(table), ["1-Mar", "1-Mar-1"]) == ["ambiguous"] * 2
        assert hows(GeneNameMapper(table), ["1-Mar", "1-Mar"]) == ["ambiguous"] * 2

    def test_a_year_that_may_be_a_number_is_not_guessed(self, tmp_path):
        rows = [("HGNC:1", "MARCHF1", "x", "Approved", "", "", ""), ("HGNC:2", "MARCHF6", "x", "Approved", "", "", "")]
        table = read_hgnc(write_hgnc(tmp_path, rows))
        assert readings("2006-03-01") == [(3, 1), (3, 6)]
        assert hows(GeneNameMapper(table), ["2006-03-01"]) == ["ambiguous"]


MOUSE = ["Cd3d", "Cd3e", "Actb", "Cd19", "Rack1", "mt-Co1"]


class TestSpecies:
    def test_mouse_symbols_are_not_human_ones_in_other_letters(self, table):
        found = GeneNameMapper(table, ["CD3D", "CD3E", "ACTB", "CD19", "RACK1"]).resolve(MOUSE)
        assert not any(entry.known for entry in found)

    def test_one_name_in_mixed_case_is_a_slip(self, table):
        assert targets(GeneNameMapper(table), ["CD3D", "CD3E", "ACTB", "Cd19"])[-1] == "CD19"

    @pytest.mark.parametrize(
        ("names", "words"),
        [
            (MOUSE, "mouse gene symbols"),
            (["ENSMUSG00000032094", "ENSMUSG00000032093.4"], "mouse Ensembl ids"),
            (["ENSG00000167286", "ENSG00000198851"], "human Ensembl ids"),
            (["CD3D", "ACTB", "C1orf159"], "human gene symbols"),
            (["cd3d", "actb"], "lower-case names"),
            (["A1BG_ENSG00000121410.11"], "human compounds of symbol and Ensembl id"),
            (["1-Mar", "2-Sep"], "dates made by a spreadsheet"),
            (["7157", "920"], "numbers"),
            ([], "names"),
        ],
    )
    def test_kinds_of_names(self, names, words):
        assert str(describe_names(names)).startswith(words)


class TestOrthologs:
    def test_mouse_to_human(self, table, tmp_path):
        mapper = GeneNameMapper(table, None, read_orthologs(write_orthologs(tmp_path)))
        names = ["Cd3d", "Actb", "Actb2", "Gnb2l1", "Double", "Gm1", "cd3e"]
        assert targets(mapper, names) == ["CD3D", "ACTB", "ACTB", "RACK1", None, None, "CD3E"]
        why = [entry.why for entry in mapper.resolve(names)]
        assert why[4] == "2 orthologs: CD19, POU5F1" and why[5] == "no ortholog in the table"

    def test_the_first_of_several_when_asked_for(self, table, tmp_path):
        mapper = GeneNameMapper(table, None, read_orthologs(write_orthologs(tmp_path)), one_to_many="first")
        assert targets(mapper, ["Double"]) == ["CD19"]

    def test_the_spelling_of_a_vocabulary(self, table, tmp_path):
        mapper = GeneNameMapper(table, ["GNB2L1", "T3D"], read_orthologs(write_orthologs(tmp_path)))
        found = mapper.resolve(["Gnb2l1", "Cd3d", "Actb"])
        assert [entry.target for entry in found] == ["GNB2L1", "T3D", "ACTB"]
        assert [entry.known for entry in found] == [True, True, False]

    def test_human_to_mouse_takes_any_human_name(self, table, tmp_path):
        pairs = read_orthologs(write_orthologs(tmp_path), ["human", "mouse"])
        mapper = GeneNameMapper(table, ["Cd3d", "Cd3e"], pairs, "human_to_mouse")
        names = ["ENSG00000167286.1", "TCRE", "CD3D_ENSG00000167286", "ACTB"]
        assert targets(mapper, names) == ["Cd3d", "Cd3e", "Cd3d", None]

    def test_columns_of_a_larger_table(self, tmp_path):
        path = tmp_path / "table.tsv"
        path.write_text("id\thuman\tmouse\n1\tCD3D\tCd3d\n2\tCD3E\t\n")
        assert read_orthologs(path, ["mouse", "human"]).pairs == [("Cd3d", "CD3D")]

    @pytest.mark.parametrize(
        ("text", "columns", "words"),
        [
            ("a,b\n", ["mouse", "human"], "has no column mouse, human"),
            ("only\n", None, "no line with two gene names"),
            (None, None, "cannot be read"),
        ],
    )
    def test_files_that_are_no_table(self, tmp_path, text, columns, words):
        path = tmp_path / "table.csv"
        if text is not None:
            path.write_text(text)
        with pytest.raises(DataError, match=words):
            read_orthologs(path, columns)


def test_a_mapper_survives_as_plain_values(table, tmp_path):
    mapper = GeneNameMapper(table, ["GNB2L1", "CD3D"], read_orthologs(write_orthologs(tmp_path)), one_to_many="first")
    again = GeneNameMapper.from_plain(mapper.to_plain())
    names = ["Cd3d", "Gnb2l1", "Double", "nothing"]
    assert again.resolve(names) == mapper.resolve(names)


def test_protein_coding_genes_in_the_spelling_of_the_vocabulary(table):
    assert GeneNameMapper(table, ["GNB2L1", "MALAT1", "CD3D"]).protein_coding == ["CD3D", "GNB2L1"]
    assert (
        "MALAT1" not in GeneNameMapper(table).protein_coding and GeneNameMapper(None, ["CD3D"]).protein_coding is None
    )


def test_names_of_panglao_studies(data_dir):
    """Compounds of a human study are found by their ids; those of a mouse study are no human genes."""
    table = read_hgnc(data_dir / "genes" / "hgnc_complete_set.zip")
    species = {"human": "SRA823298_SRS4144446", "mouse": "SRA578634_SRS2302659"}
    for name, study in species.items():
        raw = gzip.decompress((data_dir / "panglao" / "rdata" / f"{study}.sparse.RData").read_bytes())
        found = re.findall(rb"[A-Za-z0-9.\-]+_ENS[A-Z]*G\d{8,}\.\d+", raw)
        names = [entry.decode() for entry in dict.fromkeys(found)]
        known = sum(entry.known for entry in GeneNameMapper(table).resolve(names)) / len(names)
        assert len(names) > 5000 and describe_names(names).species == name
        assert known > 0.8 if name == "human" else known == 0
