"""Checkpoint files: whole or not there, the newest valid one is resumed, damage is named."""

import contextlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest
from training_cases import StopAtLook, assert_same_training, checkpoint, history, notes

from bmfm_pipeline.errors import TrainingError
from bmfm_pipeline.storage import hash_bytes
from bmfm_pipeline.training import keeping
from bmfm_pipeline.training.checkpoints import manifest_of, newest_valid, valid_entry


@pytest.fixture
def stopped(cases):
    """A training stopped in its third epoch, with a best checkpoint from an earlier validation; and one that was not stopped."""
    reference, spec = cases.spec("reference", task__max_epochs=3), cases.spec(task__max_epochs=3)
    cases.train(reference)
    cases.train(spec, StopAtLook(17))
    folder = Path(spec.run_dir) / "checkpoints"
    assert checkpoint(spec)["bmfm"]["epoch"] == 2
    return spec, reference, folder


def test_a_damaged_last_checkpoint_is_named_and_the_previous_valid_one_is_used(cases, stopped):
    spec, reference, folder = stopped
    last = folder / "last.ckpt"
    data = bytearray(last.read_bytes())
    data[len(data) // 2] ^= 1
    last.write_bytes(bytes(data))
    _, events = cases.train(spec)
    assert f"{last}: incomplete or damaged, not used" in notes(events)
    assert any("resuming from epoch=" in text for text in notes(events))
    assert_same_training(spec, reference)


def test_a_checkpoint_cut_short_is_not_used(stopped):
    _, _, folder = stopped
    last, said = folder / "last.ckpt", []
    last.write_bytes(last.read_bytes()[:1000])
    assert newest_valid(folder, said.append).name.startswith("epoch=")
    assert said == [f"{last}: incomplete or damaged, not used"]


def test_without_a_valid_checkpoint_training_begins_anew(cases, stopped):
    spec, reference, folder = stopped
    for path in folder.glob("*.ckpt"):
        manifest_of(path).write_text("{")
    summary, events = cases.train(spec)
    assert summary["steps"] == 15
    assert not any("resuming" in text for text in notes(events))
    assert_same_training(spec, reference)


def test_dying_between_manifest_and_rename_loses_nothing(cases, stopped):
    """The manifest is written first and knows the old file as well as the new one."""
    spec, reference, folder = stopped
    last = folder / "last.ckpt"
    old, step = last.read_bytes(), valid_entry(last)["step"]
    cases.train(spec)
    assert valid_entry(last)["step"] == 15
    manifest = json.loads(manifest_of(last).read_text())
    manifest["replaces"] = {"sha256": hash_bytes(old), "step": step}
    manifest_of(last).write_text(json.dumps(manifest))
    last.write_bytes(old)
    assert valid_entry(last)["step"] == step
    cases.train(spec)
    assert history(spec) == history(reference)


def test_what_a_killed_process_left_half_written_is_cleared(cases, stopped):
    spec, _, folder = stopped
    shutil.copy(folder / "last.ckpt", folder / ".last.ckpt.part")
    cases.train(spec)
    assert not (folder / ".last.ckpt.part").exists()


def test_a_training_that_never_validates_is_kept_by_the_clock(cases, monkeypatch):
    monkeypatch.setattr(keeping, "SAVE_EVERY", 0.0)
    spec = cases.spec(task__limit_val_batches=0, trainer__learning_rate=1e30, task__gradient_clip_val=None)
    with pytest.raises(TrainingError, match="the loss is"):
        cases.train(spec)
    assert checkpoint(spec)["bmfm"]["step"] >= 1


def test_a_trainer_that_lost_its_folder_writes_no_checkpoint(cases):
    class Thief(StopAtLook):
        """Another trainer takes the folder when this one has trained for a while."""

        @property
        def reason(self):
            if super().reason:
                lease = Path(spec.run_dir) / "lease.json"
                lease.write_text(json.dumps({"number": 99, "pid": 1, "host": "elsewhere"}))

    spec = cases.spec()
    with pytest.raises(TrainingError, match="taken over by process 1 on elsewhere"):
        cases.train(spec, Thief(3))
    assert not (Path(spec.run_dir) / "checkpoints" / "last.ckpt").exists()
    assert json.loads((Path(spec.run_dir) / "lease.json").read_text())["number"] == 99


def test_the_best_checkpoint_is_the_one_with_the_lowest_validation_loss(cases):
    spec = cases.spec(task__max_epochs=6, trainer__learning_rate=0.2)
    summary, _ = cases.train(spec)
    scores = {entry["step"]: entry["validation/loss"] for entry in history(spec) if "validation/loss" in entry}
    best = min(scores, key=scores.get)
    assert best < 30, "this training gets worse in the end"
    assert f"step={best}-val_loss={scores[best]:.2f}" in summary["best_checkpoint"]
    assert checkpoint(spec, summary["best_checkpoint"])["bmfm"]["step"] == best
    assert checkpoint(spec)["bmfm"]["step"] == 30


def test_a_disk_that_fills_up_is_named_with_its_room_and_the_previous_checkpoint_is_resumed(cases):
    """A real small disk: it has room for two of three checkpoints."""
    reference, spec = cases.spec("reference"), cases.spec("full", task__checkpoints_every_n_train_steps=2)
    cases.train(reference)
    size = 2.5 * (Path(reference.run_dir) / "checkpoints" / "last.ckpt").stat().st_size
    with small_disk(Path(spec.run_dir), int(size)) as resize:
        with pytest.raises(
            TrainingError,
            match=r"last\.ckpt: the checkpoint could not be written \(No space left on device; it takes \d\.\d MB or more, and 0\.\d MB "
            r"are free in .*\); the previous checkpoint is kept. Free space",
        ):
            cases.train(spec)
        folder = Path(spec.run_dir) / "checkpoints"
        assert newest_valid(folder) is not None
        assert not list(folder.glob(".*.part"))
        resize(100 * int(size))
        _, events = cases.train(spec)
        assert any("resuming from last.ckpt" in text for text in notes(events))
        assert_same_training(spec, reference)


@contextlib.contextmanager
def small_disk(folder: Path, size: int):
    """A file system of `size` bytes at `folder`; yields what changes its size."""

    def mount(*options: str) -> int:
        return subprocess.run(
            ["mount", "-t", "tmpfs", *options, "tmpfs", str(folder)], check=False, capture_output=True
        ).returncode

    folder.mkdir(parents=True)
    if shutil.which("mount") is None or mount("-o", f"size={size}"):
        pytest.skip("file systems cannot be mounted here")
    try:
        yield lambda size: mount("-o", f"remount,size={size}")
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_the_best_checkpoint_and_the_last_share_their_bytes_when_they_are_the_same(cases):
    spec = cases.spec()
    summary, _ = cases.train(spec)
    folder = Path(spec.run_dir) / "checkpoints"
    assert summary["best_step"] == summary["steps"]
    assert (folder / "last.ckpt").samefile(folder / summary["best_checkpoint"])
    assert valid_entry(folder / "last.ckpt")["step"] == valid_entry(folder / summary["best_checkpoint"])["step"]
