"""The data module: made when asked for, set up for any stage, batches of every split."""

from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from training_cases import run_config

import bmfm_pipeline
from bmfm_pipeline.errors import ConfigError, DataError
from bmfm_pipeline.training import CellDataModule, build_data_module, build_module

WHOLE = {"data_module__limit_dataset_samples": None}


def names(loader) -> list[str]:
    return [name for batch in loader for name in batch["cell_name"]]


def test_prepare_data_makes_the_data_and_setup_reads_it(prepared):
    asked = []
    data = build_data_module(run_config(), prepare=lambda: asked.append("once") or str(prepared))
    assert isinstance(data, pl.LightningDataModule)
    with pytest.raises(ConfigError, match="call its prepare_data"):
        build_module(run_config(), data)
    data.prepare_data()
    data.prepare_data()
    data.setup("fit")
    assert asked == ["once"]
    batch = next(iter(data.train_dataloader()))
    assert batch["input_ids"].shape[0] == 20
    assert set(batch["labels"]) == {"expressions"}
    build_module(run_config(), data)


def test_setup_alone_prepares_too(prepared):
    data = CellDataModule(run_config(), None, prepare=lambda: prepared)
    data.setup()
    assert len(data.rows["train"]) == 100


def test_without_data_and_without_a_way_to_make_it_the_error_says_what_to_give():
    data = build_data_module(run_config())
    for call in (data.prepare_data, data.setup):
        with pytest.raises(ConfigError, match=r"neither data nor a way to make it; give `data`.*or `prepare`"):
            call()
    with pytest.raises(DataError, match=r"no processed.h5ad; make it with `bmfm preprocess`"):
        build_data_module(run_config(), "/nowhere")


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict", None])
def test_every_stage_can_be_set_up_and_torn_down(prepared, stage):
    data = build_data_module(run_config(**WHOLE), prepared)
    data.setup(stage)
    sampler = data.train_sampler
    data.teardown(stage)
    data.setup(stage)
    assert data.train_sampler is sampler, "a restored position must survive"
    splits = [set(names(loader)) for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())]
    assert [len(cells) for cells in splits] == [504, 56, 140]
    everyone = names(data.predict_dataloader())
    assert everyone == list(data.prepared.store.obs_names)
    assert set.union(*splits) == set(everyone)


def test_evaluation_batches_are_the_same_every_time_and_training_batches_are_not(prepared):
    data = build_data_module(run_config(), prepared)
    data.setup("fit")
    first, second = (next(iter(data.val_dataloader())) for _ in range(2))
    assert torch.equal(first["input_ids"], second["input_ids"])
    assert torch.equal(first["labels"]["expressions"], second["labels"]["expressions"])
    once = names(data.train_dataloader())
    data.train_sampler.set_epoch(1)
    assert names(data.train_dataloader()) != once
    assert set(names(data.train_dataloader())) == set(once)


def test_balancing_draws_rare_classes_as_often_as_common_ones(prepared):
    run = run_config(**WHOLE, data_module__balancing_label_column="celltype")
    data = build_data_module(run, prepared)
    data.setup("fit")
    labels = data.prepared.labels(run)["celltype"]
    index = {name: row for row, name in enumerate(data.prepared.store.obs_names)}
    counts = np.zeros(labels.max() + 1)
    for epoch in range(5):
        data.train_sampler.set_epoch(epoch)
        for name in names(data.train_dataloader()):
            counts[labels[index[name]]] += 1
    assert counts.min() / counts.max() > 0.5


def test_lightning_trains_with_it_directly(prepared, tmp_path):
    run = run_config(task__max_steps=2)
    data = bmfm_pipeline.build_data_module(run, prepared)
    data.prepare_data()
    module = bmfm_pipeline.build_module(run, data)
    trainer = pl.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == 2
    assert trainer.validate(module, datamodule=data, verbose=False) == [{}]
    assert module.validation["validation/loss"] > 0


