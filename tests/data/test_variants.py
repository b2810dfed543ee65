"""VCF files and the windows of a variant: alleles of every kind, ends of chromosomes, and what is no VCF."""

import gzip

import numpy as np
import pytest

from bmfm_pipeline.data.sequences.variants import Outcome, allele_windows, other_name, read_variants
from bmfm_pipeline.errors import DataError

#                     1234567890123456789012345678901234567890
CHROMOSOME = np.frombuffer(b"ACGTTGCAACGTACGTTTGCAGCATCGACTAGCATCAGNN", np.uint8)


def windows(position: int, reference: str, alternative: str, size: int = 10, most_unknown: float = 0.1):
    found = allele_windows(CHROMOSOME, position, reference, alternative, size, most_unknown)
    texts = [None if one is None else one.tobytes().decode() for one in (found.reference, found.alternative)]
    return found.outcome, *texts


def test_a_base_is_exchanged_in_the_middle_of_its_window():
    assert windows(20, "C", "G") == (Outcome.SCORED, "GTTTGCAGCA", "GTTTGGAGCA")


def test_windows_of_deletions_and_insertions_are_of_one_length_and_begin_alike():
    assert windows(19, "GCA", "G") == (Outcome.SCORED, "GTTTGCAGCA", "GTTTGGCATC")
    assert windows(20, "C", "CTT") == (Outcome.SCORED, "GTTTGCAGCA", "GTTTGCTTAG")


def test_at_the_ends_of_the_chromosome_windows_are_moved_inwards():
    assert windows(2, "C", "T") == (Outcome.NEAR_END, "ACGTTGCAAC", "ATGTTGCAAC")
    assert windows(38, "G", "T", most_unknown=1) == (Outcome.NEAR_END, "AGCATCAGNN", "AGCATCATNN")
    assert windows(36, "CAGNN", "C", most_unknown=1)[0] == Outcome.OTHER_LETTERS
    assert windows(36, "CAG", "C", most_unknown=1) == (Outcome.NEAR_END, "CTAGCATCAG", "CTAGCATCNN")
    assert windows(9, "A", "G", 60, 1)[0] == Outcome.SHORT_CHROMOSOME


def test_lower_case_and_rna_are_the_same_letters():
    letters = np.frombuffer(b"acguacguacgu", np.uint8)
    found = allele_windows(letters, 4, "T", "g", 6)
    assert found.outcome == Outcome.SCORED and found.alternative.tobytes() == b"acgGac"


@pytest.mark.parametrize(
    ("position", "reference", "alternative", "outcome"),
    [
        (20, "A", "G", Outcome.MISMATCH),
        (41, "A", "G", Outcome.OUTSIDE),
        (0, "A", "G", Outcome.OUTSIDE),
        (20, "C", ".", Outcome.NO_ALTERNATIVE),
        (20, "C", "<DEL>", Outcome.SYMBOLIC),
        (20, "C", "*", Outcome.SYMBOLIC),
        (20, "C", "C[chr2:5[", Outcome.SYMBOLIC),
        (20, "C", "R", Outcome.OTHER_LETTERS),
        (20, "C", "c", Outcome.SAME),
        (20, "C", "GATTAC", Outcome.TOO_LONG),
        (36, "C", "G", Outcome.UNKNOWN_LETTERS),
    ],
)
def test_what_cannot_be_scored_is_called_by_its_reason(position, reference, alternative, outcome):
    assert windows(position, reference, alternative) == (outcome, None, None)


def test_what_the_genome_has_instead_is_kept():
    assert allele_windows(CHROMOSOME, 20, "AA", "G", 10).found == "CA"


@pytest.mark.parametrize("packed", [False, True])
def test_a_vcf_file_is_read_line_by_line(tmp_path, packed):
    text = "##fileformat=VCFv4.2\r\n#CHROM\tPOS\tID\tREF\tALT\r\nchr1\t5\trs1\ta\tC,G\t.\tPASS\tAC=1\r\n\r\n2\t7\t\tAC\tA\r\n"
    path = tmp_path / ("v.vcf.gz" if packed else "v.vcf")
    (gzip.open if packed else open)(path, "wb").write(text.encode())
    found = [(one.chromosome, one.position, one.name, one.reference, one.alternatives) for one in read_variants(path)]
    assert found == [("chr1", 5, "rs1", "A", ("C", "G")), ("2", 7, ".", "AC", ("A",))]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("chr1 5 . A C", "line 2: 'chr1 5 . A C' has 1 columns"),
        ("chr1\tfive\t.\tA\tC", "line 2: the position is 'five'"),
        ("chr1\t5\t.\t\tC", "line 2: has no reference"),
        ("", "holds no variant"),
    ],
)
def test_what_is_no_vcf_is_refused_with_its_line(tmp_path, line, says):
    path = tmp_path / "v.vcf"
    path.write_text(f"##fileformat=VCFv4.2\n{line}\n")
    with pytest.raises(DataError, match=says):
        list(read_variants(path))


def test_broken_and_binary_files_are_refused(tmp_path):
    whole = gzip.compress(b"chr1\t5\t.\tA\tC\n" * 1000)
    (tmp_path / "half.vcf.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "named.vcf.gz").write_bytes(b"chr1\t5\t.\tA\tC\n")
    (tmp_path / "v.bcf").write_bytes(b"BCF\x02\xff\xfe\x80")
    for name, says in (
        ("half.vcf.gz", "cannot be unpacked"),
        ("named.vcf.gz", "cannot be unpacked"),
        ("v.bcf", "is no text"),
    ):
        with pytest.raises(DataError, match=says):
            list(read_variants(tmp_path / name))


def test_chromosomes_have_two_names():
    assert [other_name(name) for name in ("chr1", "1", "chrM", "MT", "X")] == ["1", "chr1", "MT", "chrM", "chrX"]
