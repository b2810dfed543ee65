"""Training that is killed with SIGKILL, wherever that is, goes on to the same losses and weights, to the last bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from training_cases import assert_same_training, history, losses

from bmfm_pipeline.storage import write_json_atomic
from bmfm_pipeline.training import TrainSpec

PLACES = ("step", "update", "writing", "manifest", "history")
WAYS = {
    "plain": {"task__val_check_interval": 2, "task__max_epochs": 3},
    "everything": {
        "trainer__ema_decay": 0.8,
        "trainer__lr_schedule": "cosine",
        "task__accumulate_grad_batches": 2,
        "task__early_stopping_patience": 3,
        "task__max_epochs": 3,
        "data_module__num_workers": 2,
        "data_module__batch_schedule": [
            {"max_length": 16, "batch_size": 24, "n_epochs": 1},
            {"max_length": 32, "batch_size": 10, "n_epochs": 2},
        ],
    },
}


class Forks:
    """The process that forks training children."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("fork_server.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, specs: list[TrainSpec], die: list | None = None, environment: dict | None = None) -> list[int]:
        """Train each in a child of its own, all at once; their wait statuses."""
        for spec in specs:
            file = Path(spec.run_dir).with_suffix(".spec.json")
            write_json_atomic(file, spec.to_dict())
            self.process.stdin.write(
                json.dumps({"spec": str(file), "die": die, "environment": environment or {}}) + "\n"
            )
        self.process.stdin.flush()
        found = [json.loads(self.process.stdout.readline()) for _ in specs]
        return [entry["status"] for entry in found]


@pytest.fixture(scope="module")
def forks():
    made = Forks()
    yield made
    made.process.kill()
    made.process.communicate()


def log_of(spec: TrainSpec) -> str:
    return Path(f"{Path(spec.run_dir).with_suffix('.spec.json')}.log").read_text()[-3000:]


@pytest.mark.parametrize("way", WAYS)
def test_a_training_resumed_after_each_kill_is_the_uninterrupted_one_bit_for_bit(cases, forks, way):
    """Killed before a step, before the weights change, while a checkpoint is written and before it is in place, in a line of history."""
    reference = cases.spec("reference", task__checkpoints_every_n_train_steps=1, **WAYS[way])
    killed = cases.spec("killed", task__checkpoints_every_n_train_steps=1, **WAYS[way])
    assert forks.run([reference]) == [0], log_of(reference)
    kills = []
    for place in random.sample(PLACES, len(PLACES)):
        kills.append([place, random.randint(1, 4)])
        assert forks.run([killed], kills[-1]) == [signal.SIGKILL], (kills, log_of(killed))
    assert forks.run([killed]) == [0], (kills, log_of(killed))
    assert_same_training(killed, reference)
    assert len(losses(killed)) == history(killed)[-1]["step"], kills


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_a_training_killed_from_outside_at_any_moment_resumes_to_the_same_curve(cases, forks):
    """Nobody has arranged where: between saved steps, in a validation, in whatever takes long."""
    way = {"task__checkpoints_every_n_train_steps": 3, "task__max_epochs": 4, "task__val_check_interval": 2}
    reference, killed = cases.spec("reference", **way), cases.spec("killed", **way)
    lines = random.randint(1, 12)

    def kill() -> None:
        history_file, lease = (Path(killed.run_dir) / name for name in ("history.jsonl", "lease.json"))
        while not (history_file.exists() and history_file.read_text().count("\n") >= lines):
            time.sleep(0.005)
        os.kill(json.loads(lease.read_text())["pid"], signal.SIGKILL)

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(kill)
        assert forks.run([killed]) == [signal.SIGKILL], log_of(killed)
        done.result()
    assert forks.run([reference, killed]) == [0, 0], (lines, log_of(killed))
    assert_same_training(killed, reference)


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_a_training_killed_on_one_machine_goes_on_on_another(cases, forks, s3):
    """What they have in common is the remote workspace: neither sees the run folder of the other."""
    way = {"task__checkpoints_every_n_train_steps": 1, "task__max_epochs": 8, "task__val_check_interval": 3}
    shared = {"uri": f"{s3.uri}/w/runs/key", "job": {"stage": "pretrain", "key": "key"}}
    reference, first, second = (cases.spec(name, **way) for name in ("reference", "first", "second"))
    first, second = replace(first, shared=shared), replace(second, shared=shared)

    def kill() -> None:
        lease, step = Path(first.run_dir) / "lease.json", 0
        while step < 3:
            if "w/runs/key/state.json" in set(s3.keys()):
                step = json.loads(s3.get("w/runs/key/state.json")).get("step", 0)
        os.kill(json.loads(lease.read_text())["pid"], signal.SIGKILL)

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(kill)
        assert forks.run([first], environment=s3.environment) == [signal.SIGKILL], log_of(first)
        done.result()
    assert forks.run([reference, second], environment=s3.environment) == [0, 0], log_of(second)
    assert "taken from s3://" in Path(f"{second.run_dir}.spec.json.log").read_text()
    assert_same_training(second, reference)
