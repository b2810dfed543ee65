"""A real MLflow server that is away when a run begins, in its middle and at its end: the work goes on, and everything arrives later."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from machines import free_port

from bmfm_pipeline.tracking import StageTracker, replay_spool, runs, tracking_uri
from bmfm_pipeline.tracking.spool import Spool

pytestmark = pytest.mark.slow


class Gate:
    """A port that leads to the server while it is open; when it shuts, connections break and new ones are refused."""

    def __init__(self, target: int):
        self.port, self._target = free_port(), target
        self._listener: socket.socket | None = None
        self._ends: list[socket.socket] = []

    def open(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def shut(self) -> None:
        if self._listener is not None:
            self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        self._ends = []

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.create_connection(("127.0.0.1", self._target))
                self._ends += [client, server]
                for source, target in ((client, server), (server, client)):
                    threading.Thread(target=self._pass, args=(source, target), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def mlflow_server(folder, port):
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", str(folder / "artifacts"),
    ]  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "server.log", "w") as log:
        server = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            start_new_session=True,
            cwd=folder,
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        )
        try:
            deadline = time.monotonic() + 180
            while time.monotonic() < deadline and server.poll() is None:
                with contextlib.suppress(OSError):
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGTERM)
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait(20)


@pytest.fixture
def away(tmp_path, monkeypatch):
    """The gate before a server that runs; shut at first."""
    runs._warned.clear()
    port = free_port()
    with mlflow_server(tmp_path / "server", port):
        gate = Gate(port)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{gate.port}")
        yield gate
        gate.shut()


def test_a_server_that_is_away_at_the_start_in_the_middle_and_at_the_end_gets_everything_once(away, tmp_path, caplog):
    from mlflow import MlflowClient

    state, report = tmp_path / "state", tmp_path / "report.html"
    report.write_text("<h1>fine</h1>")
    tracker = StageTracker(tracking_uri(state), "served", "training", state_dir=state)

    def record(step: int, loss: float) -> None:
        tracker._retry_at = 0.0  # a minute later
        tracker.log_metrics({"loss": loss}, step)
        tracker.flush()

    tracker.log_params({"seed": 1})
    record(0, 5.0)
    assert tracker.offline and Spool(state).pending()

    away.open()
    record(1, 4.0)
    assert not tracker.offline and tracker.url.startswith(tracking_uri(state)) and not Spool(state).pending()

    away.shut()
    record(2, 3.0)
    record(3, 2.0)
    tracker.log_artifact(report)
    report.unlink()  # its run folder is gone when the server is back
    assert Spool(state).pending()

    away.open()
    record(4, 1.0)
    assert not Spool(state).pending()

    away.shut()
    tracker.set_tags({"bmfm.key": "k1"})
    tracker.end()
    assert Spool(state).pending()
    assert replay_spool(state) == 0 and Spool(state).pending()

    away.open()
    assert replay_spool(state) == 2  # tags, end
    assert not Spool(state).pending() and not (Spool(state).folder / "refused").exists()
    client = MlflowClient(tracking_uri(state))
    (run,) = client.search_runs([client.get_experiment_by_name("served").experiment_id])
    points = client.get_metric_history(run.info.run_id, "loss")
    assert [(point.step, point.value) for point in points] == [(step, 5.0 - step) for step in range(5)]
    assert run.info.status == "FINISHED" and run.data.params == {"seed": "1"} and run.data.tags["bmfm.key"] == "k1"
    assert Path(client.download_artifacts(run.info.run_id, "report.html")).read_text() == "<h1>fine</h1>"
    warnings = [record.getMessage() for record in caplog.records if "cannot be reached" in record.getMessage()]
    assert len([text for text in warnings if "The work goes on" in text]) == 1
