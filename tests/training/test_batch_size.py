"""task.auto_batch_size: what fits is found without going beyond the limit, steps keep their cells, and training does not notice."""

import random
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import torch
from training_cases import StopAtLook, checkpoint, equal, exported, history, notes, run_config

from bmfm_pipeline.errors import ConfigError, TrainingError
from bmfm_pipeline.training.batch_size import Batches, Trial, largest, settle_batch_size, split_of_step, with_batches
from bmfm_pipeline.training.launch import _result
from bmfm_pipeline.training.memory import GB, HostMemory, _group_free

# Large enough that a batch of all cells takes far more memory than one of few.
WIDE = {
    "model__hidden_size": 64,
    "data_module__max_length": 128,
    "data_module__batch_size": 96,
    "task__accelerator": "cpu",
    "task__max_epochs": 1,
    "task__checkpoints_every_n_train_steps": 1,
}


class StopOnce(StopAtLook):
    """Asks to stop as soon as there is a checkpoint."""

    def __init__(self, file: Path):
        self.file = file

    @property
    def reason(self) -> str | None:
        return "a test" if self.file.exists() else None


class Machine:
    """What a batch takes here: `fixed` bytes, and `each` for every cell; beyond `breaks` an allocation fails."""

    def __init__(self, fixed: float, each: float, breaks: float = np.inf):
        self.fixed, self.each, self.breaks, self.tried = fixed, each, breaks, []

    def __call__(self, size: int) -> float | None:
        self.tried.append(size)
        taken = max(self.fixed, 0.8 * self.fixed + self.each * size)
        return taken if taken <= self.breaks else None


@pytest.mark.parametrize("fixed", [10.0, 1000.0])
@pytest.mark.parametrize("each", [0.1, 1.0, 7.0, 60.0])
@pytest.mark.parametrize("most", [1, 7, 100])
def test_the_limit_is_never_passed_and_little_is_left_over(fixed, each, most):
    machine, limit = Machine(fixed, each), fixed + 200.0
    found = largest(machine, most, limit, floor=lambda: 0.8 * fixed)
    assert max(map(machine, list(machine.tried))) <= limit
    best = max(size for size in range(1, most + 1) if machine(size) <= limit)
    assert best * 15 // 16 - 1 <= found <= best


def test_an_allocation_that_fails_bounds_the_search():
    machine = Machine(10.0, 1.0, breaks=60.0)  # a device that has less than it said
    found = largest(machine, 500, limit=1e9, floor=lambda: 0.0)
    assert 48 <= found <= 52 and machine(found) is not None
    assert len(machine.tried) < 20
    assert largest(Machine(10.0, 1.0, breaks=5.0), 500, limit=1e9, floor=lambda: 0.0) == 0
    assert largest(Machine(10.0, 1.0), 500, limit=5.0, floor=lambda: 0.0) == 0


def test_slow_trials_are_extrapolated_and_never_beyond_what_failed():
    machine = Machine(10.0, 1.0)
    assert largest(machine, 500, limit=110.0, floor=lambda: 8.0, seconds=-1.0) in range(35, 103)
    assert machine.tried == [1]
    assert largest(machine, 5, limit=110.0, floor=lambda: 8.0, seconds=-1.0) == 5


@pytest.mark.parametrize(
    ("sizes", "accumulate", "fits", "whole_step", "counts", "split"),
    [
        ([20], 1, [20], False, [], 1),
        ([20], 1, [13], False, [], 2),
        ([20], 1, [3], False, [], 10),
        ([20], 2, [8], False, [], 5),
        ([20], 2, [64], False, [], 2),  # no larger batches than were written
        ([20], 2, [64], True, [], 1),
        ([31], 1, [30], False, [], 31),
        ([20], 2, [8], False, [3], 8),  # 3 batches of 20 are no whole number of batches of 8
        ([30, 12], 1, [30, 5], False, [], 3),
    ],
)
def test_a_step_is_divided_evenly_into_as_few_batches_as_fit(sizes, accumulate, fits, whole_step, counts, split):
    assert split_of_step(sizes, accumulate, fits, whole_step, counts) == split


def test_sizes_without_a_common_divisor_that_fits_are_refused():
    with pytest.raises(
        ConfigError, match=r"batches of 30, 11 cells have no even division that fits \(at most 20, 20\)"
    ):
        split_of_step([30, 11], 1, [20, 20])


def test_settings_that_count_batches_mean_the_same_cells():
    counted = {"task__limit_train_batches": 3, "task__limit_val_batches": 2, "task__val_check_interval": 2}
    run = with_batches(run_config(**counted), [5], 4)
    assert (run.data_module.batch_size, run.task.accumulate_grad_batches) == (5, 4)
    assert (run.task.limit_train_batches, run.task.val_check_interval) == (12, 8)
    assert (run.data_module.evaluation_batch_size, run.task.limit_val_batches) == (5, 8)
    shares = with_batches(run_config(task__limit_train_batches=0.5, data_module__test_batch_size=3), [5], 4)
    assert shares.task.limit_train_batches == 0.5 and shares.data_module.evaluation_batch_size == 3


