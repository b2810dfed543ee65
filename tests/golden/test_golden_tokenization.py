"""Vocabularies read from tokenizer folders against the stored sizes, ids and hashes of the compatible package bmfm_targets."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest

from bmfm_pipeline.vocabulary import MultiFieldVocabulary
from bmfm_pipeline.vocabulary.sequences import SequenceTokenizer


def _cases(prefix: str) -> list:
    folder = os.environ.get("BMFM_GOLDEN_DIR")
    files = sorted((Path(folder) / "tokenization").glob(f"{prefix}_*.json")) if folder and Path(folder).is_dir() else []
    return [pytest.param(path, id=path.stem.removeprefix(f"{prefix}_")) for path in files] or [
        pytest.param(None, id="no-golden")
    ]


def _load(data_dir: Path, file: Path, prefix: str) -> MultiFieldVocabulary:
    folder = data_dir / "tokenizers" / file.stem.removeprefix(f"{prefix}_")
    if not folder.is_dir():
        pytest.skip(f"no tokenizer folder {folder.name} in the data folder")
    return MultiFieldVocabulary.load(folder)


@pytest.mark.parametrize("file", _cases("vocab"))
def test_sizes_special_ids_and_every_token(file, golden_dir, data_dir):
    vocabularies = _load(data_dir, file, "vocab")
    compared = 0
    for field, expected in json.loads(file.read_text())["fields"].items():
        if field not in vocabularies:
            continue
        vocabulary = vocabularies[field]
        assert (len(vocabulary), vocabulary.n_special) == (expected["size"], expected["n_all_special"])
        assert vocabulary.tokens[:40] == expected["first_40"] and vocabulary.tokens[-3:] == expected["last_3"]
        assert (
            hashlib.sha256("\n".join(vocabulary.tokens).encode()).hexdigest()
            == expected["sha256_of_tokens_in_id_order"]
        )
        for token, index in expected["special_tokens"].items():
            assert vocabulary.ids([token]).tolist() == [index]
        for name in ("S", "T"):
            assert vocabulary.ids([f"[{name}]"]).tolist() == [expected[name] or 0]
        compared += 1
    assert compared == len(vocabularies)


@pytest.mark.parametrize("file", _cases("token_lookup"))
def test_ids_of_known_and_unknown_words(file, golden_dir, data_dir):
    vocabularies = _load(data_dir, file, "token_lookup")
    expected = json.loads(file.read_text())
    assert vocabularies["genes"].ids(expected["gene_tokens"]).tolist() == expected["gene_ids"]
    assert vocabularies["expressions"].ids(expected["expression_tokens"]).tolist() == expected["expression_ids"]


@pytest.mark.parametrize("file", _cases("dna"))
def test_sequences_alone_and_in_a_batch(file, golden_dir, data_dir):
    identifier = file.stem.removeprefix("dna_")
    tokenizer = SequenceTokenizer(data_dir / "tokenizers" / identifier / "tokenizers" / "dna_chunks", upper_case=False)
    expected = json.loads(file.read_text())
    sequences = [entry["sequence"] for entry in expected["sequences"]]
    for entry, found in zip(expected["sequences"], tokenizer.ids(sequences), strict=True):
        assert [3, *found.tolist(), 1] == entry["ids"], entry["sequence"]
    batch = expected["batch_max_length_32"]
    wanted = np.array(batch["input_ids"])
    ids, attention, unknown = tokenizer.batch(sequences[: len(wanted)], 32, pad_to_length=True)
    assert ids.tolist() == wanted[:, 0].tolist() and attention.tolist() == batch["attention_mask"]
    assert unknown == np.count_nonzero(wanted == 0)
