"""The linear path of sequences: what it counts, that padding and other letters are no words, and what each position adds."""

import itertools
from collections import Counter

import pytest
import torch

from bmfm_pipeline.errors import ConfigError
from bmfm_pipeline.models import build_model
from bmfm_pipeline.models.words import LONGEST, STARTS, WORDS, WordScores

PAD, CLS, SEP, FIRST = 2, 3, 1, 5
PLACES = {
    "".join(word): STARTS[size - 1] + place
    for size in range(1, LONGEST + 1)
    for place, word in enumerate(itertools.product("ACGT", repeat=size))
}


def tokens(*texts):
    length = max(map(len, texts)) + 2
    rows = [[CLS, *(FIRST + "ACGTN".index(letter) for letter in text), SEP] for text in texts]
    return torch.tensor([row + [PAD] * (length - len(row)) for row in rows]).unsqueeze(1)


def expected(text: str) -> torch.Tensor:
    words = Counter(text[at : at + size] for size in range(1, LONGEST + 1) for at in range(len(text) - size + 1))
    values = torch.zeros(WORDS)
    for word, count in words.items():
        if "N" not in word:
            values[PLACES[word]] = count
    values = values.log1p()
    return WordScores.SCALE * values / values.norm()


def path(outputs=3):
    made = WordScores(FIRST, outputs)
    torch.nn.init.normal_(made.weight, generator=torch.Generator().manual_seed(0))
    return made


TEXTS = ("ACGTACGTTTACG", "GATTACA", "ACNGTACNNACGTAA", "T")


def test_words_are_counted_as_by_hand():
    made = path()
    with torch.no_grad():
        scores = made(tokens(*TEXTS))
        torch.testing.assert_close(
            scores, torch.stack([expected(text) for text in TEXTS]) @ made.weight.T, atol=1e-4, rtol=1e-4
        )
        for row, text in enumerate(TEXTS):
            torch.testing.assert_close(made(tokens(text))[0], scores[row], atol=1e-5, rtol=1e-5)


def test_what_positions_add_sums_to_the_scores_and_stays_within_words():
    made, ids = path(), tokens(*TEXTS, "NNNN")
    with torch.no_grad():
        parts = made.parts(ids)
        torch.testing.assert_close(parts.sum(dim=1), made(ids), atol=1e-4, rtol=1e-4)
    letters = (ids[:, 0] >= FIRST) & (ids[:, 0] < FIRST + 4)
    assert not parts[~letters].any() and parts[letters].any(dim=-1).all()
    assert not made(ids)[-1].any(), "a sequence without words has no scores"


def test_it_starts_silent_learns_by_itself_and_stands_beside_the_encoder():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    fields = [{"field_name": "dna_chunks", "vocab_size": 10, "num_special_tokens": 5}]
    labels = [{"label_column_name": "active", "n_unique_values": 2}]
    model = build_model({"model_type": "scbert", "linear_path": True, **sizes}, fields, labels).eval()
    ids = tokens(*TEXTS)
    model.cls.label_predictions.predictions.keep_paths = True
    logits = model(ids, (ids[:, 0] != PAD).long(), positions={}).logits
    assert not logits["active%paths"][1].any() and logits["active%paths"][0].any()
    torch.testing.assert_close(logits["active"], logits["active%paths"][0] / 2)


@pytest.mark.parametrize("size", [4096, 6])
def test_pieces_are_no_letters(size):
    with pytest.raises(ConfigError, match="counts words of single letters, and the field dna_chunks has"):
        build_model(
            {"model_type": "scbert", "hidden_size": 16, "num_attention_heads": 2, "linear_path": True},
            [{"field_name": "dna_chunks", "vocab_size": size, "num_special_tokens": 5}],
            [{"label_column_name": "active", "n_unique_values": 2}],
        )
