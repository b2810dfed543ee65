"""`bmfm doctor` on a machine where things are broken for real: each is found, named, and said how to mend."""

import contextlib
import datetime
import json
import resource
import sqlite3
import threading
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from bmfm_pipeline import cli
from bmfm_pipeline.commands.checkup import FAIL, OK, WARN, libraries, machine, places, servers
from bmfm_pipeline.storage import Workspace


@pytest.fixture(autouse=True)
def own_place(tmp_path, monkeypatch):
    for variable in (
        "PREFECT_API_URL",
        "PREFECT_PROFILE",
        "PREFECT_PROFILES_PATH",
        "MLFLOW_TRACKING_URI",
        "BMFM_STATE",
    ):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    monkeypatch.setenv("BMFM_WORKSPACE", str(tmp_path / "workspace"))
    monkeypatch.setenv("BMFM_RETRIES", "0")


def only(findings, name: str):
    (found,) = [one for one in findings if one.name == name]
    return found


def test_a_machine_in_order_gives_exit_code_0_and_every_check_in_json(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    names = {one["name"] for one in found["checks"]}
    assert {"Python", "torch", "prefect", "import torch", "cores", "memory", "open files", "accelerator"} <= names
    assert {"workspace", "state", "locks", "MLflow", "Prefect", "telemetry"} <= names
    assert {one["status"] for one in found["checks"]} <= {OK, WARN}
    assert all(one["mend"] for one in found["checks"] if one["status"] != OK)


def test_what_is_broken_is_said_with_how_to_mend_it_and_gives_exit_code_1(tmp_path, monkeypatch, capsys):
    (tmp_path / "workspace").write_text("a file where the folder should be")
    state = tmp_path / "workspace.state"
    state.mkdir()
    (state / "mlflow.db").write_bytes(b"SQLite format 3\0" + b"\7" * 5000)
    assert cli.main(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    at = next(index for index, line in enumerate(lines) if line.startswith("FAIL  workspace "))
    assert "workspace is a file" in lines[at] and "--workspace" in lines[at + 1]
    at = next(index for index, line in enumerate(lines) if line.startswith("FAIL  MLflow "))
    assert f"move {state / 'mlflow.db'} away" in lines[at + 1]
    assert lines[-1].startswith("2 to mend before a run")


def test_places_that_take_no_file(tmp_path):
    found = list(places.check(Workspace("/proc/bmfm")))
    for name in ("workspace", "state"):
        assert only(found, name).status == FAIL and "not writable" in only(found, name).found


def test_little_room_and_locks_that_keep_nobody_out(tmp_path, monkeypatch):
    monkeypatch.setattr(places, "LITTLE_ROOM", 2**60)
    monkeypatch.setattr(places.fcntl, "flock", lambda handle, how: None)
    found = list(places.check(Workspace(tmp_path / "w")))
    room = only(found, "disk of the workspace")
    assert room.status == WARN and "bmfm workspace gc" in room.mend
    assert only(found, "locks").status == FAIL and "keeps nobody out" in only(found, "locks").found


def test_the_file_system_of_a_folder_is_named():
    assert places.filesystem_of(Path("/proc/self")) == "proc"


def test_an_account_that_reaches_its_bucket_and_one_that_does_not(s3, tmp_path, monkeypatch):
    monkeypatch.setenv("BMFM_STATE", str(tmp_path / "state"))
    found = only(places.check(Workspace(f"{s3.uri}/work")), "workspace")
    assert found.status == OK and "written, read back and deleted" in found.found
    assert s3.keys() == []
    found = only(places.check(Workspace("s3://nobody-has-this-bucket/work")), "workspace")
    assert found.status == FAIL and "no bucket" in found.found and "docs/s3.md" in found.mend
    with s3.server.checking_credentials():
        found = only(places.check(Workspace(f"{s3.uri}/work")), "workspace")
    assert found.status == FAIL and "very-secret" not in found.found


def test_limits_of_the_process():
    files, size = resource.getrlimit(resource.RLIMIT_NOFILE), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (250, files[1]))
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**40, size[1]))
        found = list(machine.check())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, files)
        resource.setrlimit(resource.RLIMIT_FSIZE, size)
    assert only(found, "open files").status == FAIL and "ulimit -n" in only(found, "open files").mend
    assert only(found, "size of files").status == WARN and "1e+03 GiB" in only(found, "size of files").found


