"""`bmfm ui`: both pages answer on loopback, and nothing is left when it ends."""

import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import psutil
import pytest

from bmfm_pipeline import cli

BMFM = str(Path(sys.executable).parent / "bmfm")


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def others_at(prefect: int, mlflow: int, *words: str) -> subprocess.CompletedProcess:
    command = [BMFM, "ui", "--prefect-port", str(prefect), "--mlflow-port", str(mlflow), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.slow
def test_both_pages_answer_are_used_again_and_end_together(tmp_path):
    prefect, mlflow = free_ports(2)
    process = subprocess.Popen(
        [BMFM, "ui", "--prefect-port", str(prefect), "--mlflow-port", str(mlflow)], stdout=subprocess.PIPE, text=True
    )
    try:
        shown = [process.stdout.readline() for _ in range(3)]
        assert shown == [
            f"Prefect  http://127.0.0.1:{prefect}\n",
            f"MLflow   http://127.0.0.1:{mlflow}\n",
            "Ctrl-C stops both\n",
        ]
        for address in (f"http://127.0.0.1:{prefect}/api/health", f"http://127.0.0.1:{mlflow}/health"):
            with urllib.request.urlopen(address, timeout=20) as answer:
                assert answer.status == 200
        again = others_at(prefect, mlflow)
        assert (again.returncode, again.stderr) == (0, "")
        assert again.stdout.splitlines() == [
            f"Prefect  http://127.0.0.1:{prefect} (running already)",
            f"MLflow   http://127.0.0.1:{mlflow} (running already)",
            "both run already, and were not started here",
        ]
        elsewhere = others_at(prefect, mlflow, "--workspace", str(tmp_path / "other"))
        assert elsewhere.returncode == 2 and f"port {prefect} is taken by a Prefect server over" in elsewhere.stderr
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    finally:
        for one in [*psutil.Process(process.pid).children(recursive=True), process] if process.poll() is None else []:
            one.kill()
    _, alive = psutil.wait_procs(children, timeout=15)
    assert not alive


def test_a_taken_port_is_named():
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        done = subprocess.run(
            [BMFM, "ui", "--prefect-port", str(port)], capture_output=True, text=True, timeout=60, check=False
        )
    assert done.returncode == 2 and f"port {port} is taken by process {os.getpid()} (" in done.stderr
    assert "choose another port for Prefect with --prefect-port" in done.stderr


@pytest.mark.parametrize("variable", ["PREFECT_API_URL", "MLFLOW_TRACKING_URI"])
def test_a_server_of_the_users_that_does_not_answer_is_not_replaced(variable, monkeypatch, capsys):
    monkeypatch.setenv(variable, "http://nowhere.invalid:1/api")
    prefect, mlflow = free_ports(2)
    assert cli.main(["ui", "--prefect-port", str(prefect), "--mlflow-port", str(mlflow)]) == 2
    said = capsys.readouterr().err
    assert f"which {variable} names; start it there, or unset the variable" in said