def test_nothing_to_learn_is_said_before_anything_is_built(prepared):
    run = run_config(fields=[{"field_name": "genes"}, {"field_name": "expressions"}], label_columns=[], trainer__losses=None,
                     data_module__collation_strategy="multitask", data_module__mlm=False)  # fmt: skip
    with pytest.raises(ConfigError, match="nothing to learn"):
        build_module(run, build_data_module(run, prepared))


def test_a_limit_is_a_random_sample_that_every_process_and_every_start_agrees_on(prepared):
    run = run_config(data_module__limit_dataset_samples={"train": 100, "predict": 25})
    data, again = build_data_module(run, prepared), build_data_module(run, prepared)
    other = build_data_module(run_config(data_module__limit_dataset_samples=25, seed__seed_value=7), prepared)
    for module in (data, again, other):
        module.setup()
    assert [len(data.rows[name]) for name in ("train", "dev", "test", "predict")] == [100, 56, 140, 25]
    assert {name: len(rows) for name, rows in other.rows.items()} == dict.fromkeys(data.rows, 25)
    for name in data.rows:
        assert np.array_equal(data.rows[name], again.rows[name])
    assert not np.array_equal(data.rows["predict"], other.rows["predict"])
    assert data.rows["predict"].max() > 100, "a sample of all cells, not the first ones"
    expected = [data.prepared.store.obs_names[row] for row in data.rows["predict"]]
    assert names(data.predict_dataloader()) == expected


def test_processes_share_the_draws_of_a_balanced_epoch_and_each_dev_cell_is_scored_once(prepared, monkeypatch):
    run = run_config(**WHOLE, data_module__balancing_label_column="celltype")
    alone = build_data_module(run, prepared)
    alone.setup("fit")
    alone.train_sampler.set_epoch(3)
    whole, dev = names(alone.train_dataloader()), names(alone.val_dataloader())
    assert len(whole) == len(alone.rows["train"]) == 504 and len(set(whole)) < 504
    assert len(set(dev)) == len(dev) == 56
    shares, validated = [], []
    for rank in range(3):
        monkeypatch.setenv("WORLD_SIZE", "3")
        monkeypatch.setenv("RANK", str(rank))
        data = build_data_module(run, prepared)
        data.setup("fit")
        data.train_sampler.set_epoch(3)
        shares.append(names(data.train_dataloader()))
        validated.append(list(data.val_dataloader()))
    assert shares == [whole[0::3], whole[1::3], whole[2::3]]
    cells = [name for batches in validated for batch in batches for name in batch["cell_name"]]
    assert sorted(cells) == sorted([*dev, dev[0]])
    # The cell that fills up the last share has no targets there, and only there.
    *_, last = validated[2]
    assert last["cell_name"][-1] == dev[0]
    assert (last["labels"]["expressions"][-1] == -100).all()
    targets = sum((batch["labels"]["expressions"] != -100).sum() for batches in validated for batch in batches)
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.delenv("RANK")
    assert targets == sum((batch["labels"]["expressions"] != -100).sum() for batch in alone.val_dataloader())


def test_tokens_to_prepend_are_in_training_and_in_prediction_and_travel_with_the_model(cases, prepared):
    from bmfm_pipeline.stages.predict import Predictor
    from bmfm_pipeline.training.prepared import prefix_ids

    spec = cases.spec(
        tokenizer__prepend_tokens=["[CLS]", "[MASK]", "[UNK]"], data_module__test_max_length=16, task__max_epochs=1
    )
    cases.train(spec)
    data = build_data_module(run_config(tokenizer__prepend_tokens=["[CLS]", "[MASK]", "[UNK]"]), prepared)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert (batch["input_ids"][:, :, :3] == torch.tensor([3, 4, 0])).all()
    assert (batch["labels"]["expressions"][:, :3] == -100).all()

    predictor = Predictor.open(Path(spec.run_dir) / "model")
    assert prefix_ids(predictor.run, predictor.vocabularies) == (3, 4, 0)
    assert predictor.run.data_module.evaluation_length == 16
