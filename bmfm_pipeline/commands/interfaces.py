"""`bmfm ui`: the pages of Prefect and MLflow over what this workspace recorded, on loopback, until Ctrl-C."""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from typing import Any

from bmfm_pipeline.errors import PipelineError
from bmfm_pipeline.storage import Workspace
from bmfm_pipeline.tracking import is_http, serving_command, tracking_uri

HOST = "127.0.0.1"


def ui(arguments: argparse.Namespace) -> dict[str, Any]:
    """Start both servers and wait; Ctrl-C or SIGTERM ends both."""
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
    servers = {}
    try:
        servers["Prefect"] = _start_prefect(state, arguments.prefect_port)
        if "MLflow" in ports:
            command = serving_command(store, HOST, arguments.mlflow_port)
            servers["MLflow"] = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
        for name, port in ports.items():
            _wait_for(name, servers[name], port)
            print(f"{name:<8} http://{HOST}:{port}", flush=True)
        print("Ctrl-C stops both", flush=True)
        while all(server.poll() is None for server in servers.values()):
            time.sleep(0.5)
        ended = [name for name, server in servers.items() if server.poll() is not None]
        raise PipelineError(f"the server of {', '.join(ended)} ended by itself; its messages are above")
    except KeyboardInterrupt:
        return {}
    finally:
        for server in servers.values():
            _stop(server)


def _start_prefect(state, port: int) -> subprocess.Popen:
    from flows.local import server_environment

    return subprocess.Popen(
        [sys.executable, "-m", "prefect", "server", "start", "--host", HOST, "--port", str(port)],
        env={**os.environ, **server_environment(state, HOST, port)},
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )


def _refuse_taken(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise PipelineError(
                f"port {port} is taken ({error.strerror}); is `bmfm ui` running already? Else choose others with --prefect-port and --mlflow-port"
            ) from error


def _wait_for(name: str, server: subprocess.Popen, port: int, seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if server.poll() is not None:
            raise PipelineError(
                f"the server of {name} did not start (exit code {server.returncode}); its messages are above"
            )
        with socket.socket() as probe:
            probe.settimeout(1)
            if probe.connect_ex((HOST, port)) == 0:
                return
        time.sleep(0.3)
    raise PipelineError(f"the server of {name} did not answer on port {port} within {seconds:.0f} s")


def _stop(server: subprocess.Popen) -> None:
    """End a server and its workers: each was started in a session of its own."""
    if server.poll() is None:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
