"""A training whose process is stopped, killed, orphaned or out of disk goes on from its last checkpoint to the same losses and weights."""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from training_cases import Cases, StopAtLook, assert_same_training, checkpoint, notes

from bmfm_pipeline.errors import Preempted, TrainingError
from bmfm_pipeline.storage import read_json
from bmfm_pipeline.training import TrainSpec, train_in_child
from bmfm_pipeline.training.checkpoints import valid_entry
from bmfm_pipeline.training.lease import acquire

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

# Long enough to be stopped in the middle: 25 steps an epoch.
LONG = {
    "data_module__limit_dataset_samples": {"train": 500, "dev": 30, "test": 20},
    "task__max_epochs": None,
    "task__max_steps": 70,
    "task__checkpoints_every_n_train_steps": 2,
}
PARENT = "import sys; from bmfm_pipeline.training import TrainSpec, train_in_child; train_in_child(TrainSpec.from_file(sys.argv[1]))"


@pytest.fixture(scope="module")
def uninterrupted(prepared, tmp_path_factory) -> TrainSpec:
    """The long training, from beginning to end."""
    cases = Cases(prepared, tmp_path_factory.mktemp("uninterrupted"))
    spec = cases.spec(**LONG)
    cases.train(spec)
    return spec


def wait_until(condition, seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s in vain until {what}"
        time.sleep(0.02)


def trainer_pid(spec: TrainSpec) -> int:
    return read_json(Path(spec.run_dir) / "lease.json")["pid"]


def last_of(spec: TrainSpec) -> Path:
    return Path(spec.run_dir) / "checkpoints" / "last.ckpt"


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_signal_lets_the_child_save_and_leave_and_the_next_run_goes_on(cases, uninterrupted):
    def stopped_by(number: signal.Signals) -> TrainSpec:
        spec, sent = cases.spec(number.name, **LONG), []

        def on_progress(event):
            if event["kind"] == "progress" and not sent:
                sent.append(number)
                os.kill(trainer_pid(spec), number)

        with pytest.raises(Preempted, match=f"{number.name}.*run the same command again"):
            train_in_child(spec, on_progress)
        return spec

    with ThreadPoolExecutor(2) as pool:
        stopped = list(pool.map(stopped_by, (signal.SIGTERM, signal.SIGINT)))
    for spec in stopped:
        assert 0 < checkpoint(spec)["bmfm"]["step"] < 70
        cases.train(spec)
        assert_same_training(spec, uninterrupted)


def test_a_killed_child_is_resumed_from_its_last_checkpoint_and_nobody_trains_beside_a_living_one(cases, uninterrupted):
    spec, refused = cases.spec("killed", **LONG), []

    def on_progress(event):
        if event["kind"] == "progress" and not refused:
            wait_until(lambda: last_of(spec).exists(), 20, "a checkpoint was written")
            with pytest.raises(TrainingError) as error:
                acquire(Path(spec.run_dir))
            refused.append(str(error.value))
            os.kill(trainer_pid(spec), signal.SIGKILL)

    with pytest.raises(TrainingError, match=r"SIGKILL.*Run the same command again to resume"):
        train_in_child(spec, on_progress)
    assert f"process {trainer_pid(spec)}" in refused[0]
    _, events = cases.train(spec)  # takes over the lease of the dead process
    assert any("resuming from last.ckpt at step" in text for text in notes(events))
    assert_same_training(spec, uninterrupted)


def test_a_child_whose_parent_is_killed_saves_and_leaves_and_a_retry_waits_for_it_and_goes_on(
    cases, uninterrupted, tmp_path
):
    spec = cases.spec("orphan", **LONG)
    file = tmp_path / "spec.json"
    file.write_text(json.dumps(spec.to_dict()))
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(file)])
    try:
        wait_until(lambda: last_of(spec).exists() or parent.poll() is not None, 60, "training began")
        child = trainer_pid(spec)
        assert running(child)
        os.kill(child, signal.SIGSTOP)  # still busy when the retry comes
    finally:
        parent.kill()
        parent.wait()
    waiting, left = threading.Event(), []

    def on_progress(event):
        if event["kind"] == "note" and event["message"].startswith(f"waiting for process {child} on "):
            waiting.set()

    def wake_up():
        assert waiting.wait(120)
        os.kill(child, signal.SIGCONT)
        wait_until(lambda: not running(child), 20, "the child had noticed and left")
        left.append(valid_entry(last_of(spec)))

    with ThreadPoolExecutor(1) as pool:
        woken = pool.submit(wake_up)
        train_in_child(spec, on_progress)
        woken.result()
    assert left[0]["reason"] == "the parent process is gone" and 0 < left[0]["step"] < 70
    assert read_json(Path(spec.run_dir) / "lease.json")["number"] == 2
    assert_same_training(spec, uninterrupted)


def test_a_full_disk_is_named_and_the_previous_checkpoint_stays(cases):
    reference, spec = cases.spec("reference"), cases.spec("full", task__checkpoints_every_n_train_steps=2)
    cases.train(reference)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert cases.train(spec, StopAtLook(3))[0] is None
    before = valid_entry(last_of(spec))
    resource.setrlimit(resource.RLIMIT_FSIZE, (last_of(spec).stat().st_size // 2, hard))  # the child inherits it
    try:
        with pytest.raises(TrainingError, match=r"could not be written.*previous checkpoint is kept. Free space"):
            train_in_child(spec)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert valid_entry(last_of(spec)) == before
    assert not list(last_of(spec).parent.glob(".*.part"))
    cases.train(spec)
    assert_same_training(spec, reference)
