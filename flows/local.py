"""Flows on one machine, without a server to start: prepared before Prefect is imported, and light itself."""

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Listener = Callable[[dict[str, Any]], None]
_listener: Listener | None = None

# Nothing is sent outside, the server that Prefect starts for one run has time to come up, and the terminal shows our lines only
# (the run's own page has them all).
QUIET = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_TELEMETRY_ENABLE_RESOURCE_METRICS": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "90",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
TERMINAL = {"PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL", "PREFECT_SERVER_LOGGING_LEVEL": "ERROR"}


def prepare(state_dir: str | os.PathLike, quiet: bool = True) -> dict[str, str]:
    """Set the environment of Prefect; returns what was set. Must run before prefect is imported.

    A user who has chosen a server, a home or a profile keeps it; otherwise Prefect lives under `state_dir`/prefect.
    """
    if "prefect" in sys.modules:
        raise RuntimeError("flows.local.prepare must be called before prefect is imported")
    chosen = dict(QUIET)
    if quiet:
        chosen |= TERMINAL
    if not user_has_chosen():
        chosen["PREFECT_HOME"] = str(_home(state_dir))
        chosen["PREFECT_SERVER_EPHEMERAL_ENABLED"] = "true"
    applied = {name: value for name, value in chosen.items() if name not in os.environ}
    os.environ.update(applied)
    return applied


def server_environment(state_dir: str | os.PathLike, host: str, port: int) -> dict[str, str]:
    """Environment of a Prefect server that shows the runs of `state_dir`, or of the home that the user has chosen."""
    chosen = {
        **QUIET,
        "PREFECT_API_URL": f"http://{host}:{port}/api",
        "PREFECT_SERVER_UI_API_URL": f"http://{host}:{port}/api",
    }
    if not user_has_chosen():
        chosen["PREFECT_HOME"] = str(_home(state_dir))
    return chosen


def _home(state_dir: str | os.PathLike) -> Path:
    home = Path(state_dir).absolute() / "prefect"
    home.mkdir(parents=True, exist_ok=True)  # Prefect makes its home, but not the folder it lies in
    return home


def user_has_chosen() -> bool:
    """Whether the environment or a profile of the user names a server or home of their own."""
    if any(
        os.environ.get(name) for name in ("PREFECT_API_URL", "PREFECT_HOME", "PREFECT_PROFILE", "PREFECT_PROFILES_PATH")
    ):
        return True
    return (Path.home() / ".prefect" / "profiles.toml").exists()


@contextlib.contextmanager
def listening(listener: Listener | None) -> Iterator[None]:
    """While inside, events of the flows of this process reach `listener` too (a terminal's progress bar, say)."""
    global _listener
    before, _listener = _listener, listener
    try:
        yield
    finally:
        _listener = before


def tell(event: dict[str, Any]) -> None:
    if _listener is not None:
        _listener(event)


def start_here(
    state_dir: str | os.PathLike, parameters: dict[str, Any], on_progress: Listener | None = None
) -> dict[str, Any]:
    """What `bmfm run` calls: prepare, import Prefect, run the pipeline. `start_seconds` of the result is what starting cost.

    `parameters` are the fields of flows.parameters.PipelineParameters. Errors of the stages are raised as they are.
    """
    began = time.monotonic()
    if "prefect" not in sys.modules:
        prepare(state_dir)
    from flows.parameters import PipelineParameters
    from flows.pipeline import run_pipeline

    # Its lines would reach the terminal through whatever handler the root logger has; they are on the run's page.
    logging.getLogger("prefect").propagate = False
    started: list[float] = []

    def first(event: dict[str, Any]) -> None:
        if not started:
            started.append(time.monotonic() - began)
        if on_progress is not None:
            on_progress(event)

    result = run_pipeline(PipelineParameters.model_validate(parameters), first)
    return {**result, "start_seconds": round(started[0], 2) if started else None}
