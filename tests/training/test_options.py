"""What a task section asks of the trainer: done, done otherwise with a note, or refused with a reason."""

import pytest
from training_cases import StopAtLook, history, losses, notes, run_config

from bmfm_pipeline.config import find_accelerator
from bmfm_pipeline.errors import ConfigError
from bmfm_pipeline.training.launch import _command
from bmfm_pipeline.training.options import processes, trainer_options


def options(train_batches=6, dev_batches=2, world_size=1, **changes):
    task = run_config(**{f"task__{name}": value for name, value in changes.items()}).task
    return trainer_options(task, train_batches, dev_batches, world_size)


def validated_at(spec) -> list[int]:
    return [entry["step"] for entry in history(spec) if "validation/loss" in entry]


@pytest.mark.parametrize(
    ("asked", "times"),
    [
        ({}, [5, 10]),
        ({"task__val_check_interval": 1.0}, [5, 10]),
        ({"task__val_check_interval": 0.5}, [2, 4, 7, 9, 10]),
        ({"task__val_check_interval": 3}, [3, 8, 10]),
        ({"task__val_check_interval": 0.1, "task__max_epochs": 1}, [1, 2, 3, 4, 5]),
        ({"task__val_check_interval": 9, "task__max_epochs": 5}, [10, 20, 25]),
        ({"task__val_check_interval": 4, "task__check_val_every_n_epoch": None}, [4, 8, 10]),
        ({"task__check_val_every_n_epoch": 2, "task__max_epochs": 3}, [10, 15]),
        ({"task__limit_val_batches": 0}, []),
        ({"task__limit_val_batches": 0.01}, [5, 10]),
        ({"task__num_sanity_val_steps": 1, "task__early_stopping_patience": 5}, [5, 10]),
    ],
)
def test_validation_comes_when_asked_and_once_at_the_end(cases, asked, times):
    spec = cases.spec(**asked)
    cases.train(spec)
    assert validated_at(spec) == times


def test_intervals_that_do_not_fit_are_fitted_with_a_note():
    found, said = options(val_check_interval=0.1)
    assert found["val_check_interval"] == 1
    assert said == ["task.val_check_interval 0.1 of 6 batches is less than one: validating after every batch"]
    found, said = options(val_check_interval=20)
    assert found["check_val_every_n_epoch"] == 3
    assert "more than the 6 batches of an epoch: validating every 3 epochs" in said[0]
    found, said = options(val_check_interval=3, accumulate_grad_batches=2)
    assert found["val_check_interval"] == 4
    assert "between optimiser steps" in said[0]
    found, said = options(limit_train_batches=0.01, limit_val_batches=0.01)
    assert (found["limit_train_batches"], found["limit_val_batches"]) == (1, 1)
    assert len(said) == 2


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"max_epochs": None}, "training would never end"),
        ({"max_steps": 0}, "max_steps is 0: use a number of optimiser steps from 1"),
        ({"num_nodes": 2}, "runs on one machine"),
        ({"precision": "16-true"}, "16-true cannot train"),
        ({"strategy": "fsdp", "world_size": 2}, "fsdp shards a model over GPUs, and this training runs on cpu"),
        (
            {"strategy": "fsdp", "world_size": 2, "accelerator": "gpu", "precision": "16-mixed"},
            "use 32-true, bf16-mixed",
        ),
        ({"strategy": "deepspeed"}, "'deepspeed' is not offered"),
        ({"val_check_interval": 1.5}, "a share of an epoch in 0..1"),
        ({"val_check_interval": 0}, "at least one batch"),
        ({"limit_train_batches": 0}, "nothing would be trained"),
        ({"limit_val_batches": 2.5}, "a share of the batches in 0..1"),
    ],
)
def test_what_cannot_be_is_refused(asked, message):
    with pytest.raises(ConfigError, match=message):
        options(**asked)


def test_what_lightning_refuses_is_an_error_of_the_config(cases):
    with pytest.raises(ConfigError, match=r"max_time|duration"):
        cases.train(cases.spec(task__max_time="soon"))


def test_steps_time_and_epochs_limit_training(cases):
    assert cases.train(cases.spec("steps", task__max_steps=3))[0]["steps"] == 3
    assert cases.train(cases.spec("epochs", task__max_epochs=3))[0]["steps"] == 15
    assert cases.train(cases.spec("trial", task__fast_dev_run=True))[0]["steps"] == 1
    summary, _ = cases.train(cases.spec("time", task__max_epochs=None, task__max_time={"seconds": 1}))
    assert summary["steps"] > 3


