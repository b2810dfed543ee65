"""Empty databases of other programs: kept once, taken for every new workspace, and never in the way."""

import contextlib
import sqlite3

import pytest

from bmfm_pipeline.storage import begin_database, keep_database


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    return tmp_path / "caches" / "bmfm" / "empty-databases"


@pytest.fixture
def made(tmp_path):
    """A database as a program makes it, still open in it, its last rows not yet in the main file."""
    with contextlib.closing(sqlite3.connect(tmp_path / "made.db")) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("CREATE TABLE version (name TEXT)")
        connection.execute("CREATE TABLE own (name TEXT)")
        connection.execute("INSERT INTO version VALUES ('7')")
        connection.execute("INSERT INTO own VALUES ('of this one')")
        connection.commit()
        yield tmp_path / "made.db"


def rows(path, table):
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return connection.execute(f"SELECT * FROM {table}").fetchall()


def test_the_next_one_begins_with_it(tmp_path, made, cache):
    new = tmp_path / "elsewhere" / "new.db"
    assert not begin_database("mlflow", new) and not new.exists()
    keep_database("mlflow", made, clear=["own"])
    assert begin_database("mlflow", new)
    assert rows(new, "version") == [("7",)] and rows(new, "own") == [] and rows(made, "own") == [("of this one",)]
    assert [path.name for path in new.parent.iterdir()] == ["new.db"] and len(list(cache.iterdir())) == 1
    assert not begin_database("prefect", tmp_path / "other.db")  # each program has its own


def test_what_is_there_already_stays(tmp_path, made):
    keep_database("mlflow", made)
    there = tmp_path / "there.db"
    there.write_bytes(b"something of the user")
    assert not begin_database("mlflow", there) and there.read_bytes() == b"something of the user"


def test_another_version_of_the_program_makes_its_own(tmp_path, made, monkeypatch):
    keep_database("mlflow", made)
    monkeypatch.setattr("importlib.metadata.version", lambda program: "0.0.1")
    assert not begin_database("mlflow", tmp_path / "new.db")


def test_a_damaged_one_is_not_taken(tmp_path, made, cache):
    keep_database("mlflow", made)
    (kept,) = cache.iterdir()
    for content in (b"no database at all" * 100, kept.read_bytes()[:5000], b""):
        kept.write_bytes(content)
        new = tmp_path / "new.db"
        taken = begin_database("mlflow", new)
        assert not taken and not new.exists(), content[:10]


def test_a_cache_that_cannot_be_written_costs_nothing(tmp_path, made, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    keep_database("mlflow", made)
    assert not begin_database("mlflow", tmp_path / "new.db")


def test_stores_of_mlflow_that_begin_with_it_keep_artifacts_to_themselves(tmp_path, monkeypatch, cache):
    from mlflow import MlflowClient

    from bmfm_pipeline.tracking.store import Store

    made = {}
    for name in ("first", "second"):
        monkeypatch.chdir(tmp_path)
        store = Store(f"sqlite:///{tmp_path}/{name}/mlflow.db")
        store.experiment_id("cells")
        client = MlflowClient(tracking_uri=store.uri)
        made[name] = {found.name: found.artifact_location for found in client.search_experiments()}
    assert made["second"]["cells"] == f"{tmp_path}/second/mlartifacts" or "second" in made["second"]["cells"]
    assert made["second"].keys() == made["first"].keys() and "first" not in "".join(made["second"].values())
    assert [path.name.split("-")[0] for path in cache.iterdir()] == ["mlflow"]
