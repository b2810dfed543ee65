"""A run whose worker was stopped goes back to its pool, and the next worker goes on with it from what was saved.

A worker of Prefect that is told to end kills the processes of its runs before they can say how they end, so that their pages would say
Running for ever. A small process beside each run of a worker waits until the run's own process is gone. Where its worker is gone too,
it makes the run one that waits for a worker; otherwise the worker tells. Imports Prefect only when it has something to say.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from bmfm_pipeline.storage.holders import identity, is_alive

ENDED = b"."
# A worker that stops kills its runs first and is gone seconds later. One that stays tells the server itself what became of them.
WORKER_STOPS_WITHIN = 15.0
SERVER_ANSWERS_WITHIN = 120.0
# A run that takes its worker along whenever it runs must come to an end.
MOST_ATTEMPTS = 10
STOPPED = "Its worker was stopped. The next worker of the pool goes on with it from what was saved."
TOO_OFTEN = (
    f"Its worker was stopped in each of {MOST_ATTEMPTS} attempts. Start it again: it goes on from its last checkpoint."
)


@contextlib.contextmanager
def handed_back_when_stopped() -> Iterator[None]:
    """While inside, a run that a worker has started is watched over; any other is left alone."""
    run = os.environ.get("PREFECT__FLOW_RUN_ID")
    if not run or not os.environ.get("PREFECT__WORKER_NAME"):
        yield
        return
    worker = json.dumps(identity(os.getppid()))
    guard = subprocess.Popen(
        [sys.executable, "-P", "-m", "flows.handing_back", run, worker],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        yield
    except Exception:  # told to the server by this process; what ends a process is no Exception
        _let_go(guard)
        raise
    _let_go(guard)


def _let_go(guard: subprocess.Popen) -> None:
    with contextlib.suppress(OSError):
        guard.stdin.write(ENDED)
        guard.stdin.close()
    guard.wait()


def _wait_until_gone() -> bool:
    """Wait for the run's process; whether it is gone without having ended its work."""
    said = b""
    while read := os.read(0, 1):
        said += read
    return not said


def _worker_is_gone(worker: dict) -> bool:
    until = time.monotonic() + WORKER_STOPS_WITHIN
    while is_alive(worker, Path()):
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True


def hand_back(run: str) -> None:
    """Make a run that is shown as running, or as ended by the signal that stopped it, one that waits for a worker."""
    from uuid import UUID

    from prefect.client.orchestration import get_client
    from prefect.states import AwaitingRetry, Crashed

    with get_client(sync_client=True) as client:
        found = client.read_flow_run(UUID(run))
        if found.state is None or not (found.state.is_running() or found.state.is_crashed()):
            return
        state = AwaitingRetry(message=STOPPED) if found.run_count < MOST_ATTEMPTS else Crashed(message=TOO_OFTEN)
        client.set_flow_run_state(found.id, state, force=True)


def main(run: str, worker: str) -> None:
    for number in (
        signal.SIGTERM,
        signal.SIGINT,
        signal.SIGHUP,
    ):  # they are for the run; its end is the end of this process
        signal.signal(number, signal.SIG_IGN)
    if not _wait_until_gone() or not _worker_is_gone(json.loads(worker)):
        return
    until = time.monotonic() + SERVER_ANSWERS_WITHIN
    while True:
        try:
            hand_back(run)
            return
        except Exception as error:
            if time.monotonic() > until:
                print(f"run {run} could not be handed back to its pool: {error}", file=sys.stderr)
                return
            time.sleep(2)


if __name__ == "__main__":
    main(*sys.argv[1:])
