"""Test and dev sequences that training has too."""

import numpy as np

from bmfm_pipeline.data.sequences import find_leakage, reverse_complement


def random_texts(n, size, seed=0):
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(list("ACGT"), size=size)) for _ in range(n)]


def other_strand(text):
    letters = np.frombuffer(text.encode(), dtype=np.uint8)
    return reverse_complement(letters, np.array([0, len(letters)])).tobytes().decode()


def look(train, test, dev=(), **options):
    texts = [*train, *dev, *test]
    splits = np.array(["train"] * len(train) + ["dev"] * len(dev) + ["test"] * len(test), dtype=object)
    letters = np.frombuffer("".join(texts).encode(), dtype=np.uint8)
    starts = np.concatenate([[0], np.cumsum([len(text) for text in texts])])
    return find_leakage(letters, starts, splits, np.array([f"s{i}" for i in range(len(texts))]), **options)


def test_each_kind_is_counted_once_as_the_closest():
    train = random_texts(50, 200)
    changed = train[2][:100] + ("A" if train[2][100] != "A" else "C") + train[2][101:]
    found = look(train, [train[0], other_strand(train[1]), changed, *random_texts(20, 200, seed=1)], dev=[train[3]])
    assert found.identical == {"dev": 1, "test": 1}
    assert found.reverse == {"dev": 0, "test": 1}
    assert found.near == {"dev": 0, "test": 1}
    assert found.total == 4 and ("s51", "s0", "identical") in found.examples
    assert "test: 1 identical to, 1 the reverse complement of, 1 nearly identical to" in found.sentence()


def test_chance_is_no_leakage_and_near_ones_can_be_left_out():
    train = random_texts(300, 70)
    assert look(train, random_texts(300, 70, seed=1)).total == 0
    near = train[0][:69] + ("A" if train[0][69] != "A" else "C")
    assert look(train, [near]).near == {"test": 1}
    assert look(train, [near], most_letters=10).total == 0


def test_a_part_of_a_training_sequence_is_near_whatever_the_strand():
    train = random_texts(5, 400)
    assert look(train, [other_strand(train[0][:380])]).near == {"test": 1}


def test_short_and_unknown_letters_do_no_harm():
    found = look(["ACG", "NNNNNNNNNNNNNNNNNNNN", "ACGTACGTACGTACGT"], ["ACG", "NNNNNNNNNNNNNNNNNNNA"])
    assert found.identical == {"test": 1} and found.near == {"test": 0}