def test_a_container_with_fewer_processors_and_little_memory(tmp_path, monkeypatch):
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    (tmp_path / "memory.max").write_text(f"{3 * 2**30}\n")
    (tmp_path / "memory.current").write_text(f"{2**30}\n")
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    found = list(machine.check())
    assert only(found, "cores").status == WARN and only(found, "cores").mend == "export OMP_NUM_THREADS=1"
    assert (
        only(found, "memory").status == WARN
        and "2.0 GiB free of 3.0 (limit of the container)" in only(found, "memory").found
    )


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo 'NVIDIA H100, 81559 MiB, 550.54'", "NVIDIA H100, 81559 MiB, driver 550.54, which the installed torch cannot use"),
        ("echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18", "Driver/library version mismatch"),
    ],
    ids=["torch for CPUs", "driver"],
)  # fmt: skip
def test_a_gpu_that_cannot_be_used(tmp_path, monkeypatch, script, said):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(machine, "find_accelerator", lambda: None)
    found = only(machine.check(), "accelerator")
    assert found.status == FAIL and said in found.found and found.mend


def test_libraries_that_do_not_go_together(tmp_path, monkeypatch):
    """Metadata as pip leaves it, found first."""
    for name, number in (("fastapi", "0.160.0"), ("torch", "2.12.0"), ("lightning", "2.5.0")):
        folder = tmp_path / f"{name}-{number}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = list(libraries.check())
    assert only(found, "torch").status == FAIL and "2.12.0, where ==2.13.0 was tested" in only(found, "torch").found
    broken = only(found, "fastapi 0.160.0")
    assert broken.status == FAIL and "does not start" in broken.found and "fastapi==" in broken.mend
    assert only(found, "lightning 2.5.0").mend == "pip uninstall lightning"


@contextlib.contextmanager
def answering(ahead: float):
    """A web server that answers everything and whose clock is `ahead` seconds ahead."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response_only(200)
            now = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=ahead)
            self.send_header("Date", format_datetime(now, usegmt=True))
            self.end_headers()
            self.wfile.write(b"1.2.3")

        def log_message(self, *arguments):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def test_a_server_whose_clock_and_version_are_others():
    with answering(ahead=3600) as address:
        clock, number = servers._mlflow_server(address, address)
    assert (
        clock.status == FAIL
        and "s ahead of this machine's" in clock.found
        and 3590 < int(clock.found.split()[5]) < 3610
    )
    assert number.status == WARN and number.found.startswith("1.2.3, where ")
    with answering(ahead=0) as address:
        assert [one.name for one in servers._mlflow_server(address, address) if "clock" in one.found] == []


def test_servers_that_do_not_answer_and_settings_that_hide_them(monkeypatch, unused_address):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", unused_address)
    monkeypatch.setenv("PREFECT_SERVER_ANALYTICS_ENABLED", "true")
    found = list(servers.check(Workspace()))
    assert only(found, "MLflow").status == FAIL and unused_address in only(found, "MLflow").found
    monkeypatch.setenv("http_proxy", "http://proxy.example:3128")
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.delenv("NO_PROXY", raising=False)
    found += servers._proxies(unused_address)
    assert only(found, "proxy").status == WARN and only(found, "proxy").mend == "export no_proxy=127.0.0.1"
    assert only(found, "telemetry").mend == "unset PREFECT_SERVER_ANALYTICS_ENABLED"


def test_a_prefect_server_that_does_not_answer(unused_address):
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from flows import checkup

    with temporary_settings({PREFECT_API_URL: f"{unused_address}/api"}):
        ((name, status, found, mend),) = checkup.check()
    assert (name, status) == ("Prefect", "fail") and unused_address in found and "bmfm ui" in mend


def test_a_database_of_mlflow_is_counted_and_not_changed(tmp_path):
    state = tmp_path / "workspace.state"
    state.mkdir()
    with contextlib.closing(sqlite3.connect(state / "mlflow.db")) as database:
        database.execute("create table runs (run_uuid text)")
        database.executemany("insert into runs values (?)", [("a",), ("b",)])
        database.commit()
    before = (state / "mlflow.db").read_bytes()
    found = only(servers.check(Workspace()), "MLflow")
    assert found.status == OK and found.found.endswith("mlflow.db: 2 runs")
    assert (state / "mlflow.db").read_bytes() == before


@pytest.fixture
def unused_address() -> str:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"
