"""Vocabularies made from nucleotides: learned pieces, k-mers, single letters, as tokenizer folders."""

import itertools
import json

import numpy as np
import pytest

from bmfm_pipeline.errors import DataError
from bmfm_pipeline.vocabulary import Vocabulary
from bmfm_pipeline.vocabulary.alleles import as_text, code, signs
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


def test_pieces_hold_pairs_of_alleles(tmp_path):
    snp, gap = code("C", "T"), code("G", "-")
    rng = np.random.default_rng(0)
    letters = np.frombuffer(b"ACGT", np.uint8)[rng.integers(0, 4, 40_000)].copy()
    letters[5::40], letters[6::40], letters[25::80] = snp, ord("A"), gap
    starts = np.arange(0, 40_001, 100)
    also = signs([snp, gap])
    texts = [as_text(letters[a:b]) for a, b in itertools.pairwise(starts)]
    assert make_byte_pairs(tmp_path / "bpe", texts, 120, also) == 120
    tokenizer = SequenceTokenizer(tmp_path / "bpe")
    assert any(len(token) > 1 and also[0] in token for token in tokenizer.vocabulary.tokens)
    ids, counts = tokenizer.encode(letters, starts)
    assert "".join(tokenizer.vocabulary.tokens[index] for index in ids) == "".join(texts) and counts.sum() == len(ids)
    make_kmers(tmp_path / "single", 1, also)
    single = SequenceTokenizer(tmp_path / "single")
    ids, counts = single.encode(letters[:100], np.array([0, 100]))
    assert [single.vocabulary.tokens[index] for index in ids] == list(texts[0])
    plain = tmp_path / "plain"
    make_kmers(plain, 1)
    assert int((SequenceTokenizer(plain).encode(letters[:100], np.array([0, 100]))[0] == 0).sum()) == 4


def test_a_folder_says_which_characters_its_pairs_have(tmp_path):
    make_kmers(tmp_path / "single", 1, "则高")
    (tmp_path / "single" / "alleles.json").write_text(json.dumps({"C>T": "则", "G>-": "高"}), encoding="utf-8")
    letters = np.array([ord("A"), code("C", "T"), code("G", "-"), code("C", "A")], np.uint8)
    tokenizer = SequenceTokenizer(tmp_path / "single")
    ids, _ = tokenizer.encode(letters, np.array([0, 4]))
    assert [tokenizer.vocabulary.tokens[index] for index in ids] == ["A", "则", "高", "[UNK]"]
    tokenizer.save(tmp_path / "copy")
    assert np.array_equal(SequenceTokenizer(tmp_path / "copy").encode(letters, np.array([0, 4]))[0], ids)


@pytest.mark.parametrize(
    "said", ['{"C>X": "则"}', '{"C>T": "two"}', "[]", '{"C>T": "则", "C>A": "则"}', '{"C>T": "A"}']
)
def test_a_broken_alphabet_is_refused(tmp_path, said):
    make_kmers(tmp_path, 1)
    (tmp_path / "alleles.json").write_text(said, encoding="utf-8")
    with pytest.raises(DataError, match=r"alleles\.json"):
        SequenceTokenizer(tmp_path)
