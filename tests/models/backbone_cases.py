"""Small models of every backbone, and batches for them."""

import torch

from bmfm_pipeline.models import BACKBONES, build_model

NAMES = tuple(BACKBONES)
# Backbones whose attention is formed pair by pair.
EXACT = ("scbert", "scmodernbert", "scllama")
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
OWN = {
    "scnystromformer": {"num_landmarks": 8, "conv_kernel_size": 5},
    "scmodernbert": {"local_attention": 6},
    "scllama": {"num_memory_tokens": 2},
}
VOCABULARY = 40
FIELDS = [
    {
        "field_name": "genes",
        "vocab_size": VOCABULARY,
        "num_special_tokens": 5,
        "decode_modes": {"token_scores": {}},
    },
    {
        "field_name": "expressions",
        "vocab_size": 15,
        "num_special_tokens": 5,
        "is_masked": True,
        "tokenization_strategy": "continuous_value_encoder",
        "decode_modes": {
            "regression": {},
            "is_zero": {},
            "wced": {"vocab_field": "genes"},
            "mvc_regression": {"query_field": "genes"},
        },
    },
]
LABELS = [
    {"label_column_name": "celltype", "n_unique_values": 7},
    {"label_column_name": "tissue", "n_unique_values": 4, "task_group": "place"},
    {"label_column_name": "organ", "n_unique_values": 3, "task_group": "place", "classifier_depth": 2},
    {"label_column_name": "donor", "n_unique_values": 3, "decode_from": 1, "gradient_reversal_coefficient": 0.5},
    {"label_column_name": "age", "is_regression_label": True},
]


def model_of(name: str, seed: int = 0, **changes):
    """A model in evaluation mode whose weights, biases and norms are all visibly different from their first values."""
    torch.manual_seed(seed)
    model = build_model({"model_type": name, **SIZES, **OWN.get(name, {}), **changes}, FIELDS, LABELS).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def batch(rows: int = 4, length: int = 12, lengths: tuple[int, ...] | None = None, seed: int = 1):
    """(B, 2, L) genes and expression values, and a 0/1 mask (B, L); row i is `lengths[i]` long, by default i shorter than the batch."""
    generator = torch.Generator().manual_seed(seed)
    genes = torch.randint(5, VOCABULARY, (rows, length), generator=generator).float()
    values = torch.rand(rows, length, generator=generator) * 5
    ids = torch.stack([genes, values], dim=1)
    ids[:, 0, 0], ids[:, 1, 0] = 3, -4
    mask = torch.ones(rows, length, dtype=torch.int64)
    for row, end in enumerate(lengths or [length - row for row in range(rows)]):
        ids[row, 0, end:], ids[row, 1, end:], mask[row, end:] = 2, -3, 0
    return ids, mask


def check_positions(model, ids: torch.Tensor, mask: torch.Tensor) -> None:
    """Heads score the positions asked for as they do in the full pass."""
    positions = {"genes": torch.tensor([0, 5, 17, 40]), "expressions": torch.tensor([3, 30])}
    with torch.no_grad():
        full, some = model(ids, mask), model(ids, mask, positions=positions)
    assert list(full.logits) == list(some.logits)
    for key, value in full.logits.items():
        field = key.split("_")[0]
        if field in positions and not key.endswith("wced"):
            value = value.flatten(0, 1)[positions[field]]
        assert torch.allclose(some.logits[key], value, atol=1e-6), key


def scores_of_row(output, row: int, length: int) -> dict[str, torch.Tensor]:
    """The logits of one cell, padding cut off."""
    return {
        key: value[row, :length] if value.dim() == 3 and not key.endswith("_wced") else value[row]
        for key, value in output.logits.items()
    }
