"""Vocabularies give the ids that models of this family expect, and their folders open in transformers."""

import json

import numpy as np
import pytest

from bmfm_pipeline.errors import DataError
from bmfm_pipeline.vocabulary import SPECIAL_TOKENS, MultiFieldVocabulary, Vocabulary, build_vocabularies

GENES = ["CD3D", "HLA-A", "RP11-34P13.7", "C1orf112"]


def test_special_ids_and_sizes():
    fields = build_vocabularies(GENES)
    assert {name: len(vocabulary) for name, vocabulary in fields.items()} == {
        "genes": 11,
        "expressions": 55,
        "label_expressions": 55,
        "perturbations": 7,
    }
    for vocabulary in fields.values():
        assert vocabulary.ids(SPECIAL_TOKENS).tolist() == [0, 1, 2, 3, 4] and vocabulary.n_special == 5
    assert len(build_vocabularies(GENES, 10)["expressions"]) == 15


def test_whole_words_only_and_case_matters():
    ids = build_vocabularies(GENES)["genes"].ids(["HLA-A", "hla-a", "HLA", " HLA-A", "C1orf112", "RP11-34P13.7", ""])
    assert ids.tolist() == [6, 0, 0, 0, 8, 7, 0]
    assert ids.dtype == np.int32


def test_expression_ids_and_values():
    vocabulary = build_vocabularies(GENES)["expressions"]
    assert vocabulary.ids(["0", "9", "49", "50", "1.0", "-1"]).tolist() == [5, 14, 54, 0, 0, 0]
    values = vocabulary.token_values()
    assert np.isnan(values[:5]).all() and values[5:].tolist() == list(range(50))
    assert vocabulary.value_ids().tolist() == list(range(5, 55))
    assert np.isnan(build_vocabularies(GENES)["genes"].token_values()).all()
    assert len(build_vocabularies(GENES)["genes"].value_ids()) == 0


def test_folders_open_in_transformers_and_agree(tmp_path):
    from transformers import PreTrainedTokenizerFast

    fields = build_vocabularies(GENES)
    fields.save(tmp_path)
    for name, words in (("genes", [*GENES, "hla-a"]), ("expressions", ["0", "12", "50"])):
        folder = tmp_path / "tokenizers" / name
        assert {path.name for path in folder.iterdir()} == {
            "tokenizer.json",
            "tokenizer_config.json",
            "special_tokens_map.json",
            "vocab.txt",
        }
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        assert (tokenizer.unk_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id) == (0, 1, 2)
        assert (tokenizer.cls_token_id, tokenizer.mask_token_id) == (3, 4)
        encoded = tokenizer(words, is_split_into_words=True)["input_ids"]
        assert encoded == [3, *fields[name].ids(words).tolist(), 1]


def test_saved_and_loaded_are_the_same(tmp_path):
    fields = build_vocabularies(GENES)
    fields.save(tmp_path)
    loaded = MultiFieldVocabulary.load(tmp_path)
    assert loaded.keys() == fields.keys()
    assert all(loaded[name].sha256 == fields[name].sha256 for name in fields)
    assert MultiFieldVocabulary.load(tmp_path / "tokenizers").keys() == fields.keys()
    assert build_vocabularies(GENES[::-1])["genes"].sha256 != fields["genes"].sha256


def test_more_special_tokens_are_kept(tmp_path):
    tokens = [*SPECIAL_TOKENS, "[CLS_0]", "[CLS_1]", "[S]", "CD3D"]
    Vocabulary(tokens, 7).save(tmp_path / "tokenizers" / "genes")
    loaded = MultiFieldVocabulary.load(tmp_path)["genes"]
    assert (loaded.tokens, loaded.n_special) == (tokens, 7)


@pytest.mark.parametrize("file", ["vocab.json", "vocab.txt"])
def test_folders_without_tokenizer_json(tmp_path, file):
    tokens = [*SPECIAL_TOKENS, "[CLS_0]", "CD3D", "HLA-A"]
    folder = tmp_path / "tokenizers" / "genes"
    folder.mkdir(parents=True)
    text = (
        "\n".join(tokens) + "\n"
        if file == "vocab.txt"
        else json.dumps({token: index for index, token in enumerate(tokens)})
    )
    (folder / file).write_text(text)
    loaded = MultiFieldVocabulary.load(tmp_path)["genes"]
    assert (loaded.tokens, loaded.n_special) == (tokens, 6)


def test_what_is_no_vocabulary_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"holds no tokenizers/<field>/tokenizer\.json"):
        MultiFieldVocabulary.load(tmp_path)
    with pytest.raises(DataError, match="tokens given twice: CD3D"):
        build_vocabularies(["CD3D", "HLA-A", "CD3D"])
    with pytest.raises(DataError, match=r"must begin with \[UNK\], \[SEP\]"):
        Vocabulary(["[PAD]", "[UNK]", "CD3D"])
    folder = tmp_path / "tokenizers" / "genes"
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({"[UNK]": 0, "CD3D": 7}))
    with pytest.raises(DataError, match=r"vocab\.json: token ids are not 0 to 1 without gaps"):
        MultiFieldVocabulary.load(tmp_path)
