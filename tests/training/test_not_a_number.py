"""Losses and gradients that are not numbers: training ends, says where they came from, and keeps what was good."""

import math
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins import MixedPrecision
from training_cases import checkpoint, few_labels, losses, run_config

from bmfm_pipeline.errors import DataError, TrainingError
from bmfm_pipeline.training import PreparedData, build_data_module, build_module, module
from bmfm_pipeline.training.checkpoints import valid_entry
from bmfm_pipeline.training.finite import MOST_SKIPPED

CONTINUOUS = {
    "fields": [
        {"field_name": "genes"},
        {"field_name": "expressions", "is_masked": True, "tokenization_strategy": "continuous_value_encoder"},
    ],
    "trainer__losses": None,
}


def test_weights_that_grew_too_large_end_training_and_the_history_stays_finite(cases):
    spec = cases.spec(trainer__learning_rate=1e30, trainer__warmup_steps=0, task__gradient_clip_val=None)
    with pytest.raises(
        TrainingError, match=r"(the loss is (nan|inf)|the gradients are not numbers) .*\(cells [ACGT]+.*learning_rate"
    ):
        cases.train(spec)
    assert all(math.isfinite(value) for value in losses(spec))


@pytest.mark.parametrize(
    ("value", "kind", "words"),
    [
        (np.nan, DataError, "cell '{}', gene '.*': a continuous value is negative or not finite"),
        (3e38, TrainingError, r"step 3, batch 3 \(cells {}.*expressions_mse_loss.*last good checkpoint is kept"),
    ],
)
def test_a_cell_with_an_impossible_value_is_named_and_the_last_good_checkpoint_stays(
    cases, tmp_path, value, kind, words
):
    poisoned = tmp_path / "poisoned"
    shutil.copytree(cases.data, poisoned)
    spec = cases.spec(**CONTINUOUS, task__checkpoints_every_n_train_steps=1)
    data = build_data_module(run_config(**CONTINUOUS), cases.data)
    data.setup("fit")
    names = [batch["cell_name"] for batch in data.train_dataloader()]
    cell = names[3][0]  # of the fourth batch
    row = list(PreparedData(cases.data).store.obs_names).index(cell)
    with h5py.File(poisoned / "processed.h5ad", "r+") as file:
        start, end = file["X/indptr"][row : row + 2]
        values = file["X/data"][:].astype(np.float32)
        values[start:end] = value
        del file["X/data"]
        file["X/data"] = values
    spec = type(spec)(**{**spec.to_dict(), "data": str(poisoned)})
    with pytest.raises(kind, match=words.format(cell)):
        cases.train(spec)
    last = Path(spec.run_dir) / "checkpoints" / "last.ckpt"
    assert valid_entry(last)["step"] == 3
    assert all(torch.isfinite(tensor).all() for tensor in checkpoint(spec)["state_dict"].values())
    assert len(losses(spec)) == 3


def test_gradients_that_are_not_numbers_are_traced_to_batch_and_loss_although_the_loss_is_finite(cases, monkeypatch):
    """Two batches make a step, and the second loss of the second batch goes wrong on its way back."""
    build = module.build_module

    def spoiled(run, data):
        made = build(run, data)
        decoder = made.model.get_submodule("cls.label_predictions")
        weight = next(decoder.parameters())
        weight.register_hook(lambda gradient: gradient * math.nan if made.batches_seen == 6 else gradient)
        return made

    monkeypatch.setattr(module, "build_module", spoiled)
    few = few_labels(cases, label_columns=[{"label_column_name": "celltype"}])
    spec = cases.spec(data_module__batch_size=4, task__accumulate_grad_batches=2, **few)
    with pytest.raises(
        TrainingError,
        match=r"the gradients are not numbers at step 2, although the loss is .*: celltype_cross_entropy_loss of batch 4 \(cells",
    ):
        cases.train(spec)
    assert len(losses(spec)) == 2


def test_overflow_under_a_scaler_is_a_skipped_step_until_it_never_ends(cases):
    """float16 on the CPU stands in for a GPU; the factor begins far too high."""
    run = run_config(task__gradient_clip_val=1.0)

    def fit(start: float, steps: int):
        data = build_data_module(run, cases.data)
        data.prepare_data()
        made = build_module(run, data)
        before = {name: value.clone() for name, value in made.model.state_dict().items()}
        scaler = torch.amp.GradScaler("cpu", init_scale=start)
        trainer = pl.Trainer(
            accelerator="cpu",
            plugins=[MixedPrecision("16-mixed", "cpu", scaler)],
            max_steps=steps,
            limit_val_batches=0,
            gradient_clip_val=1.0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        return made, before, lambda: trainer.fit(made, datamodule=data)

    made, before, start = fit(2.0**30, 30)
    start()
    made.finite.check()
    assert 0 < made.finite.skipped < 30
    after = made.model.state_dict()
    assert all(torch.isfinite(value).all() for value in after.values())
    assert any(not torch.equal(after[name], before[name]) for name in before)

    made, before, start = fit(2.0**120, MOST_SKIPPED + 5)
    with pytest.raises(TrainingError, match=rf"not numbers at step {MOST_SKIPPED} {MOST_SKIPPED + 1} times in a row"):
        start()
    assert all(torch.equal(made.model.state_dict()[name], before[name]) for name in before)
