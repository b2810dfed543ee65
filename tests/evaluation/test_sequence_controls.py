"""Controls of nucleotide sequences: counts of words against a plain count, and what each can and cannot learn."""

from types import SimpleNamespace

import numpy as np
import pytest

from bmfm_pipeline.data.sequences import clean
from bmfm_pipeline.evaluation.controls.choice import DESCRIPTIONS, READS, which_controls
from bmfm_pipeline.evaluation.controls.running import ControlCells, control_predictions
from bmfm_pipeline.evaluation.controls.sequences import WORDS, SequenceValues, fit_network, gc_content, log_words


def values_of(texts):
    letters = np.frombuffer("".join(texts).encode(), dtype=np.uint8)
    found = clean(letters, np.concatenate([[0], np.cumsum([len(text) for text in texts])]))

    class Arrays(SimpleNamespace):
        def __len__(self):
            return len(texts)

    return SequenceValues(Arrays(letters=found.letters, letter_starts=found.starts))


def column_of(word):
    first = sum(4**length for length in range(1, len(word)))
    return first + int("".join(str("ACGT".index(letter)) for letter in word), 4)


def test_words_are_counted_as_by_hand():
    texts = ["ACGTACG", "NNAC", "", "AAAAAAAAAA"]
    found = values_of(texts).rows(np.array([3, 0, 1, 2]))
    assert found.shape == (4, WORDS) and found.has_sorted_indices
    for row, text in enumerate(["AAAAAAAAAA", "ACGTACG", "NNAC", ""]):
        expected = np.zeros(WORDS)
        for length in range(1, 7):
            for at in range(len(text) - length + 1):
                if "N" not in text[at : at + length]:
                    expected[column_of(text[at : at + length])] += 1
        assert (found[row].toarray()[0] == expected).all()


def test_scales_come_from_training_alone():
    values = values_of(["ACG", "AAAA", "TTTTTT"])
    train, test = log_words(values.rows(np.array([0, 1])), values.rows(np.array([2])))
    assert train.max() == 1 and train[1, column_of("A")] == 1
    assert train[0, column_of("A")] == pytest.approx(np.log(2) / np.log(5))
    assert test[0, column_of("T")] == 0  # never seen in training


def test_the_share_of_g_and_c():
    found = gc_content(values_of(["GGCA", "NNN", "AT"]).rows(np.arange(3)))
    assert found[:, 0].tolist() == [0.75, 0.5, 0.0] and found[0, 1] == pytest.approx(np.log(5))


def motif_data(n=400, size=40, seed=0):
    """A motif somewhere makes the class; composition says nothing."""
    rng = np.random.default_rng(seed)
    texts, labels = [], rng.integers(0, 2, n)
    for label in labels:
        text = rng.choice(list("ACGT"), size=size)
        motif = list("GATTACAGAT") if label else rng.permutation(list("GATTACAGAT")).tolist()
        at = rng.integers(0, size - 10)
        text[at : at + 10] = motif
        texts.append("".join(text))
    return texts, labels


def test_a_motif_is_found_by_words_and_network_and_not_by_composition():
    texts, labels = motif_data()
    cells = ControlCells(values_of(texts), np.arange(300), np.arange(300, 400), kind="words")
    right = {
        name: (control_predictions(name, cells, labels, ["no", "yes"]).predicted == labels[300:]).mean()
        for name in ("kmer6_logistic", "cnn", "gc_logistic", "majority")
    }
    assert right["kmer6_logistic"] > 0.85 and right["cnn"] > 0.85
    assert right["gc_logistic"] < 0.65 and right["majority"] < 0.65


def test_numbers_are_predicted_on_their_own_scale():
    texts, labels = motif_data()
    numbers = 100 + 20.0 * labels
    cells = ControlCells(values_of(texts), np.arange(300), np.arange(300, 400), kind="words")
    errors = {
        name: np.abs(control_predictions(name, cells, numbers, []).predicted - numbers[300:]).mean()
        for name in ("train_mean", "kmer6_ridge", "cnn")
    }
    assert errors["cnn"] < 5 and errors["kmer6_ridge"] < 7 < errors["train_mean"]


def test_the_network_is_the_same_each_time():
    texts, labels = motif_data(60)
    letters = values_of(texts).letters(np.arange(60))
    first, again = (fit_network(letters[:50], labels[:50], letters[50:], 2, seed=3) for _ in range(2))
    assert (first == again).all() and first.sum(axis=1) == pytest.approx(1)


def test_sequences_get_their_own_controls():
    assert which_controls("default", sequences=True) == ("majority", "kmer6_logistic")
    assert which_controls("full", sequences=True) == (
        "majority",
        "kmer6_logistic",
        "gc_logistic",
        "cnn",
        "linear_probe",
        "knn",
    )
    assert which_controls("default", sequences=True, numbers=True) == ("train_mean", "kmer6_ridge")
    assert set(DESCRIPTIONS) == set(READS)
    assert not {"cnn", "kmer6_logistic"} & set(which_controls("full"))
