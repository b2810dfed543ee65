"""Encoder and linear path weighed on dev cells: what is picked, what the model then says, and where nothing is picked."""

import json

import numpy as np
import pytest
import torch

from bmfm_pipeline.models import load_model
from bmfm_pipeline.models.embeddings import FieldEmbeddings
from bmfm_pipeline.models.heads import LabelHeads
from bmfm_pipeline.models.registry import build_model
from bmfm_pipeline.training.path_shares import blended, pick_share, store_shares

SETTINGS = {
    "model_type": "scbert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 32,
    "position_embedding_type": "absolute", "max_position_embeddings": 32, "linear_path": True, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
FIELDS = [{"field_name": "dna_chunks", "vocab_size": 10, "num_special_tokens": 5, "is_masked": False}]


def make(**more):
    torch.manual_seed(0)
    labels = [{"label_column_name": "label", "n_unique_values": 2}]
    return build_model({**SETTINGS, **more}, FIELDS, labels)


def scores(n: int, strength: float, seed: int, truth: np.ndarray) -> np.ndarray:
    found = np.random.default_rng(seed).normal(size=(n, 2))
    found[np.arange(n), truth] += strength
    return found


def test_the_path_that_knows_more_counts_more():
    truth = np.random.default_rng(0).integers(0, 2, 400)
    good, poor = scores(400, 3, 1, truth), scores(400, 0, 2, truth)
    strong = pick_share(np.stack([good, poor]), truth, False, False)
    weak = pick_share(np.stack([poor, good]), truth, False, False)
    both = pick_share(np.stack([good, scores(400, 3, 3, truth)]), truth, False, False)
    assert strong["encoder_share"] >= 0.9 and weak["encoder_share"] <= 0.1 and 0.3 <= both["encoder_share"] <= 0.7
    for found in (strong, weak, both):
        assert found["loss"] <= found["loss_equal"] and found["n"] == 400


def test_numbers_are_weighed_by_the_squared_error_and_classes_of_several_by_each():
    truth = np.random.default_rng(0).normal(size=300)
    paths = np.stack([truth + 0.1, np.zeros(300)])[:, :, None]
    assert pick_share(paths, truth, False, True)["encoder_share"] == 1.0
    several = np.random.default_rng(1).integers(0, 2, (300, 3)).astype(np.float32)
    several[:20] = -100
    known = several * 4 - 2 + np.random.default_rng(2).normal(size=several.shape)
    found = pick_share(np.stack([np.zeros_like(known), known]), several, True, False)
    assert found["encoder_share"] < 0.5 and found["n"] == 280


def test_few_labels_leave_both_paths_alike_and_say_so():
    truth = np.full(300, -100)
    truth[:99] = 0
    found = pick_share(np.zeros((2, 300, 2)), truth, False, False)
    assert found["encoder_share"] == 0.5 and "99 dev cells are too few" in found["note"]


def test_the_share_is_kept_with_the_model_and_its_scores_are_blended(tmp_path):
    model = make().eval()
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "first_letter"):
                module.weight.normal_()
    model.save_pretrained(tmp_path)
    ids = torch.tensor([[[3, 5, 6, 7, 8, 5, 1]]])
    mask = torch.ones(1, 7, dtype=torch.int64)

    def read(folder) -> tuple[np.ndarray, np.ndarray]:
        loaded = load_model(folder)
        for heads in (module for module in loaded.modules() if isinstance(module, LabelHeads)):
            heads.keep_paths = True
        with torch.no_grad():
            logits = loaded(ids, mask).logits
        return logits["label"].numpy(), logits[LabelHeads.paths_key("label")].numpy()

    equal, paths = read(tmp_path)
    np.testing.assert_allclose(equal, paths.mean(axis=0), rtol=1e-6)
    store_shares(tmp_path, {"label": 0.2})
    assert json.loads((tmp_path / "config.json").read_text())["label_columns"][0]["encoder_share"] == 0.2
    np.testing.assert_allclose(read(tmp_path)[0], blended(paths, 0.2), rtol=1e-5, atol=1e-6)
    assert not np.allclose(blended(paths, 0.2), equal)


@pytest.mark.parametrize("packed", [False, True])
def test_in_training_positions_go_for_whole_sequences_and_never_in_evaluation(packed):
    embeddings = next(module for module in make(position_dropout=0.5).modules() if isinstance(module, FieldEmbeddings))
    with torch.no_grad():
        embeddings.position_embeddings.weight.fill_(1.0)
    ids = torch.full((200, 1, 6), 5)
    places = None
    if packed:
        ids, places = ids.reshape(1, 1, 1200), torch.arange(6).repeat(200)
    plain = embeddings.embed_field("dna_chunks", ids[:, 0])
    torch.manual_seed(1)
    added = (embeddings.train().sums(ids, places)[0] - plain).reshape(200, 6, -1)
    per_sequence = added.flatten(1)
    assert bool(((per_sequence > 0.99).all(1) | (per_sequence.abs() < 0.01).all(1)).all())
    assert 70 < int((per_sequence > 0.5).all(1).sum()) < 130
    added = embeddings.eval().sums(ids, places)[0] - plain
    torch.testing.assert_close(added, torch.ones_like(added))
