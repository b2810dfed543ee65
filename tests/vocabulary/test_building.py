"""Vocabularies built from genes or a gene table, extended, given further special tokens, or read from older folders."""

import json
from zipfile import ZipFile

import pytest

from bmfm_pipeline.errors import DataError
from bmfm_pipeline.vocabulary import SPECIAL_TOKENS, MultiFieldVocabulary, build_vocabularies
from bmfm_pipeline.vocabulary.building import MOST_VALUES, hgnc_genes, with_tokens, with_values

GENES = ["CD3D", "HLA-A", "NKG7"]
CLASSES = ["[CLS_0]", "[CLS_1]"]


def test_tokens_to_prepend_are_special_in_every_field_and_genes_end_with_read_depth_tokens():
    fields = build_vocabularies(GENES, 3, [*CLASSES, "[CLS]"])
    assert fields["genes"].tokens == [*SPECIAL_TOKENS, *CLASSES, *GENES, "[S]", "[T]"]
    assert fields["expressions"].tokens == [*SPECIAL_TOKENS, *CLASSES, "0", "1", "2"]
    assert {vocabulary.n_special for vocabulary in fields.values()} == {7}
    assert fields.prefix_ids(CLASSES) == (5, 6)
    assert fields.prefix_ids(None) == fields.prefix_ids(["[CLS]"]) == (3,)


def test_a_token_to_prepend_that_a_vocabulary_lacks_is_named():
    fields = build_vocabularies(GENES, 3, CLASSES)
    with pytest.raises(DataError, match=r"vocabulary of 'genes' has no \[CLS_7\]; its tokens in brackets are \[UNK\]"):
        fields.prefix_ids(["[CLS_0]", "[CLS_7]"])
    fields["expressions"] = build_vocabularies(GENES, 3, CLASSES[::-1])["expressions"]
    with pytest.raises(
        DataError, match=r"ids \[5, 6\] in the vocabulary of 'genes' and \[6, 5\] in that of 'expressions'"
    ):
        fields.prefix_ids(CLASSES)


def test_growing_keeps_ids_and_stops_before_nobody_would_wait_for_it():
    vocabulary = build_vocabularies(GENES, 3)["expressions"]
    grown = with_values(vocabulary, 5.0, "fields.expressions")
    assert grown.ids(["0", "2", "3", "5", "6"]).tolist() == [5, 7, 8, 10, 0]
    assert grown.value_ids().tolist() == [5, 6, 7, 8, 9, 10]
    assert with_values(grown, 2.0, "fields.expressions") is grown
    assert with_tokens(build_vocabularies(GENES)["genes"], ["NKG7", "TP53", "TP53"]).tokens[-3:] == [
        "[S]",
        "[T]",
        "TP53",
    ]
    with pytest.raises(DataError, match=r"fields\.expressions: values reach 20000.*BinTransform"):
        with_values(vocabulary, float(MOST_VALUES), "fields.expressions")


def test_an_older_folder_with_all_fields_in_one_file(tmp_path):
    words = {"genes": [*SPECIAL_TOKENS, "[CLS_0]", *GENES], "expressions": [*SPECIAL_TOKENS, "[CLS_0]", "0", "1"]}
    (tmp_path / "multifield_vocab.json").write_text(json.dumps(words))
    found = MultiFieldVocabulary.load(tmp_path)
    assert {name: vocabulary.tokens for name, vocabulary in found.items()} == words
    assert found["genes"].n_special == 6 and found.prefix_ids(["[CLS_0]"]) == (5,)
    found.save(tmp_path / "new")
    assert MultiFieldVocabulary.load(tmp_path / "new")["genes"].sha256 == found["genes"].sha256
    by_id = {name: {token: index for index, token in enumerate(tokens)} for name, tokens in words.items()}
    (tmp_path / "multifield_vocab.json").write_text(json.dumps(by_id))
    assert MultiFieldVocabulary.load(tmp_path)["genes"].sha256 == found["genes"].sha256
    (tmp_path / "multifield_vocab.json").write_text("[1]")
    with pytest.raises(DataError, match="must map each field to its tokens"):
        MultiFieldVocabulary.load(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        MultiFieldVocabulary.load(tmp_path / "nowhere")


def test_genes_of_the_table_are_its_approved_symbols_whatever_their_order(data_dir, tmp_path):
    archive = data_dir / "genes" / "hgnc_complete_set.zip"
    every, coding = hgnc_genes(archive), hgnc_genes(archive, protein_coding=True)
    assert every == sorted(set(every)) and len(every) > 40_000
    assert 19_000 < len(coding) < 19_500 and set(coding) < set(every)
    assert "MALAT1" in every and "MALAT1" not in coding
    with ZipFile(archive) as opened:
        lines = opened.read("hgnc_complete_set.txt").decode().splitlines()
    (tmp_path / "turned.txt").write_text("\n".join([lines[0], *lines[:0:-1]]))
    assert hgnc_genes(tmp_path / "turned.txt", protein_coding=True) == coding
