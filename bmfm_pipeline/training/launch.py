"""Start the training child, relay what it says, and turn its end into a result or an error."""

import contextlib
import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from bmfm_pipeline import errors
from bmfm_pipeline.storage import write_json_atomic
from bmfm_pipeline.training.options import processes
from bmfm_pipeline.training.spec import EXIT_PREEMPTED, TrainResult, TrainSpec

GRACE = 25.0  # seconds a stopped child has to save
# What a launcher around us may have set for its own processes, and ours must not take for theirs.
_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


def train_in_child(
    spec: TrainSpec, on_progress: Callable[[dict[str, Any]], None] | None = None, environment: Mapping[str, str] = {}
) -> TrainResult:
    """Train in a process of its own, so that a crash, a kill or a leak there cannot take this one along.

    `on_progress` gets the child's events; `environment` are variables that it has besides ours. Raises Preempted when it was stopped and
    left a checkpoint (call again to resume), ConfigError, DataError, CheckpointError or TrainingError as the child did, TrainingError with
    its last lines when it died.
    """
    run_dir = Path(spec.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    spec_file = run_dir / "spec.json"
    write_json_atomic(spec_file, spec.to_dict())
    command, variables = _command(spec, spec_file, environment)
    child = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
        env=variables,
    )
    tail: deque[str] = deque(maxlen=30)
    drain = threading.Thread(target=_keep_errors, args=(child, run_dir / "training.log", tail), daemon=True)
    drain.start()
    final: dict[str, Any] = {}
    try:
        with passing_on_sigterm(child):
            for line in child.stdout:
                event = _parse(line)
                if event is None:
                    tail.append(line.rstrip())
                    continue
                if event["kind"] in ("done", "error", "preempted") and not final:  # later ones are consequences
                    final = event
                if on_progress:
                    on_progress(event)
            code = child.wait()
    except BaseException:
        _stop(child)
        raise
    finally:
        drain.join(timeout=5)
        child.stdin.close()
    return _result(code, final, tail, run_dir)


@contextlib.contextmanager
def passing_on_sigterm(child: subprocess.Popen) -> Iterator[None]:
    """A SIGTERM to this process goes to the child, which saves and leaves; who handled it before gets it after that.

    The first process of a container would not be ended by it, and any other at once. Only the main thread can do this; elsewhere the
    child notices that its parent is gone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received = []

    def pass_on(number, frame) -> None:
        received.append(number)
        child.send_signal(number)

    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
        if received and callable(before):
            before(signal.SIGTERM, None)


def _command(spec: TrainSpec, spec_file: Path, own: Mapping[str, str] = {}) -> tuple[list[str], dict[str, str]]:
    """The child's command line and environment; torchrun stands between where several processes train."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in _LAUNCHER and not name.startswith("TORCHELASTIC_")
    }
    # Threads that spin while they wait slow small models ten-fold on a machine that has other work too.
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    environment |= {"BMFM_CHILD_STARTED": str(time.time()), "PYTHONUNBUFFERED": "1"}
    count, numbers = processes(spec.config["task"].get("devices", "auto"), _gpus())
    # A config that asks for several GPUs, or names them, keeps those.
    environment |= {name: own[name] for name in own if name != "CUDA_VISIBLE_DEVICES" or (count == 1 and not numbers)}
    if numbers is not None:
        visible = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
        chosen = [visible[number] if number < len(visible) and visible[number] else str(number) for number in numbers]
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(chosen)
    module = ["-m", "bmfm_pipeline.training.child", str(spec_file)]
    if count > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        # One process would take every core; several share them.
        environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // count)))
        return [sys.executable, *torchrun, *module], environment
    return [sys.executable, *module], environment


def visible_gpus() -> list[str]:
    """The NVIDIA devices that a child of ours may use, as CUDA_VISIBLE_DEVICES names them."""
    count = _gpus()
    named = [word.strip() for word in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if word.strip()]
    return named[:count] if named else [str(number) for number in range(count)]


def _gpus() -> int:
    """How many NVIDIA devices are visible, without importing torch."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    return count.value if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 else 0


def _keep_errors(child: subprocess.Popen, log: Path, tail: deque[str]) -> None:
    with open(log, "a") as stream:
        for line in child.stderr:
            stream.write(line)
            stream.flush()
            tail.append(line.rstrip())


def _parse(line: str) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except json.JSONDecodeError:
        return None
    return event if isinstance(event, dict) and "kind" in event else None


def _stop(child: subprocess.Popen) -> None:
    """Ask the child to save and leave; end its whole group when it does not."""
    child.stdin.close()  # processes behind torchrun notice it even when torchrun does not pass the signal on
    if child.poll() is None:
        child.send_signal(signal.SIGTERM)
        try:
            child.wait(timeout=GRACE)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def _result(code: int, final: dict[str, Any], tail: deque[str], run_dir: Path) -> TrainResult:
    kind = final.get("kind")
    if kind == "done":  # everything was written before it was said
        checkpoints = run_dir / "checkpoints"
        return TrainResult(
            checkpoints / final["summary"]["best_checkpoint"],
            checkpoints / "last.ckpt",
            run_dir / "model",
            run_dir / "history.jsonl",
            final["summary"],
        )
    if kind == "error":
        raise getattr(errors, final["error"], errors.TrainingError)(final["message"])
    if kind == "preempted" or code == EXIT_PREEMPTED:
        raise errors.Preempted(
            f"training was stopped ({final.get('reason', 'no reason given')}) and saved; run the same command again to go on"
        )
    if code in (-signal.SIGTERM, -signal.SIGINT):
        raise errors.Preempted(
            f"training was stopped ({signal.Signals(-code).name}) before it began; run the same command again to go on"
        )
    of_one = next((found for line in tail if (found := re.search(r"exitcode\s*: -(\d+)", line))), None)
    if code > 0 and of_one:  # torchrun says so of a process that it started, and ends with a code of its own
        code = -int(of_one[1])
    if code < 0:
        name = signal.Signals(-code).name
        hint = f"; if nobody did it, the machine ran {errors.out_of_memory_message()}" if name == "SIGKILL" else ""
        raise errors.TrainingError(
            f"the training process was ended by {name}{hint}. Run the same command again to resume from its last checkpoint"
        )
    lines = "\n".join(tail)
    raise errors.TrainingError(
        f"the training process ended with code {code}; its last lines (all in {run_dir / 'training.log'}):\n{lines}"
    )
