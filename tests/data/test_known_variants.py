"""Variants of a population written into a genome: pairs of alleles, what is left out and counted, and the other strand."""

import gzip

import numpy as np
import pytest

from bmfm_pipeline.data.sequences.known_variants import KnownVariants
from bmfm_pipeline.data.sequences.letters import clean, reverse_complement
from bmfm_pipeline.errors import DataError
from bmfm_pipeline.vocabulary.alleles import FIRST, LAST, PAIRS, code

#                     12345678901234567890
CHROMOSOME = np.frombuffer(b"ACGTTGCAacgtACGTTTGC", np.uint8)
HEADER = "##fileformat=VCFv4.2\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n"


def of_lines(folder, *lines, least=None) -> KnownVariants:
    path = folder / "known.vcf"
    path.write_text(HEADER + "".join("\t".join(line.split()) + "\n" for line in lines))
    return KnownVariants(path, least)


def pairs(letters) -> dict[int, str]:
    """{position from 1: pair} of the places that hold one."""
    return {place + 1: PAIRS[value - FIRST] for place, value in enumerate(letters.tolist()) if value >= FIRST}


def written(known: KnownVariants, name: str = "chr1") -> dict[int, str]:
    known.check(name, CHROMOSOME)
    known.finish("genome.fa")
    return pairs(known.written(name, CHROMOSOME))


def test_substitutions_deletions_and_insertions_are_pairs_and_the_rest_stays(tmp_path):
    known = of_lines(tmp_path, "1 2 . C T . . .", "1 4 . TTG T . . .", "1 8 . A AGG . . .", "1 10 . CG TA . . .")
    assert written(known) == {2: "C>T", 5: "T>-", 6: "G>-", 8: "A>+G", 10: "C>T", 11: "G>A"}
    letters = known.written("chr1", CHROMOSOME)
    assert np.array_equal(letters[letters < FIRST], CHROMOSOME[letters < FIRST])
    assert known.counts["places"] == 6 and known.in_words() == ""
    assert known.codes == sorted({code("C", "T"), code("T", "-"), code("G", "-"), code("A", "+G"), code("G", "A")})


def test_of_several_at_a_place_the_commonest_is_written(tmp_path):
    known = of_lines(
        tmp_path,
        "chr1 2 . C T,A . . AF=0.1,0.3",
        "chr1 4 . T G . . AF=0.1",
        "chr1 4 . T C . . AF=0.1",
        "chr1 6 . G A,C . . CAF=0.7,.,0.2",
    )
    assert written(known) == {2: "C>A", 4: "T>G", 6: "G>C"}
    assert known.counts["second"] == 3


def test_what_is_left_out_is_counted_by_reason(tmp_path):
    known = of_lines(
        tmp_path,
        "chr1 2 . C T . . AF=0.01", "chr1 3 . G A . . AF=0.2", "chr1 4 . T A . . .", "chr1 5 . TG CAA . . AF=0.5",
        "chr1 6 . G <DEL> . . AF=0.5", "chr1 7 . C * . . AF=0.5", "chr1 9 . A C . . AF=0.5", "chr1 10 . C A . . AF=0.5",
        "chr1 11 . g a . . AF=0.5", "chr1 12 . T A . . AF=0.5", "chr1 13 . T A . . AF=0.5", "chr1 99 . T A . . AF=0.5", "chr7 1 . T A . . AF=0.5",
        least=0.05,
    )  # fmt: skip
    assert written(known) == {3: "G>A", 9: "A>C", 10: "C>A", 11: "G>A", 12: "T>A"}
    expected = {
        "rare": 1, "no_frequency": 1, "complex": 1, "no_alternative": 2, "mismatch": 1, "no_chromosome": 2, "places": 5, "second": 0,
    }  # fmt: skip
    assert dict(known.counts) == expected
    assert "1 have a reference that the genome does not have there" in known.in_words()


def test_variants_of_another_genome_are_refused(tmp_path):
    known = of_lines(tmp_path, "chr1 2 . C T . . .", "chr1 3 . A T . . .", "chr1 4 . A C . . .")
    known.check("chr1", CHROMOSOME)
    with pytest.raises(
        DataError, match=r"2 of 3 variants have a reference that genome.fa does not have.*another assembly"
    ):
        known.finish("genome.fa")
    elsewhere = of_lines(tmp_path, "chrX 2 . C T . . .")
    elsewhere.check("chr1", CHROMOSOME)
    with pytest.raises(DataError, match=r"no variant can be written.*1 lie on chromosomes"):
        elsewhere.finish("genome.fa")


def test_a_name_of_the_file_belongs_to_one_chromosome_of_the_genome(tmp_path):
    known = of_lines(tmp_path, "MT 2 . C T . . .")
    known.check("chrM", CHROMOSOME)
    known.check("chrMT", CHROMOSOME)
    known.finish("genome.fa")
    assert pairs(known.written("chrM", CHROMOSOME)) == {2: "C>T"}
    assert np.array_equal(known.written("chrMT", CHROMOSOME), CHROMOSOME)
    assert known.counts["places"] == 1


@pytest.mark.parametrize(("name", "separator"), [("known.csv", ","), ("known.tsv", "\t"), ("known.csv.gz", ",")])
def test_a_table_of_variants_says_the_same_as_a_vcf_file(tmp_path, name, separator):
    rows = [["Chrom", "POS", "ref", "Alt", "AF"], ["chr1", "2", "c", "T", "0.4"], ["chr1", "8", "A", "AGG", ""]]
    text = "\n".join(separator.join(row) for row in rows) + "\n"
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    assert written(KnownVariants(tmp_path / name)) == {2: "C>T", 8: "A>+G"}
    assert written(KnownVariants(tmp_path / name, 0.3)) == {2: "C>T"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("chrom,pos,ref\nchr1,2,C\n", r"has no column alt"),
        ("chrom,pos,ref,alt\nchr1,two,C,T\n", r"line 2: 'chr1,two,C,T' is no variant"),
        ("chrom,pos,ref,alt\nchr1,2\n", r"line 2: 'chr1,2' is no variant"),
        ("", r"has no column chrom, pos, ref, alt"),
    ],
)
def test_what_is_no_table_of_variants_is_refused(tmp_path, text, says):
    (tmp_path / "known.csv").write_text(text)
    with pytest.raises(DataError, match=says):
        KnownVariants(tmp_path / "known.csv")
    with pytest.raises(DataError, match="no such file"):
        KnownVariants(tmp_path / "none.csv")


def test_the_other_strand_has_the_opposite_pair(tmp_path):
    letters = np.array([ord("A"), code("C", "T"), code("A", "+G"), code("G", "-"), code("N", "A")], np.uint8)
    starts = np.array([0, 5])
    turned = reverse_complement(letters, starts)
    assert [PAIRS[value - FIRST] for value in turned[:4]] == ["N>T", "C>-", "T>+C", "G>A"] and turned[4] == ord("T")
    every = np.arange(FIRST, LAST + 1, dtype=np.uint8)
    whole = np.array([0, len(every)])
    assert np.array_equal(reverse_complement(reverse_complement(every, whole), whole), every)


def test_places_of_variants_are_no_unknown_letters():
    letters = np.array([ord("a"), code("C", "T"), ord("R"), code("A", "G")], np.uint8)
    assert clean(letters, np.array([0, 4]), variants=True).changed == {
        "lower_case": 1, "rna": 0, "spaces": 0, "ambiguous": 1, "variants": 2,
    }  # fmt: skip
