"""Cleaning of nucleotide letters, and the other strand."""

import numpy as np

from bmfm_pipeline.data.sequences import clean, reverse_complement


def flat(texts):
    letters = np.frombuffer("".join(texts).encode("latin-1"), dtype=np.uint8)
    return letters, np.concatenate([[0], np.cumsum([len(text) for text in texts])])


def test_capitals_rna_blanks_and_codes_are_counted():
    found = clean(*flat(["acgu", "AC GT\t", "", "RYN-"]))
    assert found.texts() == ["ACGT", "ACGT", "", "RYN-"]
    assert found.changed == {"lower_case": 4, "rna": 1, "spaces": 2, "ambiguous": 3}
    assert found.lengths.tolist() == [4, 4, 0, 4]


def test_case_is_kept_where_it_tells_something():
    found = clean(*flat(["acguN"]), upper_case=False)
    assert found.texts() == ["acgtN"] and found.changed["lower_case"] == 0


def test_clean_letters_stay_what_they_are():
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("ACGTN"), size=size)) for size in (0, 1, 7, 300)]
    found = clean(*flat(texts))
    assert found.texts() == texts and not any(found.changed.values())


def test_the_other_strand_is_read_backwards_with_pairs_exchanged():
    letters, starts = flat(["AACG", "", "N", "RYK"])
    other = reverse_complement(letters, starts)
    assert other.tobytes() == b"CGTT" + b"N" + b"MRY"
    assert (reverse_complement(other, starts) == letters).all()
