"""Windows of a genome: FASTA and BED as they come, what is left out, and which chromosomes are held out."""

import gzip

import numpy as np
import pytest

from bmfm_pipeline.config.sequences import Windows
from bmfm_pipeline.data.sequences import clean
from bmfm_pipeline.data.sequences.genome import open_genome, read_bed, read_fasta
from bmfm_pipeline.errors import DataError


def write_genome(folder, sizes=(1000, 350), line=60, ending=".fa", seed=0):
    rng = np.random.default_rng(seed)
    texts = {f"chr{number}": "".join(rng.choice(list("ACGTacgt"), size=size)) for number, size in enumerate(sizes, 1)}
    text = "".join(
        f">{name} some words\n" + "".join(letters[at : at + line] + "\n" for at in range(0, len(letters), line))
        for name, letters in texts.items()
    )
    path = folder / f"genome{ending}"
    path.write_bytes(gzip.compress(text.encode()) if ending.endswith(".gz") else text.encode())
    return path, texts


def texts_of(source, **options):
    found = []
    for first, letters, starts in source.blocks():
        assert first == len(found)
        found += clean(letters, starts, **options).texts()
    return found


@pytest.mark.parametrize("ending", [".fa", ".fasta.gz"])
def test_records_are_read_whole(tmp_path, ending):
    path, texts = write_genome(tmp_path, ending=ending)
    assert {name: letters.tobytes().decode() for name, letters in read_fasta(path)} == texts


def test_windows_follow_one_another_and_the_last_is_what_is_left(tmp_path):
    path, texts = write_genome(tmp_path)
    source = open_genome(path, Windows(size=300, least=50))
    assert source.obs.index.tolist() == [
        "chr1:1-300", "chr1:301-600", "chr1:601-900", "chr1:901-1000", "chr2:1-300", "chr2:301-350",
    ]  # fmt: skip
    assert texts_of(source, upper_case=False)[3] == texts["chr1"][900:]
    assert texts_of(source)[4] == texts["chr2"][:300].upper()
    assert open_genome(path, Windows(size=300, least=60)).skipped["too_short"] == 1


def test_overlapping_windows_end_once(tmp_path):
    path, texts = write_genome(tmp_path, sizes=(1000,))
    source = open_genome(path, Windows(size=300, step=200))
    assert list(zip(source.obs["begin"], source.obs["end"], strict=True)) == [
        (0, 300),
        (200, 500),
        (400, 700),
        (600, 900),
        (800, 1000),
    ]
    assert texts_of(source)[1] == texts["chr1"][200:500].upper()


def test_stretches_of_n_are_left_out_and_counted(tmp_path):
    path = tmp_path / "a.fa"
    path.write_text(">c\n" + "ACGT" * 50 + "N" * 200 + "A" * 95 + "N" * 5 + "ACGT" * 25 + "\n")
    source = open_genome(path, Windows(size=100))
    assert source.obs["begin"].tolist() == [0, 100, 400, 500] and source.skipped == {
        "mostly_unknown": 2,
        "too_short": 0,
    }


def test_a_bed_file_says_where_windows_lie(tmp_path):
    path, texts = write_genome(tmp_path)
    bed = tmp_path / "a.bed"
    bed.write_text("track name=x\nchr2\t10\t110\n#no\nchr1\t500\t900\tname\t0\t+\n")
    source = open_genome(path, Windows(size=300), bed)
    assert source.obs.index.tolist() == ["chr1:501-800", "chr1:801-900", "chr2:11-110"]
    assert texts_of(source)[2] == texts["chr2"][10:110].upper()


def test_chromosomes_are_held_out_by_name(tmp_path):
    path, _ = write_genome(tmp_path, sizes=(600, 300, 300))
    obs = open_genome(path, Windows(size=300, dev=["chr2"], test=["chr3"])).obs
    assert obs["split"].tolist() == ["train", "train", "dev", "test"]
    with pytest.raises(DataError, match="no record chr33; it has chr1, chr2, chr3; did you mean 'chr3'"):
        open_genome(path, Windows(test=["chr33"]))
    assert "split" not in open_genome(path, Windows(size=300)).obs


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("ACGT\n", "begins with 'ACGT'"),
        ("", "holds no FASTA record"),
        (">a\nA\n>a\nC\n", "a is there twice"),
        (">\nA\n", "has no name"),
    ],
)
def test_what_is_no_fasta_is_refused(tmp_path, text, says):
    (tmp_path / "a.fa").write_text(text)
    with pytest.raises(DataError, match=says):
        list(read_fasta(tmp_path / "a.fa"))


@pytest.mark.parametrize(
    ("text", "says"),
    [("chr1 5\n", "line 1"), ("chr1 5 5\n", "enclose nothing"), ("chr1 a b\n", "BED lines are"), ("", "no interval")],
)
def test_what_is_no_bed_is_refused(tmp_path, text, says):
    (tmp_path / "a.bed").write_text(text)
    with pytest.raises(DataError, match=says):
        read_bed(tmp_path / "a.bed")


def test_intervals_outside_of_the_genome_and_no_window_at_all_are_refused(tmp_path):
    path, _ = write_genome(tmp_path)
    bed = tmp_path / "a.bed"
    bed.write_text("chr1 900 1100\n")
    with pytest.raises(DataError, match="ends at 1100"):
        open_genome(path, Windows(), bed)
    bed.write_text("chrX 900 1100\n")
    with pytest.raises(DataError, match="names chrX"):
        open_genome(path, Windows(), bed)
    (tmp_path / "n.fa").write_text(">a\n" + "N" * 500 + "\n")
    with pytest.raises(DataError, match="no window is left"):
        open_genome(tmp_path / "n.fa", Windows(size=100))
