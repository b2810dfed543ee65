"""Schedules of length and batch size: shared out over the epochs, checked against them, the same when read back."""

import pytest

from bmfm_pipeline.config import RunConfig, compose
from bmfm_pipeline.errors import ConfigError

TWO = "data_module.batch_schedule=[{max_length: 64, batch_size: 40}, {max_length: 128, batch_size: 20}]"


def composed(*overrides: str) -> RunConfig:
    return compose("pre_train_config", list(overrides))


def epochs(run: RunConfig) -> list[int]:
    return [entry.n_epochs for entry in run.data_module.batch_schedule]


def test_epochs_are_shared_out_evenly_and_the_run_survives_being_written():
    run = composed(TWO, "data_module.max_length=scheduled", "data_module.batch_size=scheduled", "task.max_epochs=5")
    assert epochs(run) == [3, 2]
    assert (run.data_module.max_length, run.data_module.batch_size) == (128, 20)
    assert run.data_module.lengths == [128, 64]
    again = RunConfig.model_validate(run.model_dump(mode="json"))
    assert again == run and again.key_view("pretrain") == run.key_view("pretrain")


def test_what_an_entry_leaves_out_is_the_data_modules_and_tests_have_sizes_of_their_own():
    run = composed(
        "data_module.batch_schedule=[{max_length: 64, n_epochs: 1}, {batch_size: 9, n_epochs: 2}]",
        "data_module.max_length=512",
        "data_module.test_max_length=256",
        "data_module.test_batch_size=50",
        "task.max_epochs=3",
    )
    assert [(entry.max_length, entry.batch_size) for entry in run.data_module.batch_schedule] == [(64, 20), (512, 9)]
    assert (run.data_module.evaluation_length, run.data_module.evaluation_batch_size) == (256, 50)
    plain = composed().data_module
    assert (plain.evaluation_length, plain.evaluation_batch_size) == (plain.max_length, plain.batch_size)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data_module.max_length=scheduled"], "max_length is scheduled, but batch_schedule is not set"),
        (
            ["data_module.batch_size=scheduled", "data_module.batch_schedule=[{batch_size: 4}, {max_length: 32}]"],
            "entry 1 of batch_schedule gives none",
        ),
        ([TWO, "task.max_epochs=1"], "2 entries need at least as many epochs; task.max_epochs is 1"),
        ([TWO, "task.max_epochs=null", "task.max_steps=9"], "so task.max_epochs must be set"),
        (
            ["data_module.batch_schedule=[{n_epochs: 2}, {n_epochs: 2}]", "task.max_epochs=5"],
            "add up to 4, task.max_epochs is 5",
        ),
        (["data_module.batch_schedule=[{n_epochs: 2}, {}]", "task.max_epochs=5"], "give it for all or none"),
        (["data_module.batch_schedule=[{max_length: 70}]"], "max_length 70 is not a multiple of pad_to_multiple_of 16"),
        (["data_module.test_max_length=70"], "max_length 70 is not a multiple"),
        (["data_module.batch_schedule=[{length: 64}]"], "did you mean 'max_length'"),
        ([TWO, "task.limit_train_batches=0.5"], "limit_train_batches"),
        ([TWO, "task.val_check_interval=3"], "val_check_interval"),
        ([TWO, "task.overfit_batches=2"], "overfit_batches"),
    ],
)
def test_what_cannot_be_followed_is_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        composed(*overrides)
