"""Carries out stages in forks of itself: the libraries are loaded once, so that each stage is a process of its own and quick to start.

stdin takes lines of {"name", "target", "workspace", "environment", "die", "most_bytes"}: preprocess the file `target`. A fork whose `die`
is given kills itself with SIGKILL when it comes to that place; no file that it writes may be larger than `most_bytes`. stdout tells
{"name", "status": wait status} of each fork that has ended; what a fork says and gives back lies in the files NAME.log and NAME.json of
the folder that this process works in.
"""

import json
import logging
import os
import resource
import select
import signal
import sys
from pathlib import Path

import mlflow  # noqa: F401 - loaded here, not in every fork
import s3fs  # noqa: F401
import scanpy  # noqa: F401
import sklearn.model_selection  # noqa: F401

from bmfm_pipeline.data import sources, stores  # noqa: F401
from bmfm_pipeline.stages import plan_stage, preprocess, run_stage  # noqa: F401
from bmfm_pipeline.storage import artefact, quarantine, remote


def die(*given, **named) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def after(function, times: int = 1):
    """`function`, with death right after its n-th call."""
    left = [times]

    def call(*given, **named):
        result = function(*given, **named)
        left[0] -= 1
        if left[0] == 0:
            die()
        return result

    return call


def arm(place: str) -> None:
    """Make this process die at a place of publishing."""
    if place == "manifest is written":
        artefact._rename_into_place = die
    elif place == "folder is in place":
        artefact._rename_into_place = after(artefact._rename_into_place)
    elif place == "first file is uploaded":
        remote.upload = after(remote.upload)
    elif place == "all but the manifest is uploaded":
        artefact._write_manifest = die
    elif place == "damaged one is set aside":
        quarantine.os = type("Os", (), {"rename": staticmethod(after(os.rename))})
    else:
        raise ValueError(f"no place {place}")


def plan(request: dict):
    return plan_stage("preprocess", request["target"], label="celltype", workspace=request["workspace"])[-1]


def carry_out(request: dict) -> None:
    os.environ.update(request.get("environment") or {})
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", force=True)
    if request.get("die"):
        arm(request["die"])
    if limit := request.get("most_bytes"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    job, steps = plan(request), []
    result = run_stage(job, on_progress=lambda event: steps.append(event.get("step_name")))
    told = {
        "uri": result["uri"],
        "hash": result["hash"],
        "cached": result["cached"],
        "steps": steps,
        "reason": job.reason,
    }
    Path(f"{request['name']}.json").write_text(json.dumps(told))


def fork(request: dict) -> int:
    pid = os.fork()
    if pid:
        return pid
    log = os.open(f"{request['name']}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    code = 1
    try:
        carry_out(request)
        code = 0
    except BaseException:
        logging.exception("ended")
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    running: dict[int, str] = {}
    buffer, warm = b"", False
    while True:
        ready, _, _ = select.select([0], [], [], 0.02)
        if ready:
            read = os.read(0, 65536)
            if not read:
                break
            *lines, buffer = (buffer + read).split(b"\n")
            for line in lines:
                request = json.loads(line)
                if not warm:  # what planning remembers is remembered for all forks
                    plan({**request, "workspace": "warm"})
                    warm = True
                running[fork(request)] = request["name"]
        while running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            sys.stdout.write(json.dumps({"name": running.pop(pid), "status": status}) + "\n")
            sys.stdout.flush()
    for pid in running:
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
