"""The copy of a run on S3: one writer at a time by conditional writes, and always a whole set of files."""

import json
import socket
import time
from pathlib import Path

import pytest

from bmfm_pipeline.errors import TrainingError
from bmfm_pipeline.storage import SharedRun, Workspace, conditional, life, publish, release_copies, shared_run
from bmfm_pipeline.storage.life import verifying
from bmfm_pipeline.storage.life.verifying import DAY

time_of = time.time


@pytest.fixture
def run(s3):
    """run() -> the run, as one more process sees it."""
    return lambda: SharedRun(f"{s3.uri}/w/runs/key")


def held_by(s3, **changes) -> None:
    lease = json.loads(s3.get("w/runs/key/lease.json"))
    s3.put("w/runs/key/lease.json", json.dumps({**lease, **changes}).encode())


def test_an_object_is_written_only_over_the_version_that_was_read(s3):
    uri = f"{s3.uri}/small.json"
    first = conditional.write_over(uri, {"by": 1}, None)
    with pytest.raises(FileExistsError):
        conditional.write_over(uri, {"by": 2}, None)
    second = conditional.write_over(uri, {"by": 3}, first)
    with pytest.raises(FileExistsError):
        conditional.write_over(uri, {"by": 4}, first)
    assert conditional.write_over(uri, {"by": 3}, first) == second  # ours, whose answer was lost
    found = conditional.read_versioned(uri)
    assert (found.value, found.etag) == ({"by": 3}, second) and 0 <= found.age < 60
    assert conditional.read_versioned(f"{s3.uri}/nothing.json") is None


def test_a_second_one_is_refused_while_the_first_lives(run, tmp_path):
    first = run()
    first.acquire({"stage": "pretrain"})
    with pytest.raises(TrainingError, match=f"on {socket.gethostname()} is training here; wait for it"):
        run().acquire({})
    first.release()
    second = run()
    second.acquire({})
    assert second.number == first.number + 1


def test_a_holder_on_another_machine_is_waited_for_until_it_was_silent_for_long(run, s3, monkeypatch):
    run().acquire({})
    held_by(s3, host="elsewhere")
    assert run().acquire({}, print, stopped=lambda: True) is False
    monkeypatch.setattr(shared_run, "_LOOK_EVERY", 0.01)
    monkeypatch.setattr(shared_run.time, "sleep", lambda seconds: held_by(s3, host="elsewhere", renewals=5))
    with pytest.raises(TrainingError, match="on elsewhere is training here"):
        run().acquire({}, lambda text: None)
    monkeypatch.undo()
    said = []
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(shared_run, "EXPIRES_AFTER", 1.0)
    run().acquire({}, said.append)
    assert not said or "waiting up to" in said[0]


def test_who_lost_the_run_can_write_nothing(run, s3, tmp_path):
    (tmp_path / "a").write_text("by the first")
    (tmp_path / "b").write_text("by the second")
    first, second = run(), run()
    first.acquire({})
    first.put({"a": tmp_path / "a"}, {}, step=1)
    held_by(s3, started="long ago")  # the first looks dead
    second.acquire({})
    with pytest.raises(TrainingError, match="taken over"):
        first.put({"a": tmp_path / "b"}, {}, step=2)
    with pytest.raises(TrainingError, match="taken over"):
        first.renew()
    first.release()
    second.renew()
    assert second.step == 1
    (tmp_path / "fetched").mkdir()
    (tmp_path / "fetched" / "of an earlier attempt").touch()
    second.put({"a": tmp_path / "b"}, {}, step=2)
    second.fetch(tmp_path / "fetched")
    assert [(file.name, file.read_text()) for file in (tmp_path / "fetched").iterdir()] == [("a", "by the second")]
    assert len([key for key in set(s3.keys()) if "/files/" in key]) == 1  # neither the replaced nor the unnamed bytes
    second.remove()
    assert s3.keys() == []


def test_a_store_without_conditional_writes(run, s3, monkeypatch):
    monkeypatch.setattr(conditional, "_CHANGED", ())
    monkeypatch.setattr(conditional, "_UNKNOWN", ("PreconditionFailed",))
    uri = f"{s3.uri}/small.json"
    etag = conditional.write_over(uri, {"by": 1}, None)
    assert conditional._write_after_looking(uri, {"by": 2}, etag) != etag
    with pytest.raises(FileExistsError):
        conditional._write_after_looking(uri, {"by": 3}, etag)


def test_a_workspace_on_s3_knows_the_copies_of_its_runs(s3, tmp_path, monkeypatch):
    """What another machine trains protects what it reads; what is published or forgotten goes."""
    monkeypatch.setenv("BMFM_STATE", str(tmp_path / "state"))
    place = Workspace(f"{s3.uri}/w")

    def publish_one(stage: str, key: str):
        staging = place.run_dir(key) / "artefact"
        staging.mkdir(parents=True)
        (staging / "data.bin").write_bytes(b"numbers")
        return publish(staging, place, stage, key, inputs={}, config={}, code_version="c", summary={"name": "cells"})

    data, _ = publish_one("preprocess", "data"), publish_one("pretrain", "published")
    runs = {}
    for key in ("published", "forgotten", "elsewhere"):
        runs[key] = SharedRun(place.shared_run_uri(key))
        inputs = {"data": {"id": "data", "stage": "preprocess", "uri": data.uri}}
        runs[key].acquire({"stage": "pretrain", "name": "cells", "key": key, "inputs": inputs})
        runs[key].put({"last.ckpt": Path(__file__)}, {}, step=3)
        if key != "elsewhere":
            runs[key].release()
    lease = json.loads(s3.get("w/runs/elsewhere/lease.json"))
    s3.put("w/runs/elsewhere/lease.json", json.dumps({**lease, "host": "elsewhere"}).encode())

    def listed() -> dict:
        return {run.uri.rsplit("/", 1)[-1]: run for run in life.shared_runs(life.take_inventory(place))}

    assert {key: run.state for key, run in listed().items()} == {
        "published": "finished",
        "forgotten": "unfinished",
        "elsewhere": "running",
    }
    inventory = life.take_inventory(place)
    plan = life.plan_removals(inventory, older_than=30 * DAY, now=time.time() + 60 * DAY)
    assert plan.kept["preprocess", "data"].endswith("on elsewhere")
    assert {entry.title for entry in listed().values()} >= {"pretrain cells forgotten"}
    found = life.verify(inventory)
    assert not found
    monkeypatch.setattr(verifying.time, "time", lambda: time_of() + 60 * DAY)
    assert {(entry.kind, entry.uri.rsplit("/", 1)[-1]) for entry in life.verify(inventory)} >= {
        ("finished run", "published"),
        ("unfinished run", "forgotten"),
    }
    monkeypatch.setattr(verifying.time, "time", time_of)
    done = life.carry_out(inventory, plan)
    shared = {entry.uri.rsplit("/", 1)[-1]: entry.outcome for entry in done if entry.kind == "shared run"}
    assert shared == {"published": life.REMOVED, "forgotten": life.REMOVED}
    assert set(listed()) == {"elsewhere"}
    release_copies()
