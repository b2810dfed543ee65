"""Pieces of sequences: upper and lower case, cutting and padding, folders that are something else."""

import pickle

import numpy as np
import pytest

from bmfm_pipeline.errors import DataError
from bmfm_pipeline.vocabulary import MultiFieldVocabulary, Vocabulary, build_vocabularies
from bmfm_pipeline.vocabulary.sequences import SequenceTokenizer

SEQUENCE = "GTTTGTTAACGTCTCTGGAGTTTTATCGCAATTCC"


@pytest.fixture
def folder(data_dir):
    return data_dir / "tokenizers" / "ref2vec" / "tokenizers" / "dna_chunks"


def test_lower_case_is_read_like_upper_case_unless_asked_otherwise(folder):
    tokenizer = SequenceTokenizer(folder)
    upper, lower = tokenizer.ids([SEQUENCE, SEQUENCE.lower()])
    assert upper.tolist() == lower.tolist() and (upper > 4).all()
    plain = pickle.loads(pickle.dumps(SequenceTokenizer(folder, upper_case=False)))
    ids, attention, unknown = plain.batch([SEQUENCE, SEQUENCE.lower()], 64)
    assert unknown == len(SEQUENCE) and ids.shape == attention.shape == (2, len(SEQUENCE) + 2)
    assert "".join(tokenizer.vocabulary.tokens[index] for index in upper) == SEQUENCE


def test_a_batch_is_cut_to_its_length_and_padded(folder):
    tokenizer = SequenceTokenizer(folder)
    ids, attention, _ = tokenizer.batch([SEQUENCE * 4, "ACGT", ""], 16)
    assert ids.shape == (3, 16) and ids[0, 0] == 3 and ids[0, -1] == 1 and ids[2].tolist() == [3, 1] + [2] * 14
    assert (attention == (ids != 2)).all()
    assert tokenizer.batch(["ACGT"], 100, pad_to_multiple_of=8)[0].shape == (1, 8)
    assert tokenizer.batch([], 16)[0].shape == (0, 2)
    assert np.array_equal(tokenizer.batch([SEQUENCE * 4], 16)[0][0, 1:15], tokenizer.ids([SEQUENCE * 4])[0][:14])
    with pytest.raises(DataError, match="max_length 2 leaves no room"):
        tokenizer.batch(["ACGT"], 2)


def test_rules_are_copied_and_never_lost(folder, tmp_path):
    tokenizer = SequenceTokenizer(folder)
    tokenizer.save(tmp_path / "dna_chunks")
    assert (
        SequenceTokenizer(tmp_path / "dna_chunks").ids([SEQUENCE])[0].tolist() == tokenizer.ids([SEQUENCE])[0].tolist()
    )
    with pytest.raises(DataError, match="cannot be saved without the rules"):
        MultiFieldVocabulary({"dna_chunks": Vocabulary.load(folder)}).save(tmp_path / "elsewhere")
    build_vocabularies(["CD3D"]).save(tmp_path / "genes")
    with pytest.raises(DataError, match="holds whole words"):
        SequenceTokenizer(tmp_path / "genes" / "tokenizers" / "genes")
