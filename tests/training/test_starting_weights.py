"""Fine-tuning begins with pretrained weights, and accounts for every tensor of them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_cases import checkpoint, notes

from bmfm_pipeline.errors import CheckpointError, ConfigError


@pytest.fixture
def pretrained(cases) -> Path:
    spec = cases.spec("pretrained", task__max_epochs=1)
    cases.train(spec)
    return Path(spec.run_dir) / "model"


STILL = {"trainer__learning_rate": 1e-30, "task__max_epochs": 1}


def test_fine_tuning_starts_from_the_pretrained_weights_and_lists_every_tensor(cases, pretrained):
    spec = cases.spec("finetune", "finetune", init_from=pretrained, **STILL)
    summary, events = cases.train(spec)
    report = json.loads((Path(spec.run_dir) / "loading_report.json").read_text())
    weights, start = checkpoint(spec)["state_dict"], load_file(pretrained / "model.safetensors")
    assert report["loaded"]
    for name in report["loaded"]:
        torch.testing.assert_close(weights[f"model.{name}"], start[name], rtol=0, atol=1e-20)
    assert report["missing"] == report["unexpected"] == []
    assert report["new_heads"] == ["label head celltype"]
    assert any("field head" in name for name in report["not_used"])
    assert any(text.startswith("weights from") and "tensors loaded" in text for text in notes(events))
    assert summary["best_validation_loss"] > 0


def test_sizes_that_nobody_wrote_are_those_of_the_checkpoint(cases, pretrained):
    spec = cases.spec(
        "finetune", "finetune", init_from=pretrained, model__hidden_size=64, sizes_from_checkpoint=True, **STILL
    )
    cases.train(spec)
    stored = json.loads((Path(spec.run_dir) / "model" / "config.json").read_text())
    assert (stored["hidden_size"], stored["intermediate_size"]) == (16, 32)


def test_the_type_is_the_checkpoints_unless_a_person_chose_another(cases):
    tiny = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    short = {"task__max_epochs": 1, "task__limit_train_batches": 2}
    source = cases.spec(
        "pretrained", model={"model_type": "scperformer", "feature_redraw_interval": 1, **tiny}, **short
    )
    cases.train(source)
    folder = Path(source.run_dir) / "model"
    stored = json.loads((folder / "config.json").read_text())
    assert stored["model_type"] == "scperformer" and stored["feature_seed"] >= 0
    spec = cases.spec("finetune", "finetune", init_from=folder, sizes_from_checkpoint=True, **short)
    _, events = cases.train(spec)
    assert "model: scperformer, as the checkpoint it starts from" in notes(events)
    tuned = json.loads((Path(spec.run_dir) / "model" / "config.json").read_text())
    same = ("model_type", "hidden_size", "feature_seed", "feature_redraw_interval")
    assert [tuned[name] for name in same] == [stored[name] for name in same]
    passes = "scperformer.training_passes"
    before, after = (load_file(path / "model.safetensors")[passes] for path in (folder, Path(spec.run_dir) / "model"))
    assert (before, after) == (2, 4)  # the count of passes goes on
    other = cases.spec(
        "other",
        "finetune",
        init_from=folder,
        sizes_from_checkpoint=True,
        model={"model_type": "scllama", **tiny},
        **short,
    )
    with pytest.raises(
        ConfigError, match="asks for scllama, but the checkpoint it starts from is scperformer; use model=performer"
    ):
        cases.train(other)


def test_a_checkpoint_that_does_not_fit_is_refused_tensor_by_tensor(cases, pretrained):
    spec = cases.spec(
        "finetune", "finetune", init_from=pretrained, model__hidden_size=32, sizes_from_checkpoint=False, **STILL
    )
    with pytest.raises(
        CheckpointError, match=r"do not fit.*nothing was loaded(?s:.*)word_embeddings|embeddings"
    ) as error:
        cases.train(spec)
    assert "(765" in str(error.value) or "16)" in str(error.value)
    assert not (Path(spec.run_dir) / "model").exists()


def test_a_resumed_run_keeps_its_weights_and_its_report(cases, pretrained):
    spec = cases.spec("finetune", "finetune", init_from=pretrained, task__max_epochs=1)
    cases.train(spec)
    report = (Path(spec.run_dir) / "loading_report.json").read_text()
    _, events = cases.train(spec)
    assert any("resuming" in text for text in notes(events))
    assert not any("tensors loaded" in text for text in notes(events))
    assert (Path(spec.run_dir) / "loading_report.json").read_text() == report
