"""Vocabularies made from nucleotides: learned pieces, k-mers, single letters, as tokenizer folders."""

import numpy as np
import pytest

from bmfm_pipeline.errors import DataError
from bmfm_pipeline.vocabulary import Vocabulary
from bmfm_pipeline.vocabulary.nucleotides import make_byte_pairs, make_kmers
from bmfm_pipeline.vocabulary.sequences import SequenceTokenizer


def random_texts(n, size, seed=0):
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(list("ACGT"), size=size)) for _ in range(n)]


def encode(tokenizer, texts):
    letters = np.frombuffer("".join(texts).encode(), dtype=np.uint8)
    return tokenizer.encode(letters, np.concatenate([[0], np.cumsum([len(text) for text in texts])]).astype(np.int64))


def test_pieces_are_learned_alike_each_time_and_spell_the_sequence(tmp_path):
    motif = "GATTACAGATTACA"
    texts = [motif + text for text in random_texts(300, 150)]
    assert make_byte_pairs(tmp_path / "a", texts, 200) == make_byte_pairs(tmp_path / "b", texts, 200) == 200
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == (tmp_path / "b" / "tokenizer.json").read_bytes()
    tokenizer = SequenceTokenizer(tmp_path / "a")
    vocabulary = tokenizer.vocabulary
    assert vocabulary.subwords and vocabulary.n_special == 5 and vocabulary.tokens[5:10] == list("ACGNT")
    assert max(map(len, vocabulary.tokens[5:])) <= 32 and any(len(token) >= 7 for token in vocabulary.tokens)
    new = random_texts(5, 300, seed=9)
    ids, lengths = encode(tokenizer, new)
    ends = np.cumsum(lengths)
    for text, end, length in zip(new, ends, lengths, strict=True):
        assert "".join(vocabulary.tokens[index] for index in ids[end - length : end]) == text


def test_transformers_opens_the_folder(tmp_path):
    from transformers import PreTrainedTokenizerFast

    make_kmers(tmp_path, 3)
    theirs = PreTrainedTokenizerFast.from_pretrained(str(tmp_path))
    ours = SequenceTokenizer(tmp_path)
    assert theirs("ACGTAC")["input_ids"] == [3, *ours.ids(["ACGTAC"])[0].tolist(), 1]


def test_kmers_are_cut_from_the_left_and_the_rest_is_shorter(tmp_path):
    assert make_kmers(tmp_path, 3) == 5 + 5 + 16 + 64
    tokenizer = SequenceTokenizer(tmp_path)
    (ids,) = tokenizer.ids(["acgTTAG"])
    assert [tokenizer.vocabulary.tokens[index] for index in ids] == ["ACG", "TTA", "G"]
    assert tokenizer.ids(["ANT"])[0].tolist() == [0]
    assert Vocabulary.load(tmp_path).subwords


def test_single_letters_are_looked_up(tmp_path):
    make_kmers(tmp_path, 1)
    tokenizer = SequenceTokenizer(tmp_path)
    ids, lengths = encode(tokenizer, ["ACgTN", "", "R"])
    assert lengths.tolist() == [5, 0, 1] and ids[-1] == 0
    assert ids[:5].tolist() == tokenizer.ids(["ACGTN"])[0].tolist()


def test_too_little_to_learn_from_says_what_to_do(tmp_path):
    with pytest.raises(DataError, match=r"vocabulary\.kind=kmer or nucleotide"):
        make_byte_pairs(tmp_path, ["ACGT"], 4096)
    with pytest.raises(DataError, match=r"k must lie in 1\.\.8"):
        make_kmers(tmp_path, 12)
