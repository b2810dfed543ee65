"""A training that is stopped anywhere, once or many times, ends as if it had not been stopped."""

from pathlib import Path

import pytest
import torch
from training_cases import StopAtLook, assert_same_training, checkpoint, history, losses, notes

from bmfm_pipeline.storage import hash_file, write_json_atomic
from bmfm_pipeline.training.checkpoints import manifest_of

WAYS = {
    "validation within the epoch": {"task__val_check_interval": 2},
    "gradients of two batches": {
        "task__max_epochs": None,
        "task__max_steps": 7,
        "task__accumulate_grad_batches": 2,
        "task__check_val_every_n_epoch": 2,
    },
    "no validation": {"task__limit_val_batches": 0},
    "patience": {
        "task__max_epochs": 9,
        "task__early_stopping_patience": 1,
        "trainer__learning_rate": 0.3,
        "trainer__lr_decay_steps": -1,
    },
    "the same two batches": {"task__overfit_batches": 2, "task__max_epochs": 4},
    "balanced, steps, loader threads": {
        "data_module__num_workers": 2,
        "data_module__balancing_label_column": "celltype",
        "task__max_epochs": None,
        "task__max_steps": 12,
        "task__checkpoints_every_n_train_steps": 3,
    },
    "part of an epoch": {
        "task__limit_train_batches": 3,
        "task__limit_val_batches": 1,
        "task__max_epochs": 3,
        "task__val_check_interval": 0.3,
    },
    "lengths and sizes that change, in loader threads": {
        "data_module__batch_schedule": [
            {"max_length": 16, "batch_size": 30, "n_epochs": 2},
            {"max_length": 32, "batch_size": 12, "n_epochs": 1},
        ],
        "data_module__num_workers": 2,
        "task__max_epochs": 3,
        "trainer__lr_decay_steps": -1,
    },
    "validation across epochs": {
        "task__max_epochs": None,
        "task__max_steps": 11,
        "task__val_check_interval": 3,
        "task__check_val_every_n_epoch": None,
    },
}


@pytest.mark.parametrize("way", WAYS)
def test_a_run_that_is_stopped_again_and_again_ends_like_one_that_is_not(cases, way):
    reference, stopped = cases.spec("reference", **WAYS[way]), cases.spec("stopped", **WAYS[way])
    assert cases.train(reference)[0] is not None
    stops = 0
    while cases.train(stopped, StopAtLook(5))[0] is None:
        stops += 1
        assert stops < 30
    assert stops >= 2
    assert_same_training(stopped, reference)


@pytest.mark.slow
def test_it_does_not_matter_where_a_run_is_stopped(cases):
    way = {"task__val_check_interval": 2, "task__accumulate_grad_batches": 2}
    reference, counter = cases.spec("reference", **way), StopAtLook()
    cases.train(reference, counter)
    assert counter.looks > 10
    for look in range(counter.looks):
        stopped = cases.spec(f"stopped{look}", **way)
        assert cases.train(stopped, StopAtLook(look))[0] is None
        cases.train(stopped)
        assert_same_training(stopped, reference)


def test_the_same_seed_gives_the_same_curve_and_another_seed_another(cases):
    once, again, other = cases.spec("once"), cases.spec("again"), cases.spec("other", seed__seed_value=7)
    workers = cases.spec("workers", data_module__num_workers=2)
    for spec in (once, again, other, workers):
        cases.train(spec)
    assert len(losses(once)) == 10
    assert_same_training(again, once)
    assert_same_training(workers, once)
    assert losses(other) != losses(once)


def test_a_finished_run_that_is_run_again_trains_nothing_and_says_the_same(cases):
    spec = cases.spec()
    first, _ = cases.train(spec)
    before = history(spec)
    second, _ = cases.train(spec)
    assert history(spec) == before
    same = ("steps", "epochs", "best_validation_loss", "best_checkpoint", "parameters")
    assert {name: second[name] for name in same} == {name: first[name] for name in same}
    assert second["cells_per_s"] == 0


def test_a_checkpoint_knows_its_place_and_is_plain_data(cases):
    spec = cases.spec(task__val_check_interval=2)
    cases.train(spec, StopAtLook(3))  # in the validation after the second batch
    place = checkpoint(spec)["bmfm"]
    assert (place["epoch"], place["batches"], place["step"], place["batches_seen"]) == (0, 2, 2, 2)
    assert place["validation_due"] is True


def test_a_line_of_history_that_was_cut_short_does_not_stop_a_resumed_run(cases):
    reference, spec = cases.spec("reference"), cases.spec()
    cases.train(reference)
    cases.train(spec, StopAtLook(5))
    with open(f"{spec.run_dir}/history.jsonl", "a") as stream:
        stream.write('{"step": 5, "tra')
    cases.train(spec)
    assert_same_training(spec, reference)


def test_weights_move_and_the_loss_falls(cases):
    spec = cases.spec(task__max_epochs=8, trainer__learning_rate=1e-2)
    cases.train(spec)
    values = losses(spec)
    assert sum(values[-5:]) < 0.8 * sum(values[:5])


def test_another_number_of_processes_goes_on_after_the_cells_that_were_seen(cases):
    """Half of an epoch in two processes: 2 of 3 batches each, which are 4 of 5 of one process."""
    spec = cases.spec()
    cases.train(spec, StopAtLook(2))
    file = Path(spec.run_dir) / "checkpoints" / "last.ckpt"
    stored = torch.load(file, weights_only=True)
    stored["bmfm"] |= {"processes": 2, "batches": 2}
    torch.save(stored, file)
    write_json_atomic(manifest_of(file), {"sha256": hash_file(file), "step": 2})
    summary, events = cases.train(spec)
    assert any("resuming with 1 processes what 2 began" in text for text in notes(events))
    assert summary["steps"] == 2 + 1 + 5
    assert [entry["epoch"] for entry in history(spec) if "train/loss" in entry][2:] == [1.0, 1.2, 1.4, 1.6, 1.8, 2.0]