def test_training_is_bit_for_bit_that_of_the_size_written_by_hand_and_a_resumed_one_takes_the_same(cases, monkeypatch):
    cases.train(
        cases.spec("first", task__max_steps=1, **{**WIDE, "data_module__batch_size": 8})
    )  # what is imported and allocated once
    memory = HostMemory()
    memory.start()
    limit = {"task__memory_limit": memory.held() / GB + 0.15}
    spec = cases.spec("found", task__auto_batch_size=True, **limit, **WIDE)
    summary, events = cases.train(spec, StopOnce(Path(spec.run_dir) / "checkpoints" / "last.ckpt"))
    assert summary is None  # stopped while it trained
    found = Batches.from_dict(checkpoint(spec)["bmfm"]["batches_found"])
    assert found.sizes[0] * found.accumulate == 96
    assert 2 <= found.accumulate <= 48
    said = next(text for text in notes(events) if "auto_batch_size" in text)
    assert f"batches of {found.sizes[0]} cells, {found.accumulate} to an optimiser step" in said
    with monkeypatch.context() as patch:
        patch.setattr(Trial, "measure", None)  # nothing is tried again
        summary, _ = cases.train(spec)
    assert (summary["batch_size"], summary["accumulate_grad_batches"]) == (found.sizes[0], found.accumulate)
    assert summary["memory_limit_gb"] == pytest.approx(limit["task__memory_limit"], abs=0.01)
    by_hand = {"data_module__batch_size": found.sizes[0], "task__accumulate_grad_batches": found.accumulate}
    hand = cases.spec("hand", **{**WIDE, **by_hand})
    cases.train(hand)
    assert history(spec) == history(hand)
    assert equal(exported(spec), exported(hand))
    assert equal(checkpoint(spec)["state_dict"], checkpoint(hand)["state_dict"])


def test_a_trial_draws_no_random_number_and_where_all_fits_nothing_changes(prepared):
    def states() -> list:
        return [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]

    run, before = run_config(task__auto_batch_size="max"), states()
    settled, batches = settle_batch_size(run, str(prepared), lambda module: None, lambda: False)
    assert states() == before
    assert (batches.sizes, batches.accumulate, batches.fits) == ((20,), 1, (20,))
    assert settled.data_module.batch_size == 20 and settled.task == run.task
    assert settle_batch_size(run, str(prepared), lambda module: None, lambda: True) is None


def test_memory_for_not_even_one_cell_names_what_helps(cases):
    with pytest.raises(TrainingError, match=r"not even a batch of one cell.*model.gradient_checkpointing"):
        cases.train(cases.spec(task__auto_batch_size=True, task__memory_limit=0.01))


def test_a_killed_process_is_probably_out_of_memory_even_where_torchrun_stands_between(tmp_path):
    for code, lines in ((-9, []), (1, ["  rank      : 1 (local_rank: 1)", "  exitcode  : -9 (pid: 77)"])):
        with pytest.raises(
            TrainingError, match=r"ended by SIGKILL; if nobody.*out of memory; set task.auto_batch_size=true"
        ):
            _result(code, {}, deque(lines), tmp_path)


def test_what_a_limit_without_its_use_does_is_said():
    assert any("memory_limit is not used" in text for text in run_config(task__memory_limit=4).notes)
    assert not any(
        "memory_limit" in text for text in run_config(task__memory_limit=4, task__auto_batch_size=True).notes
    )


def test_free_memory_is_that_of_the_tightest_control_group(tmp_path):
    inner = tmp_path / "memory" / "outer" / "inner"
    inner.mkdir(parents=True)
    groups = tmp_path / "groups"
    groups.write_text("5:devices:/\n4:memory:/outer/inner\n")
    for folder, most, used in ((inner, 2**63 - 4096, 1), (inner.parent, 5_000, 3_000)):
        (folder / "memory.limit_in_bytes").write_text(f"{most}\n")
        (folder / "memory.usage_in_bytes").write_text(f"{used}\n")
        (folder / "memory.stat").write_text("cache 900\ntotal_inactive_file 700\n")
    assert _group_free(tmp_path, groups) == 2_700
    unified = tmp_path / "job"
    unified.mkdir()
    groups.write_text("0::/job\n")
    (unified / "memory.current").write_text("40")
    (unified / "memory.stat").write_text("inactive_file 10\n")
    (unified / "memory.max").write_text("100\n")
    assert _group_free(tmp_path, groups) == 70
    (unified / "memory.max").write_text("max\n")
    assert _group_free(tmp_path, groups) > 2**50
