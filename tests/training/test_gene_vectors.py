"""What a model is told of the genes before training: singular vectors of their expression, and the sizes of their values."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import sparse
from training_cases import checkpoint, notes

from bmfm_pipeline.config import RunConfig
from bmfm_pipeline.errors import ConfigError
from bmfm_pipeline.models import load_model
from bmfm_pipeline.models.expressed import GeneScores
from bmfm_pipeline.training import build_data_module
from bmfm_pipeline.training.gene_vectors import (
    measure_linear_paths,
    singular_vectors,
    square_root_shares,
    start_from_singular_vectors,
)
from bmfm_pipeline.training.module import build_module

NUMBERS = {
    "data_module__sqrt_normalize_transform": True,
    "model__cell_summary": True,
    "model__linear_path": True,
}


def as_numbers(cases, name: str, stage: str, **changes):
    fields = [
        {"field_name": "genes", "is_masked": False},
        {
            "field_name": "expressions",
            "is_masked": stage == "pretrain",
            "tokenization_strategy": "continuous_value_encoder",
        },
    ]
    losses = [{"field_name": "expressions", "name": "mse"}] if stage == "pretrain" else None
    more = {} if losses is None else {"trainer__losses": losses}
    return cases.spec(name, stage, **{"fields": fields, **NUMBERS, **more, **changes})


def test_shares_have_rows_of_length_one_and_an_empty_cell_stays_empty():
    matrix = square_root_shares(sparse.csr_matrix([[4, 0, 12], [0, 0, 0]]))
    np.testing.assert_allclose(matrix.toarray(), [[0.5, 0, 0.75**0.5], [0, 0, 0]])


def test_singular_vectors_are_those_of_numpy_up_to_sign_and_the_same_every_time():
    matrix = sparse.random(30, 12, 0.5, format="csr", random_state=0, dtype=np.float32)
    found = singular_vectors(matrix, 4, seed=1)
    expected = np.linalg.svd(matrix.toarray(), full_matrices=False)[2][:4].T
    np.testing.assert_allclose(np.abs(found), np.abs(expected), atol=1e-4)
    assert all(column[np.abs(column).argmax()] > 0 for column in found.T)
    assert np.array_equal(found, singular_vectors(matrix, 4, seed=1))
    wide = singular_vectors(matrix, 20, seed=1)
    assert wide.shape == (12, 20) and not wide[:, 11:].any()


def test_vectors_and_sizes_are_taken_from_training_cells_alone(cases):
    run = RunConfig.model_validate(as_numbers(cases, "start", "finetune", data_module__max_length=912).config)
    data = build_data_module(run, cases.data)
    data.setup("fit")
    model = build_module(run, data).model
    before = model.backbone.embeddings.genes_embeddings.weight.detach().clone()
    sentence = start_from_singular_vectors(model, data, seed=1)
    after = model.backbone.embeddings.genes_embeddings.weight.detach()
    train = data.prepared.store.counts.rows(data.rows["train"])
    tokens = data.prepared.vocabularies["genes"].ids(data.prepared.store.var_names)
    expressed = tokens[np.asarray((train > 0).sum(axis=0)).ravel() > 0]
    changed = torch.nonzero((before != after).any(dim=1)).flatten().tolist()
    assert sorted(expressed.tolist()) == changed
    assert f"{len(changed)} genes" in sentence and f"{len(data.rows['train'])} training cells" in sentence
    assert after[changed].square().mean().sqrt().item() == pytest.approx(model.config.initializer_range, rel=1e-4)

    assert measure_linear_paths(model, data) == 1
    path = next(module for module in model.modules() if isinstance(module, GeneScores))
    shares = np.asarray(train.multiply(1 / train.sum(axis=1)).mean(axis=0)).ravel()
    np.testing.assert_allclose(path.sizes[tokens].numpy() ** 2, shares, atol=1e-5)
    torch.nn.init.ones_(path.weight)
    assert measure_linear_paths(model, data) == 0


def test_a_pretrained_model_of_numbers_is_fine_tuned_with_a_linear_path_of_its_own(cases):
    before = as_numbers(
        cases,
        "numbers-pretrain",
        "pretrain",
        model__gene_vectors="svd",
        task__max_epochs=1,
        data_module__max_length=912,
    )
    _, events = cases.train(before)
    assert any("singular vectors of 100 training cells" in text for text in notes(events))
    start = Path(before.run_dir) / "model"
    spec = as_numbers(
        cases, "numbers-finetune", "finetune", init_from=start, task__max_epochs=1, data_module__max_length=912,
        sizes_from_checkpoint=True,
    )  # fmt: skip
    cases.train(spec)
    weights = checkpoint(spec)["state_dict"]
    name = "model.cls.label_predictions.predictions.label_decoders.celltype.linear_path"
    assert weights[f"{name}.weight"].any()
    assert weights[f"{name}.sizes"].square().sum().item() == pytest.approx(1.0, rel=1e-3)
    model = load_model(Path(spec.run_dir) / "model")
    assert model.config.cell_summary and model.config.linear_path
    report = json.loads((Path(spec.run_dir) / "loading_report.json").read_text())
    assert report["new_heads"] == ["label head celltype"]


def test_vectors_are_refused_where_the_embedding_comes_from_a_file(cases):
    class Network(torch.nn.Module):
        class backbone:
            embeddings = torch.nn.Module()

    with pytest.raises(ConfigError, match=r"model\.gene_vectors: svd needs an embedding"):
        start_from_singular_vectors(Network(), None, 0)
