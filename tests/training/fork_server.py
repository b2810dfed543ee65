"""Training children without their seconds of imports: a process that has loaded everything forks one for each line on stdin.

A line is {"spec": file, "die": [place, n] or null, "environment": {}}. A child whose `die` is given kills itself with SIGKILL when it
comes to that place for the n-th time. stdout tells {"spec": file, "status": wait status} of each child that has ended.
"""

import json
import os
import select
import signal
import sys

from bmfm_pipeline.config import RunConfig
from bmfm_pipeline.training import (  # noqa: F401
    adaptive,
    averaging,
    batch_size,
    build_data_module,
    build_module,
    callbacks,
    checkpoints,
    child,
    export,
    keeping,
    module,
    validation,
)
from bmfm_pipeline.training.spec import TrainSpec


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def count_down(n: int, then):
    """A function that calls `then` at its n-th call."""
    left = [n]

    def step(*arguments):
        left[0] -= 1
        if left[0] == 0:
            then(*arguments)

    return step


def arm(place: str, n: int) -> None:
    """Make this process die at a place."""
    if place == "step":
        die_there, take_step = count_down(n, die), module.TrainingModule.training_step
        module.TrainingModule.training_step = lambda *batch: (die_there(), take_step(*batch))[1]
    elif place == "update":  # gradients are there, the weights are about to change
        die_there, before = count_down(n, die), module.TrainingModule.on_before_optimizer_step
        module.TrainingModule.on_before_optimizer_step = lambda *given: (before(*given), die_there())[0]
    elif place == "writing":

        def half(checkpoint, path):
            write(checkpoint, path)
            os.truncate(path, path.stat().st_size // 2)
            die()

        write, die_there = keeping.write_file, count_down(n, half)
        keeping.write_file = lambda *given: (die_there(*given), write(*given))[1]
    elif place == "manifest":
        die_there, publish = count_down(n, die), checkpoints.write_json_atomic
        checkpoints.write_json_atomic = lambda *given: (publish(*given), die_there())[0]
    elif place == "history":

        def half_line(history, trainer, values):
            write_line(history, trainer, values)
            text = history.file.read_text()
            history.file.write_text(text[: -len(text.splitlines()[-1]) // 2])
            die()

        write_line, die_there = callbacks.History._write, count_down(n, half_line)
        callbacks.History._write = lambda *given: (die_there(*given), write_line(*given))[1]
    else:
        raise ValueError(f"no place {place}")


def fork(request: dict) -> int:
    mine, _ = os.pipe()  # the other end stays open, as that of a parent that lives
    pid = os.fork()
    if pid:
        os.close(mine)
        return pid
    os.dup2(mine, 0)
    log = os.open(request["spec"] + ".log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(request["environment"])
    if request["die"]:
        arm(*request["die"])
    os._exit(child.main(request["spec"]))


def warm_up(spec_file: str) -> None:
    """Load what is loaded when it is first used; nothing may be differentiated before a fork."""
    spec = TrainSpec.from_file(spec_file)
    run = RunConfig.model_validate(spec.config)
    data = build_data_module(run, spec.data)
    data.setup("fit")
    build_module(run, data)
    next(iter(data.train_dataloader()))
    next(iter(data.val_dataloader()))


def main() -> None:
    running: dict[int, str] = {}
    buffer = b""
    warm = False
    while True:
        ready, _, _ = select.select([0], [], [], 0.02)
        if ready:
            read = os.read(0, 65536)
            if not read:
                break
            *lines, buffer = (buffer + read).split(b"\n")
            for line in lines:
                request = json.loads(line)
                if not warm:
                    warm_up(request["spec"])
                    warm = True
                running[fork(request)] = request["spec"]
        while running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            sys.stdout.write(json.dumps({"spec": running.pop(pid), "status": status}) + "\n")
            sys.stdout.flush()
    for pid in running:
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
