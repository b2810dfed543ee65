"""Every packaged YAML file says at its top which command uses it, and that command composes, plans and takes one training step."""

import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from training_cases import StopAtLook

from bmfm_pipeline import cli
from bmfm_pipeline.config import RunConfig, compose, list_entries
from bmfm_pipeline.config.catalogue import FOLDER as CATALOGUE
from bmfm_pipeline.config.tree import PACKAGED
from bmfm_pipeline.errors import PipelineError
from bmfm_pipeline.stages import plan_pipeline, plan_stage, run_stage
from bmfm_pipeline.stages.planning import DEFAULT_CONFIGS
from bmfm_pipeline.stages.predict import predict_with_config

FILES = sorted([*PACKAGED.rglob("*.yaml"), *CATALOGUE.glob("*.yaml")])
SIZES = [
    "model.hidden_size=16",
    "model.num_hidden_layers=1",
    "model.num_attention_heads=2",
    "model.intermediate_size=32",
]
SHORT = ["data_module.max_length=32", "data_module.batch_size=4", "task.max_steps=1", "task.accelerator=cpu"]


def command_of(file: Path) -> list[str]:
    """The words of the command in the first line, or the second where Hydra needs the first."""
    lines = [line for line in file.read_text().splitlines()[:2] if not line.startswith("# @package")]
    found = re.fullmatch(r"# (?:Run|Use) with: (bmfm\S* .+)", lines[0])
    assert found, f"{file} does not start with `# Run with: COMMAND`, but with {lines[0]!r}"
    return shlex.split(found[1])


def uses(file: Path, words: list[str], known) -> bool:
    """Whether the command reads the file, which it names, takes by default, or finds in the one it names."""
    if file.parent == CATALOGUE:
        return known.target == file.stem
    if file.parent == PACKAGED:
        return (known.config_name or DEFAULT_CONFIGS[known.command]) == file.stem
    group = {"presets": "preset"}.get(file.parent.name, file.parent.name)
    chosen = next(word.partition("=")[2] for word in words if word.startswith(f"{group}="))
    return chosen == file.stem or re.search(rf"^defaults: \[{file.stem},", file.with_stem(chosen).read_text(), re.M)


@dataclass
class Place:
    """A workspace with the demonstration cells preprocessed and a tiny model fine-tuned on them."""

    workspace: str
    data: str
    model: str
    cells: str  # a few of them as a file
    catalogue: str  # the folder of zheng68k.h5ad

    def filled(self, word: str) -> str:
        """A word of a command with real files for the ones that stand for any."""
        key, equals, value = word.rpartition("=")
        return f"{key}{equals}{ {'path/to/model': self.model, 'cells.h5ad': self.cells}.get(value, value) }"


@pytest.fixture(scope="module")
def place(prepared, mini_h5ad, tmp_path_factory) -> Place:
    import anndata

    from bmfm_pipeline.stages import train as stage
    from bmfm_pipeline.training import TrainResult
    from bmfm_pipeline.training.child import train

    def in_this_process(spec, on_progress=None, **_):
        summary = train(spec, StopAtLook())
        run_dir = Path(spec.run_dir)
        best = run_dir / "checkpoints" / summary["best_checkpoint"]
        return TrainResult(best, best, run_dir / "model", run_dir / "history.jsonl", summary)

    folder, workspace = tmp_path_factory.mktemp("packaged"), str(prepared.parents[2])
    (folder / "h5ad").mkdir()
    (folder / "h5ad" / "zheng68k.h5ad").symlink_to(mini_h5ad)
    cells = folder / "cells.h5ad"
    anndata.read_h5ad(mini_h5ad)[:20].copy().write_h5ad(cells)
    few = ["data_module.limit_dataset_samples={train: 8, dev: 4, test: 4}"]
    with pytest.MonkeyPatch.context() as patch:  # another process would import everything again
        patch.setattr(stage, "train_in_child", in_this_process)
        job = plan_stage(
            "finetune", str(mini_h5ad), label="celltype", overrides=[*SIZES, *SHORT, *few], workspace=workspace
        )[-1]
        model = run_stage(job)["uri"]
    return Place(workspace, str(prepared), model, str(cells), str(folder))


