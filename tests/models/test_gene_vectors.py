"""Pretrained gene vectors: which rows of the file are used and kept, and that no optimiser moves the kept ones."""

import pytest
import torch

from bmfm_pipeline.errors import ConfigError, DataError
from bmfm_pipeline.models import build_model
from bmfm_pipeline.models.gene2vec import describe_pretrained, read_vectors

VOCABULARY = ["[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]", "CD3D", "LYZ", "MS4A1", "NKG7"]
SIZES = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "hidden_dropout_prob": 0.0,
}


@pytest.fixture
def table(tmp_path):
    file = tmp_path / "vectors.txt"
    file.write_text("4 4\nCD3D 1 2 3 4\nUNKNOWN 9 9 9 9\nMS4A1 5 6 7 8\nNKG7 -1 -2 -3 -4\n")
    return file


def made(table, **settings):
    genes = {
        "field_name": "genes",
        "vocab_size": len(VOCABULARY),
        "num_special_tokens": 5,
        "pretrained_embedding": {"filename": str(table), **settings},
    }
    torch.manual_seed(0)
    labels = [{"label_column_name": "x", "n_unique_values": 2}]
    return build_model(SIZES, [genes], labels, vocabularies={"genes": VOCABULARY})


def test_kept_rows_do_not_move_under_adamw_with_weight_decay(table):
    from bmfm_pipeline.training.optimiser import decay_groups

    model = made(table)
    embedding = model.backbone.embeddings.genes_embeddings
    before = embedding.weight.detach().clone()
    projection = model.backbone.embeddings.genes_embeddings_projection.weight.detach().clone()
    optimizer = torch.optim.AdamW(decay_groups(model, 0.5), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.tensor([[[3, 5, 6, 7, 8, 1]]])).logits["x"].square().sum().backward()
        optimizer.step()
    assert torch.equal(embedding.weight[[5, 7, 8]], before[[5, 7, 8]])
    assert not torch.allclose(embedding.weight[6], before[6])
    assert not torch.allclose(model.backbone.embeddings.genes_embeddings_projection.weight, projection)


def test_rows_to_use_and_tokens_to_keep_can_be_named(table):
    model = made(table, pre_trained_indices_to_use=[0, 1, 2], embedding_indices_to_freeze=[7])
    embedding = model.backbone.embeddings.genes_embeddings
    assert embedding.weight[5].tolist() == [1, 2, 3, 4] and embedding.weight[7].tolist() == [5, 6, 7, 8]
    assert embedding.weight[8].tolist() != [-1, -2, -3, -4]
    assert embedding.frozen_rows.nonzero().flatten().tolist() == [7]
    assert describe_pretrained(model.config.fields) == [
        f"fields.genes.pretrained_embedding: 2 of 9 tokens have a vector in {table} (4 rows), 1 are kept as they are; the others "
        "start at random"
    ]
    assert not made(table, embedding_indices_to_freeze=[]).backbone.embeddings.genes_embeddings.frozen_rows.any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pre_trained_indices_to_use": [4]}, r"\[4\] are no rows of .*, which has 0 to 3"),
        ({"pre_trained_indices_to_use": [1]}, "none of these rows"),
        ({"embedding_indices_to_freeze": [5, 6]}, r"token ids \[6\] got no vector .*for example \[5, 7, 8\]"),
    ],
)
def test_rows_and_tokens_that_do_not_exist_are_refused(table, settings, message):
    with pytest.raises(ConfigError, match=message):
        made(table, **settings)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("CD3D 1 2\n", "expected 'rows width'"),
        ("1 2\nCD3D 1\n", "line 2: 1 values; the header promises 2"),
        ("1 2\nCD3D 1 x\n", "line 2: could not convert"),
        ("1 2\nCD3D 1 nan\n", "line 2: the vector of CD3D holds a value that is not a number"),
        ("2 2\nCD3D 1 2\n", "1 vectors; the header promises 2"),
    ],
)
def test_a_damaged_file_is_refused_with_its_line(tmp_path, text, message):
    (tmp_path / "vectors.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        read_vectors(tmp_path / "vectors.txt")
