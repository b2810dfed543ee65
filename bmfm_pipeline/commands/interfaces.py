"""`bmfm ui`: the pages of Prefect and MLflow over what this workspace recorded, on loopback, until Ctrl-C."""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, build_opener

from bmfm_pipeline.commands.listening import HOST, LOOPBACK, ask, is_taken, listener_of
from bmfm_pipeline.errors import PipelineError
from bmfm_pipeline.storage import Workspace, strip_userinfo
from bmfm_pipeline.tracking import artifact_folder, is_http, serving_command, tracking_uri

PREFECT, MLFLOW = "Prefect", "MLflow"
HEALTH = {PREFECT: "/api/health", MLFLOW: "/health"}
OPTIONS = {PREFECT: "--prefect-port", MLFLOW: "--mlflow-port"}
# MLflow's server would start a dozen processes for jobs that nothing here asks for.
QUIET_MLFLOW = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}


@dataclass(frozen=True)
class Place:
    """Where one of the two pages is: its address, and whether a server runs there already."""

    address: str
    running: bool
    port: int = 0


def ui(arguments: argparse.Namespace) -> dict[str, Any]:
    """Start what is not running yet and wait; Ctrl-C or SIGTERM ends what was started here. Servers print into the state folder.

    A server that shows the same runs already, or that the environment names, is used. PipelineError says who holds a port otherwise.
    """
    state = Workspace().state_dir
    state.mkdir(parents=True, exist_ok=True)
    store = tracking_uri(state)
    places = {
        PREFECT: _place_of_prefect(state, arguments.prefect_port),
        MLFLOW: _place_of_mlflow(store, arguments.mlflow_port),
    }
    answer = {name.lower(): place.address for name, place in places.items()}
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
    servers: dict[str, Server] = {}
    try:
        for name, place in places.items():
            if not place.running and name == PREFECT:
                servers[name] = _start_prefect(state, place.port)
            elif not place.running:
                servers[name] = Server(serving_command(store, HOST, place.port), QUIET_MLFLOW, state / "ui-mlflow.log")
        for name, place in places.items():
            if name in servers:
                servers[name].wait_for(name, place.port)
            print(f"{name:<8} {place.address}{'' if name in servers else ' (running already)'}", flush=True)
        if not servers:
            print("both run already, and were not started here", flush=True)
            return answer
        print(f"Ctrl-C stops {'both' if len(servers) > 1 else next(iter(servers))}", flush=True)
        while all(server.process.poll() is None for server in servers.values()):
            time.sleep(0.5)
        raise PipelineError(next(server.ended() for server in servers.values() if server.process.poll() is not None))
    except KeyboardInterrupt:
        return answer
    finally:
        for server in servers.values():
            server.stop()


class Server:
    """One server in a session of its own, so that it ends with all its workers."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path):
        self.log = log
        with open(log, "w") as stream:
            self.process = subprocess.Popen(
                command, env={**os.environ, **environment}, stdout=stream, stderr=stream, start_new_session=True
            )

    def ended(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return f"a server ended by itself (exit code {self.process.returncode}): {lines[-1] if lines else ''} (all in {self.log})"

    def wait_for(self, name: str, port: int, seconds: float = 120) -> None:
        """Return when its page can be opened; PipelineError when it ends or stays silent."""
        opener = build_opener(ProxyHandler({}))  # a proxy has no way to this machine's loopback
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if self.process.poll() is not None:
                raise PipelineError(self.ended())
            try:
                opener.open(f"http://{HOST}:{port}{HEALTH[name]}", timeout=10).close()
                return
            except OSError:  # URLError and HTTPError too: not listening yet, or listening and not ready
                time.sleep(0.3)
        raise PipelineError(f"no answer on port {port} within {seconds:.0f} s; see {self.log}")

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def _start_prefect(state: Path, port: int) -> Server:
    from flows.local import server_environment

    command = [sys.executable, "-m", "prefect", "server", "start", "--host", HOST, "--port", str(port)]
    return Server(command, server_environment(state, HOST, port), state / "ui-prefect.log")


def _place_of_prefect(state: Path, port: int) -> Place:
    """The server that PREFECT_API_URL names, else the one on `port` when it has the runs of `state`, else a new one."""
    from flows.local import server_environment

    if named := os.environ.get("PREFECT_API_URL"):
        page = strip_userinfo(named).removesuffix("/").removesuffix("/api")
        if ask(f"{named.removesuffix('/')}/health").answered:
            return Place(page, running=True)
        parts = urlsplit(page)
        if parts.hostname not in LOOPBACK or parts.port is None:
            raise PipelineError(
                f"no Prefect server answers at {page}, which PREFECT_API_URL names; start it there, or unset the variable"
            )
        port = parts.port  # the one that `bmfm ui` is to serve again
    address = f"http://{HOST}:{port}"
    if not is_taken(port):
        return Place(address, running=False, port=port)
    settings = ask(f"{address}/api/admin/settings")
    if ask(f"{address}/api/health").text != "true" or not isinstance(settings.json, dict):
        raise _taken(PREFECT, port)
    home = server_environment(state, HOST, port).get("PREFECT_HOME") or os.environ.get("PREFECT_HOME")
    theirs = settings.json.get("home")
    if home is not None and theirs is not None and Path(theirs) != Path(home):
        raise _taken(PREFECT, port, f"a Prefect server over {theirs}; the runs of this workspace are in {home}")
    return Place(address, running=True)


def _place_of_mlflow(store: str, port: int) -> Place:
    """The user's server, else the one on `port` when it keeps its files where this store does, else a new one."""
    if is_http(store):
        shown = strip_userinfo(store)
        if not ask(f"{store.rstrip('/')}/health").answered:
            raise PipelineError(
                f"no MLflow server answers at {shown}, which MLFLOW_TRACKING_URI names; start it there, or unset the variable"
            )
        return Place(shown, running=True)
    address = f"http://{HOST}:{port}"
    if not is_taken(port):
        return Place(address, running=False, port=port)
    found = ask(f"{address}/api/2.0/mlflow/experiments/get?experiment_id=0")
    if not isinstance(found.json, dict) or "experiment" not in found.json:
        raise _taken(MLFLOW, port)
    theirs, ours = found.json["experiment"].get("artifact_location", ""), artifact_folder(store)
    if ours is None or theirs.rsplit("/", 1)[0] != ours:
        raise _taken(
            MLFLOW,
            port,
            f"an MLflow server whose files are in {theirs.rsplit('/', 1)[0]}; those of this workspace are in {ours or store}",
        )
    return Place(address, running=True)


def _taken(name: str, port: int, who: str = "") -> PipelineError:
    who = who or listener_of(port) or "a process of another user"
    return PipelineError(
        f"port {port} is taken by {who}; end that, or choose another port for {name} with {OPTIONS[name]}"
    )
