"""Epochs with lengths and batch sizes of their own: what is built, how steps are counted, what evaluation sees."""

import pytest
import pytorch_lightning as pl
import torch
from training_cases import history, run_config

from bmfm_pipeline.errors import ConfigError
from bmfm_pipeline.training import build_data_module, build_module

TWO = [{"max_length": 16, "batch_size": 30, "n_epochs": 1}, {"max_length": 32, "batch_size": 12, "n_epochs": 2}]
SCHEDULED = {
    "data_module__batch_schedule": TWO,
    "task__max_epochs": 3,
    "data_module__test_max_length": 48,
    "data_module__test_batch_size": 9,
    "data_module__padding": "max_length",
}


def shapes(loader) -> list[tuple[int, int]]:
    return [(batch["input_ids"].shape[0], batch["input_ids"].shape[2]) for batch in loader]


def test_each_epoch_has_its_own_length_and_size_and_evaluation_one_for_all(prepared):
    data = build_data_module(run_config(**SCHEDULED), prepared)
    data.setup("fit")
    seen = []
    for epoch in range(4):
        data.train_sampler.set_epoch(epoch)
        assert len(data.train_dataloader()) == len(data.train_sampler)
        seen.append(shapes(data.train_dataloader()))
    assert seen[0] == [(30, 16)] * 3 + [(10, 16)]
    assert seen[1] == seen[2] == seen[3] == [(12, 32)] * 8 + [(4, 32)]
    assert shapes(data.val_dataloader()) == [(9, 48)] * 3 + [(3, 48)]
    assert data.most_train_batches == 9
    assert data.builder.report.cells_built == 430


def test_a_cell_of_a_scheduled_epoch_is_the_cell_of_a_plain_run_of_that_length(prepared):
    scheduled = build_data_module(run_config(**SCHEDULED), prepared)
    plain = build_data_module(
        run_config(data_module__max_length=16, data_module__batch_size=30, data_module__padding="max_length"), prepared
    )
    for data in (scheduled, plain):
        data.setup("fit")
    for first, second in zip(scheduled.train_dataloader(), plain.train_dataloader(), strict=True):
        assert first["cell_name"] == second["cell_name"]
        assert torch.equal(first["input_ids"], second["input_ids"])
        assert torch.equal(first["labels"]["expressions"], second["labels"]["expressions"])


def test_training_takes_the_steps_of_every_epoch_and_the_rate_reaches_zero_with_the_last(cases):
    spec = cases.spec(**SCHEDULED, trainer__lr_decay_steps=-1, task__accumulate_grad_batches=2)
    summary, events = cases.train(spec)
    assert summary["steps"] == 2 + 5 + 5
    assert {event["max_steps"] for event in events if event["kind"] == "progress"} == {12}
    rates = [entry["learning_rate"] for entry in history(spec) if "learning_rate" in entry]
    assert rates[-1] == pytest.approx(3e-3 / 10) and summary["epochs"] == 3
    assert [entry["epoch"] for entry in history(spec) if "validation/loss" in entry] == [1.0, 2.0, 3.0]


def test_a_trainer_that_would_not_count_anew_is_refused(prepared, tmp_path):
    data = build_data_module(run_config(**SCHEDULED), prepared)
    options = dict(
        max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="reload_dataloaders_every_n_epochs=1"):
        pl.Trainer(**options).fit(build_module(data.run, data), datamodule=data)
    trainer = pl.Trainer(**options, **data.trainer_options)
    trainer.fit(build_module(data.run, data), datamodule=data)
    assert trainer.global_step == 4 + 9 + 9
