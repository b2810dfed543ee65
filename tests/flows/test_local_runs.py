"""What is prepared before Prefect is imported: its home beside the workspace, unless a person has chosen another."""

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys

import pytest

from bmfm_pipeline.errors import PipelineError
from flows import local
from flows.local_server import LocalServer


@pytest.fixture
def environment(monkeypatch, tmp_path) -> dict[str, str]:
    """The environment of a person who has never used Prefect."""
    (tmp_path / "person").mkdir()
    found = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
    found |= {"HOME": str(tmp_path / "person"), "DO_NOT_TRACK": "0"}
    monkeypatch.setattr(os, "environ", found)
    monkeypatch.delitem(sys.modules, "prefect", raising=False)
    return found


def test_prefect_lives_beside_the_workspace(environment, tmp_path):
    local.prepare(tmp_path / "workspace.state")
    assert environment["PREFECT_HOME"] == str(tmp_path / "workspace.state" / "prefect")
    assert (tmp_path / "workspace.state" / "prefect").is_dir()
    assert environment["PREFECT_SERVER_EPHEMERAL_ENABLED"] == "true"
    assert environment["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"


def test_what_is_set_already_stays(environment, tmp_path):
    environment["PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"] = "DEBUG"
    applied = local.prepare(tmp_path)
    assert environment["PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"] == "DEBUG"
    assert environment["DO_NOT_TRACK"] == "0"
    assert not {"PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "DO_NOT_TRACK"} & set(applied)


@pytest.mark.parametrize(
    ("name", "value"),
    [("PREFECT_API_URL", "http://server/api"), ("PREFECT_HOME", "/chosen"), ("PREFECT_PROFILE", "work")],
)
def test_a_server_home_or_profile_that_a_person_chose_is_used(environment, tmp_path, name, value):
    environment[name] = value
    applied = local.prepare(tmp_path)
    assert environment[name] == value
    assert not {"PREFECT_HOME", "PREFECT_API_URL", "PREFECT_SERVER_EPHEMERAL_ENABLED"} & set(applied)
    assert not (tmp_path / "prefect").exists()


@pytest.mark.parametrize("name", ["PREFECT_API_URL", "PREFECT_PROFILE", "PREFECT_PROFILES_PATH"])
def test_no_server_is_started_beside_one_that_a_person_has(environment, name):
    environment[name] = "theirs"
    assert local._serve() is None


def test_a_server_of_our_own_is_the_one_that_prefect_asks(environment, tmp_path, monkeypatch):
    class Stub:
        def __init__(self, home):
            self.home, self.address = home, "http://127.0.0.1:4321"

        def stop(self):
            """Nothing was started."""

    monkeypatch.setattr(local, "LocalServer", Stub)
    environment.pop("no_proxy", None)
    environment["NO_PROXY"] = "example.org"
    local.prepare(tmp_path)
    assert local._serve().home == tmp_path / "prefect"
    assert environment["PREFECT_API_URL"] == "http://127.0.0.1:4321/api"
    assert environment["PREFECT_UI_URL"] == "http://127.0.0.1:4200"  # where `bmfm ui` shows it later
    assert environment["no_proxy"] == environment["NO_PROXY"] == "example.org,127.0.0.1"


def test_a_server_ends_when_the_process_that_started_it_is_gone(environment):
    command = [sys.executable, "-P", "-m", "flows.local_server", "0"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, start_new_session=True) as server:
        assert server.poll() is None
        server.stdin.close()
        assert server.wait(30) == -signal.SIGTERM


@pytest.mark.slow
def test_a_server_that_cannot_start_says_why(environment, tmp_path, monkeypatch):
    (tmp_path / "prefect.db").mkdir()  # where the database would lie
    environment |= {"PREFECT_HOME": str(tmp_path), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    server = LocalServer(tmp_path)
    with pytest.raises(PipelineError, match="unable to open database file"):
        server.wait()


@pytest.mark.slow
def test_a_server_of_a_run_registers_no_blocks_and_leaves_them_to_that_of_the_pages(environment, tmp_path):
    environment |= {"PREFECT_HOME": str(tmp_path), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    server = LocalServer(tmp_path)
    try:
        server.wait()
        with contextlib.closing(sqlite3.connect(tmp_path / "prefect.db")) as connection:
            assert connection.execute("SELECT count(*) FROM block_type").fetchone() == (0,)
    finally:
        server.stop()
    assert not (tmp_path / "memo_store.toml").exists()  # Prefect's note that they need not be registered again


def test_profiles_that_a_person_made_are_used(environment, tmp_path):
    profiles = tmp_path / "person" / ".prefect" / "profiles.toml"
    profiles.parent.mkdir()
    profiles.write_text('active = "work"\n')
    assert "PREFECT_HOME" not in local.prepare(tmp_path)


def test_preparing_too_late_is_an_error(environment, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "prefect", object())
    with pytest.raises(RuntimeError, match="before prefect is imported"):
        local.prepare(tmp_path)


def test_the_page_of_a_server_on_another_port_asks_that_server(environment, tmp_path):
    chosen = local.server_environment(tmp_path, "127.0.0.1", 4321)
    assert chosen["PREFECT_SERVER_UI_API_URL"] == chosen["PREFECT_API_URL"] == "http://127.0.0.1:4321/api"
    assert chosen["PREFECT_HOME"] == str(tmp_path / "prefect")


def test_events_reach_the_listener_of_the_innermost_run():
    outer, inner = [], []
    with local.listening(outer.append):
        local.tell({"kind": "step"})
        with local.listening(inner.append):
            local.tell({"kind": "note"})
        local.tell({"kind": "stage"})
    local.tell({"kind": "lost"})
    assert [event["kind"] for event in outer] == ["step", "stage"]
    assert [event["kind"] for event in inner] == ["note"]
