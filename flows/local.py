"""Flows on one machine, without a server to start: prepared before Prefect is imported, and light itself."""

import atexit
import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bmfm_pipeline.errors import Preempted
from flows.local_server import HOST, LocalServer

Listener = Callable[[dict[str, Any]], None]
_listener: Listener | None = None
_stopping = threading.Event()

# Where `bmfm ui` shows the runs of a server that has ended with its run.
PAGE = "http://127.0.0.1:4200"
# Nothing is sent outside, a server that Prefect starts for one run has time to come up, and the terminal shows our lines only (the
# run's own page has them all).
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
    return bool(os.environ.get("PREFECT_HOME")) or user_has_a_server()


def user_has_a_server() -> bool:
    """Whether a server is named, or a profile that may name one."""
    if any(os.environ.get(name) for name in ("PREFECT_API_URL", "PREFECT_PROFILE", "PREFECT_PROFILES_PATH")):
        return True
    home = os.environ.get("PREFECT_HOME") or Path.home() / ".prefect"
    return (Path(home) / "profiles.toml").exists()


def _serve() -> LocalServer | None:
    """Start a server for this process and point Prefect at it, unless the user has one. Must run before prefect is imported."""
    if user_has_a_server():
        return None
    home = Path(os.environ["PREFECT_HOME"])
    home.mkdir(parents=True, exist_ok=True)
    server = LocalServer(home)
    os.environ["PREFECT_API_URL"] = f"{server.address}/api"
    direct = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")  # a proxy has no way to this machine's loopback
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(filter(None, [direct, HOST]))
    os.environ.setdefault("PREFECT_UI_URL", PAGE)
    atexit.register(server.stop)  # after Prefect, which registers itself later and has things to send until then
    return server


@contextlib.contextmanager
def listening(listener: Listener | None) -> Iterator[None]:
    """While inside, events of the flows of this process reach `listener` too (a terminal's progress bar, say)."""
    global _listener
    before, _listener = _listener, listener
    _stopping.clear()
    try:
        yield
    finally:
        _listener = before


def stop_all() -> None:
    """End what other threads of this process are training: each stops at the next event it tells, and saves."""
    _stopping.set()


def is_stopping() -> bool:
    return _stopping.is_set()


def tell(event: dict[str, Any]) -> None:
    if _stopping.is_set():
        raise Preempted("the run was stopped; run the same command again to go on")
    if _listener is not None:
        _listener(event)


@contextlib.contextmanager
def _sigterm_like_ctrl_c() -> Iterator[None]:
    """While inside, SIGTERM ends the run as Ctrl-C does, with everything recorded and a word on how to go on."""

    def interrupt(number, frame):
        raise KeyboardInterrupt

    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def _unwatched() -> Iterator[None]:
    """While inside, flows send no heartbeats: nothing on a server that ends with its run asks for them, and each flow waits up to a
    second at its end for the thread that sends them."""
    from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

    with temporary_settings(updates={PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
        yield


def start_here(
    state_dir: str | os.PathLike, parameters: dict[str, Any], on_progress: Listener | None = None
) -> dict[str, Any]:
    """What `bmfm run` calls: start a server, import Prefect meanwhile, run the pipeline. `start_seconds` of the result is the cost.

    `parameters` are the fields of flows.parameters.PipelineParameters. Errors of the stages are raised as they are. The server
    lives as long as this process.
    """

    def load() -> Callable[[Listener], dict[str, Any]]:
        from flows.parameters import PipelineParameters
        from flows.pipeline import run_pipeline

        return lambda first: run_pipeline(PipelineParameters.model_validate(parameters), first)

    return _start(state_dir, load, on_progress)


def start_benchmark_here(
    state_dir: str | os.PathLike, parameters: dict[str, Any], on_progress: Listener | None = None
) -> dict[str, Any]:
    """What `bmfm benchmark` calls, as start_here; `parameters` are the fields of flows.benchmark_parameters.BenchmarkParameters."""

    def load() -> Callable[[Listener], dict[str, Any]]:
        from flows.benchmark import run_benchmark_here
        from flows.benchmark_parameters import BenchmarkParameters

        return lambda first: run_benchmark_here(BenchmarkParameters.model_validate(parameters), first)

    return _start(state_dir, load, on_progress)


def _start(
    state_dir: str | os.PathLike, load: Callable[[], Callable[[Listener], dict[str, Any]]], on_progress: Listener | None
) -> dict[str, Any]:
    began = time.monotonic()
    server = None
    if "prefect" not in sys.modules:
        prepare(state_dir)
        server = _serve()
    carry_out = load()
    if server is not None:
        server.wait()
    # Its lines would reach the terminal through whatever handler the root logger has; they are on the run's page.
    logging.getLogger("prefect").propagate = False
    started: list[float] = []

    def first(event: dict[str, Any]) -> None:
        if not started:
            started.append(time.monotonic() - began)
        if on_progress is not None:
            on_progress(event)

    with _sigterm_like_ctrl_c(), _unwatched() if server is not None else contextlib.nullcontext():
        result = carry_out(first)
    return {**result, "start_seconds": round(started[0], 2) if started else None}
