"""`bmfm ui`: both pages answer on loopback, and nothing is left when it ends."""

import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import psutil
import pytest

BMFM = str(Path(sys.executable).parent / "bmfm")


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.mark.slow
def test_both_pages_answer_and_end_together():
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
    assert done.returncode == 2 and f"port {port} is taken" in done.stderr and "--prefect-port" in done.stderr
