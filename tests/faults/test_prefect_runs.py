"""Runs of workers whose processes are killed or stopped, one after the other, and whose server is restarted meanwhile."""

import json
import re
import signal
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
STEPS = 300
PATIENCE = 6.0  # seconds: longer than between two updates of the progress that the page shows


@pytest.fixture(scope="module")
def tiny(tiny_model) -> dict:
    """Parameters of a training that lasts long enough to be killed, and keeps a checkpoint every few steps."""
    often = ["task.checkpoints_every_n_train_steps=5", "task.log_every_n_steps=1"]
    return {"max_steps": STEPS, "overrides": [*tiny_model, *often]}


class Trainings:
    """The trainings of these tests: their processes, and how far their checkpoints have come."""

    def __init__(self, server, wait_for):
        self.server, self.wait_for = server, wait_for
        self.before = set(self._files())

    def _files(self) -> list[Path]:
        return list(self.server.machine.workspace.glob("runs/*/training/checkpoints/last.ckpt.json"))

    def saved(self) -> int:
        """The step of the newest checkpoint, 0 without one."""
        steps = [0]
        for file in set(self._files()) - self.before:
            try:
                steps.append(json.loads(file.read_text())["step"])
            except (OSError, ValueError):  # being written
                return 0
        return max(steps)

    def of(self, run: str):
        children = self.server.machine.training_children()
        return next((process for process in children if run in str(process.environ())), None)

    def suspended(self, run: str, beyond: int = 0):
        """The training process of a run, stopped in its tracks once it has kept a checkpoint beyond that step."""

        def trains():
            child = self.of(run)
            return child if child is not None and self.saved() > beyond else None

        try:
            child = self.wait_for(trains, 180, "a checkpoint", every=0.02)
        except BaseException:
            print(self.server.flow_run(run)["state"], self.server.logs(run))
            raise
        child.suspend()
        return child

    def wait_until_left(self) -> None:
        """Until no training process is alive: each saves and leaves when it is asked to, or its parent is gone."""
        self.wait_for(lambda: not self.server.machine.training_children(), 60, "the training to leave")


def state_of(server, run: str) -> tuple[str, str]:
    state = server.flow_run(run)["state"]
    return state["name"], state["message"] or ""


def test_a_run_goes_on_from_its_checkpoint_whoever_is_killed_or_stopped(server, tiny, wait_for):
    trainings = Trainings(server, wait_for)
    # The training process is killed: the run fails, and says what to do.
    first = server.create_run("pretrain/zheng68k-mini", **tiny)
    child = trainings.suspended(first)
    before = trainings.saved()
    child.send_signal(signal.SIGKILL)
    ended = server.wait_until_final(first, 120)
    assert ended["state_name"] == "Failed"
    assert "ended by SIGKILL" in ended["state"]["message"] and "again to resume" in ended["state"]["message"]

    # The process of the run is killed: its worker says so at once, and the training saves and leaves.
    second = server.create_run("pretrain/zheng68k-mini", **tiny)
    child = trainings.suspended(second, before)
    child.parent().send_signal(signal.SIGKILL)
    child.resume()
    assert server.wait_until_final(second, 120)["state_name"] == "Crashed"
    trainings.wait_until_left()

    # The training is asked to stop: its task tries again by itself.
    third = server.create_run("pretrain/zheng68k-mini", **tiny)
    child = trainings.suspended(third, trainings.saved())
    child.send_signal(signal.SIGTERM)
    child.resume()
    trainings.wait_until_left()

    # The worker is stopped: the run goes back to its pool, and the next worker takes it up.
    child = trainings.suspended(third, trainings.saved())
    server.workers["gpu"].send_signal(signal.SIGTERM)
    child.resume()
    wait_for(lambda: state_of(server, third)[0] == "AwaitingRetry", 120, "the run to be handed back", every=0.3)
    assert "Its worker was stopped" in state_of(server, third)[1]
    server.workers["gpu"].wait(60)
    trainings.wait_until_left()
    server.start_worker("gpu")

    # Worker and server are killed: the run works on, and tells the server about it when that is back.
    child = trainings.suspended(third, trainings.saved())
    server.workers["gpu"].kill()
    server.process.kill()
    time.sleep(PATIENCE)
    step = trainings.saved()
    server.start()
    child.resume()
    child = trainings.suspended(third, step)  # the server does not answer yet
    server.wait_until_ready()
    assert state_of(server, third)[0] == "Running"
    server.start_worker("gpu")
    child.resume()
    ended = server.wait_until_final(third, 240)
    assert ended["state_name"] == "Completed", ended["state"]["message"]
    assert ended["run_count"] == 2

    (model,) = (server.machine.workspace / "artefacts" / "pretrain").glob(f"{ended['name'].rsplit('-', 1)[1]}*")
    history = [json.loads(line) for line in (Path(model) / "history.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in history if "train/loss" in entry] == list(range(1, STEPS + 1))
    resumed = [int(step) for step in re.findall(r"resuming from last.ckpt at step (\d+)", server.logs(third))]
    # Three times; a server that is killed may lose what it was told last.
    assert len(resumed) in (2, 3) and [before, *resumed, STEPS] == sorted({before, *resumed, STEPS})

    tasks = [task for task in server.task_runs(third) if task["name"] == "pretrain: train"]
    assert [task["run_count"] for task in tasks] == [2, 1]  # the second try of the run has a task of its own
    shown = [artifact["data"] for artifact in server.artifacts(third) if artifact["key"] == "pretrain-train-course"]
    assert len(shown) == 2, "updated in place, by the second try of the task too"
    assert [f"| resumed | at step {resumed[-1]:,} |" in page and "step 300 of 300" in page for page in shown].count(
        True
    ) == 1
    told = [line for line in server.logs(third).splitlines() if line.startswith("resuming from")]
    assert len(told) == len(set(told)) == len(resumed), "each line of the child once"

    again = server.create_run("pretrain/zheng68k-mini", **tiny)
    assert server.wait_until_final(again, 120)["state_name"] == "Cached"
