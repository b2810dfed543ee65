"""`bmfm ui`: the pages of Prefect and MLflow over what this workspace recorded, on loopback, until Ctrl-C."""

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.request import ProxyHandler, build_opener

from bmfm_pipeline.errors import PipelineError
from bmfm_pipeline.storage import Workspace
from bmfm_pipeline.tracking import is_http, serving_command, tracking_uri

HOST = "127.0.0.1"
HEALTH = {"Prefect": "/api/health", "MLflow": "/health"}
# MLflow's server would start a dozen processes for jobs that nothing here asks for.
QUIET_MLFLOW = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}


def ui(arguments: argparse.Namespace) -> dict[str, Any]:
    """Start both servers and wait; Ctrl-C or SIGTERM ends both. What they print goes to files in the state folder."""
    state = Workspace().state_dir
    state.mkdir(parents=True, exist_ok=True)
    ports = {"Prefect": arguments.prefect_port, "MLflow": arguments.mlflow_port}
    store = tracking_uri(state)
    if is_http(store):  # a server of the user's
        print(f"MLflow   {store}", flush=True)
        del ports["MLflow"]
    for port in ports.values():
        _refuse_taken(port)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
    servers: dict[str, Server] = {}
    try:
        for name, port in ports.items():
            if name == "Prefect":
                servers[name] = _start_prefect(state, port)
            else:
                servers[name] = Server(serving_command(store, HOST, port), QUIET_MLFLOW, state / "ui-mlflow.log")
        for name, server in servers.items():
            server.wait_for(name, ports[name])
            print(f"{name:<8} http://{HOST}:{ports[name]}", flush=True)
        print(f"Ctrl-C stops {'both' if len(servers) > 1 else 'it'}", flush=True)
        while all(server.process.poll() is None for server in servers.values()):
            time.sleep(0.5)
        raise PipelineError(next(server.ended() for server in servers.values() if server.process.poll() is not None))
    except KeyboardInterrupt:
        return {}
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


def _refuse_taken(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise PipelineError(
                f"port {port} is taken ({error.strerror}); is `bmfm ui` running already? Else choose others with --prefect-port and --mlflow-port"
            ) from error
