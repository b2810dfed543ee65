"""Start the training child, relay what it says, and turn its end into a result or an error."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bmfm_pipeline import errors
from bmfm_pipeline.storage import write_json_atomic
from bmfm_pipeline.training.spec import EXIT_PREEMPTED, TrainResult, TrainSpec

GRACE = 25.0  # seconds a stopped child has to save


def train_in_child(spec: TrainSpec, on_progress: Callable[[dict[str, Any]], None] | None = None) -> TrainResult:
    """Train in a process of its own, so that a crash, a kill or a leak there cannot take this one along.

    `on_progress` gets the child's events. Raises Preempted when it was stopped and left a checkpoint (call again to resume),
    ConfigError, DataError, CheckpointError or TrainingError as the child did, TrainingError with its last lines when it died.
    """
    run_dir = Path(spec.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    spec_file = run_dir / "spec.json"
    write_json_atomic(spec_file, spec.to_dict())
    child = subprocess.Popen(
        _command(spec, spec_file),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "BMFM_CHILD_STARTED": str(time.time()), "PYTHONUNBUFFERED": "1"},
    )
    tail: deque[str] = deque(maxlen=30)
    drain = threading.Thread(target=_keep_errors, args=(child, run_dir / "training.log", tail), daemon=True)
    drain.start()
    final: dict[str, Any] = {}
    try:
        for line in child.stdout:
            event = _parse(line)
            if event is None:
                tail.append(line.rstrip())
                continue
            if event["kind"] in ("done", "error", "preempted"):
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


def _command(spec: TrainSpec, spec_file: Path) -> list[str]:
    module = ["-m", "bmfm_pipeline.training.child", str(spec_file)]
    devices = spec.config["task"].get("devices", "auto")
    count = len(devices) if isinstance(devices, list) else int(devices) if str(devices).isdigit() else 1
    if count > 1:
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", *module]
    return [sys.executable, *module]


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
    if child.poll() is None:
        child.send_signal(signal.SIGTERM)
        try:
            child.wait(timeout=GRACE)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def _result(code: int, final: dict[str, Any], tail: deque[str], run_dir: Path) -> TrainResult:
    if final.get("kind") == "done" and code == 0:
        checkpoints = run_dir / "checkpoints"
        best = final["summary"]["best_checkpoint"]
        return TrainResult(
            checkpoints / best,
            checkpoints / "last.ckpt",
            run_dir / "model",
            run_dir / "history.jsonl",
            final["summary"],
        )
    if code == EXIT_PREEMPTED:
        raise errors.Preempted(
            f"training was stopped ({final.get('reason')}) and saved; run the same command again to go on"
        )
    if final.get("kind") == "error":
        kind = getattr(errors, final["error"], errors.TrainingError)
        raise kind(final["message"])
    if code < 0:
        name = signal.Signals(-code).name
        hint = "; the system may be out of memory: lower data_module.batch_size" if name == "SIGKILL" else ""
        raise errors.TrainingError(
            f"the training process was ended by {name}{hint}. Run the same command again to resume from its last checkpoint"
        )
    lines = "\n".join(tail)
    raise errors.TrainingError(
        f"the training process ended with code {code}; its last lines (all in {run_dir / 'training.log'}):\n{lines}"
    )