def one_step(run: RunConfig, data_folder: str) -> None:
    """Train on one batch of the demonstration cells: the weights move."""
    import pytorch_lightning as pl

    from bmfm_pipeline.training import build_data_module, build_module
    from bmfm_pipeline.training.options import trainer_options

    data = build_data_module(run, data_folder)
    data.setup("fit")
    module = build_module(run, data)
    before = [parameter.detach().clone() for parameter in module.model.parameters()]
    options, _ = trainer_options(run.task, data.most_train_batches, 0, 1)
    trainer = pl.Trainer(**options)
    trainer.fit(module, data.train_dataloader())
    assert trainer.global_step == 1
    pairs = zip(before, module.model.parameters(), strict=True)
    assert any(not torch.equal(first, second) for first, second in pairs)


def one_test_batch(run: RunConfig, place: Place) -> None:
    from bmfm_pipeline import load_model
    from bmfm_pipeline.training import build_data_module

    data = build_data_module(run, place.data)
    data.setup("test")
    batch = next(iter(data.test_dataloader()))
    with torch.inference_mode():
        logits = load_model(place.model)(batch["input_ids"], batch["attention_mask"]).logits["celltype"]
    assert np.isfinite(logits.numpy()).all()


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_the_command_at_the_top_runs(file, place, monkeypatch):
    words = [place.filled(word) for word in command_of(file)]
    read = []
    with monkeypatch.context() as patch:  # what the command line makes of the words
        patch.setattr("bmfm_pipeline.commands.find", lambda name: read.append)
        entry_point = cli.main if words[0] == "bmfm" else cli.seed_main
        assert entry_point(words[1:]) == 0
    (known,) = read
    assert uses(file, words, known), f"{' '.join(words)} does not use {file}"
    monkeypatch.setenv("BMFM_TARGETS_ZHENG68K_DATA", place.catalogue)
    if known.command == "run":
        the_whole_chain(known, words, place)
        return
    stage, overrides = known.command, known.overrides
    if stage == "seed":
        run = compose(known.config_name, overrides, known.config_dir)
        stage, known.target = run.training_stage if run.is_training else run.task_kind, None
        if stage == "predict":
            assert predict_with_config(run, place.workspace)["cells"] == 20
            return
    if stage not in ("evaluate", "interpret"):
        overrides = [*overrides, *SIZES, *SHORT]
    options = {"config_name": known.config_name, "config_dir": known.config_dir, "overrides": overrides}
    try:
        job = plan_stage(stage, known.target, **options, workspace=place.workspace)[-1]
    except PipelineError as error:
        needs_data(known.target, error)
        return
    assert job.stage == stage
    run = RunConfig.model_validate(job.config)
    if stage in ("evaluate", "interpret"):
        one_test_batch(run, place)
    else:
        one_step(run, place.data)


def needs_data(target: str, error: PipelineError) -> None:
    """The error is that the variable is not set which names the data of a catalogue's entry."""
    variable = next(entry.source.env for entry in list_entries() if entry.name == target)
    assert variable and variable not in os.environ and variable in str(error)


def the_whole_chain(known, words: list[str], place: Place) -> None:
    """Plan `bmfm run` and take one step of each training; without the data of a catalogue's entry, as far as data is needed."""
    sizes = [] if "preset=laptop" in words else SIZES
    try:
        jobs = plan_pipeline(known.target, overrides=[*known.overrides, *sizes, *SHORT], workspace=place.workspace)
    except PipelineError as error:
        needs_data(known.target, error)
        return
    assert [job.stage for job in jobs] == ["preprocess", "pretrain", "finetune", "evaluate"]
    for job in jobs[1:3]:
        run = RunConfig.model_validate(job.config)
        assert run.preset_used == ("laptop" if "preset=laptop" in words else None)
        one_step(run, place.data)


def test_all_folders_are_looked_at():
    folders = {file.parent for file in FILES}
    assert folders == {PACKAGED, CATALOGUE, *(path for path in PACKAGED.iterdir() if path.is_dir())}
