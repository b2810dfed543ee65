"""Fine-tuning begins with pretrained weights, and accounts for every tensor of them."""

import json
import shutil
from pathlib import Path

import anndata
import pytest
import torch
from safetensors.torch import load_file
from training_cases import checkpoint, exported, notes

from bmfm_pipeline.errors import CheckpointError, ConfigError
from bmfm_pipeline.models import load_model, model_folder
from bmfm_pipeline.stages import plan_stage, run_stage
from bmfm_pipeline.training import TrainSpec
from bmfm_pipeline.vocabulary import MultiFieldVocabulary


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


def test_other_cells_are_read_with_the_vocabulary_of_the_weights(cases, pretrained, mini_h5ad, tmp_path):
    mini = anndata.read_h5ad(mini_h5ad)
    other = mini[list(range(0, 700, 2)), list(range(764, -1, -2))].copy()
    names = other.var_names.to_list()
    other.var_names = [*names[:-2], "NEW-1", "NEW-2"]
    other.write_h5ad(tmp_path / "other.h5ad")
    words = [
        "preset=none",
        "task.max_steps=2",
        "data_module.max_length=32",
        "task.precision=32-true",
        "model.load=backbone",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BMFM_WORKSPACE", str(cases.data.parents[2]))
        data, job = plan_stage(
            "finetune",
            str(tmp_path / "other.h5ad"),
            label="celltype",
            overrides=[*words, f"model.checkpoint={pretrained}"],
        )
        found = run_stage(data)
    said = [note for note in job.config["notes"] if note.startswith("tokenizer:")]
    assert len(said) == 1 and str(pretrained) in said[0]
    for name in ("genes", "expressions"):
        stored = MultiFieldVocabulary.load(pretrained)[name].sha256
        assert MultiFieldVocabulary.load(found["uri"])[name].sha256 == stored
    spec = TrainSpec("finetune", job.config, found["uri"], str(tmp_path / "run"), str(pretrained))
    cases.train(spec)
    report = json.loads((tmp_path / "run" / "loading_report.json").read_text())
    assert report["policy"] == "backbone" and report["source"] == str(pretrained) and report["new_heads"]
    embeddings = "scbert.embeddings.genes_embeddings.weight"
    assert embeddings in report["loaded"]
    assert exported(spec)[embeddings].shape == load_file(pretrained / "model.safetensors")[embeddings].shape


def test_other_heads_than_those_of_a_foreign_model_are_refused_with_the_way_out(cases, pretrained):
    spec = cases.spec("finetune", "finetune", init_from=pretrained, model__load="strict", **STILL)
    with pytest.raises(CheckpointError, match=r"(?s)label head|celltype.*set model\.load=backbone"):
        cases.train(spec)
    spec = cases.spec("bare", "finetune", init_from=pretrained, model__load="encoder", **STILL)
    cases.train(spec)
    report = json.loads((Path(spec.run_dir) / "loading_report.json").read_text())
    assert report["new_heads"] == ["label head celltype"] and not any(
        name.startswith("cls.") for name in report["loaded"]
    )


def test_a_checkpoint_of_a_training_is_the_model_at_that_step(cases):
    spec = cases.spec("pretrained", task__max_epochs=1, task__limit_train_batches=2)
    cases.train(spec)
    folder = Path(spec.run_dir) / "model"
    shutil.copytree(Path(spec.run_dir) / "checkpoints", folder / "checkpoints")
    model = load_model(folder / "checkpoints" / "last.ckpt")
    wanted = checkpoint(spec)["state_dict"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, wanted[f"model.{name}"]), name
    folder = model_folder(folder / "checkpoints" / "last.ckpt")
    assert {"bmfm.json", "transforms.json", "tokenizers", "label_dict.json"} <= {
        entry.name for entry in folder.iterdir()
    }
    shutil.copyfile(Path(spec.run_dir) / "checkpoints" / "last.ckpt", Path(spec.run_dir) / "alone.ckpt")
    with pytest.raises(CheckpointError, match="without their configuration"):
        load_model(Path(spec.run_dir) / "alone.ckpt")


def test_a_resumed_run_keeps_its_weights_and_its_report(cases, pretrained):
    spec = cases.spec("finetune", "finetune", init_from=pretrained, task__max_epochs=1)
    cases.train(spec)
    report = (Path(spec.run_dir) / "loading_report.json").read_text()
    _, events = cases.train(spec)
    assert any("resuming" in text for text in notes(events))
    assert not any("tensors loaded" in text for text in notes(events))
    assert (Path(spec.run_dir) / "loading_report.json").read_text() == report