def test_patience_ends_training_early_but_not_before_the_minimum(cases):
    impatient = {"task__max_epochs": 30, "task__early_stopping_patience": 2, "trainer__learning_rate": 0.3}
    summary, _ = cases.train(cases.spec("early", **impatient))
    assert 3 <= summary["epochs"] < 30
    summary, _ = cases.train(cases.spec("minimum", task__min_epochs=12, **impatient))
    assert summary["epochs"] >= 12


def test_overfitting_sees_the_same_batches_in_every_epoch(cases):
    still = {
        "model__hidden_dropout_prob": 0,
        "model__attention_probs_dropout_prob": 0,
        "trainer__learning_rate": 1e-30,
        "task__max_epochs": 3,
    }
    same, usual = cases.spec("same", task__overfit_batches=2, **still), cases.spec("usual", **still)
    cases.train(same)
    cases.train(usual)
    first, second, third = (losses(same)[2 * epoch : 2 * epoch + 2] for epoch in range(3))
    assert first == second == third
    assert losses(usual)[:5] != losses(usual)[5:10]


def test_a_gpu_that_is_not_there_is_done_without_loudly(cases):
    if find_accelerator() is not None:
        pytest.skip("there is a GPU here")
    spec = cases.spec(task__accelerator="gpu", task__precision="16-mixed", task__tf32_mode="high", task__max_epochs=1)
    summary, events = cases.train(spec)
    said = "\n".join(notes(events))
    assert "NO GPU IS USABLE here: running on the CPU" in said
    assert "task.precision is 16-mixed, which needs a GPU: using 32-true" in said
    assert "tf32_mode high is not used" in said
    assert (summary["accelerator"], summary["precision"]) == ("cpu", "32-true")
    with pytest.raises(ConfigError, match="require_accelerator"):
        cases.train(cases.spec("refused", task__accelerator="gpu", task__require_accelerator=True))


def test_sharding_is_for_several_processes():
    found, _ = options(strategy="fsdp", world_size=2, accelerator="gpu", precision="bf16-mixed")
    assert found["strategy"] == "fsdp"
    found, said = options(strategy="fsdp")
    assert found["strategy"] == "auto"
    assert "task.strategy fsdp is not used: one process trains" in said[0]


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_other_precisions_train_and_export(cases, precision):
    summary, _ = cases.train(cases.spec(task__precision=precision, task__max_epochs=1, task__max_steps=3))
    assert summary["precision"] == precision
    assert summary["best_validation_loss"] > 0


def test_a_model_summary_is_told_when_asked_for(cases):
    _, events = cases.train(cases.spec(task__enable_model_summary=True), StopAtLook(0))
    assert any("Trainable params" in text for text in notes(events))


@pytest.mark.parametrize(
    ("devices", "count", "numbers"),
    [
        ("auto", 1, None),
        (1, 1, None),
        ("2", 2, None),
        (-1, 4, None),
        ("-1", 4, None),
        ([0, 2], 2, [0, 2]),
        ("1,3", 2, [1, 3]),
        ("3,", 1, [3]),
    ],
)
def test_devices_are_a_number_or_a_list(devices, count, numbers):
    assert processes(devices, gpus=4) == (count, numbers)


@pytest.mark.parametrize("devices", [0, -2, [], [1, 1], "two"])
def test_devices_that_make_no_sense_are_refused(devices):
    with pytest.raises(ConfigError, match=r"task\.devices"):
        processes(devices, gpus=4)


def test_named_devices_are_the_only_visible_ones_and_launchers_around_us_are_not_ours(cases, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    command, environment = _command(cases.spec(task__devices=[0, 2]), tmp_path / "spec.json")
    assert "--nproc-per-node=2" in command
    assert environment["CUDA_VISIBLE_DEVICES"] == "4,6"
    assert not {"WORLD_SIZE", "RANK"} & environment.keys()
    command, environment = _command(cases.spec(), tmp_path / "spec.json")
    assert "torch.distributed.run" not in command
    assert environment["CUDA_VISIBLE_DEVICES"] == "4,5,6"
