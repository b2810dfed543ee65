"""What a workspace holds, what is damaged, what may go: in a folder and on a real S3 server."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest

from bmfm_pipeline.errors import ConfigError, StorageError
from bmfm_pipeline.storage import Workspace, find_artefact, publish, release_copies, remote
from bmfm_pipeline.storage.cache import CacheEntry, cache_dir, entries, made_once
from bmfm_pipeline.storage.life import (
    REMOVED,
    carry_out,
    plan_removals,
    read_age,
    repair,
    scratch_of,
    take_inventory,
    verify,
)
from bmfm_pipeline.storage.life.verifying import DAY
from bmfm_pipeline.storage.quarantine import quarantined
from bmfm_pipeline.training.lease import acquire

MONTH = 30 * DAY


@pytest.fixture(params=["folder", "s3"])
def place(request, tmp_path, monkeypatch):
    """A workspace in a folder, and the same on s3."""
    if request.param == "folder":
        yield Workspace(tmp_path / "w")
    else:
        monkeypatch.setenv("BMFM_STATE", str(tmp_path / "state"))
        yield Workspace(f"{request.getfixturevalue('s3').uri}/w")
        release_copies()


@pytest.fixture
def folder(tmp_path):
    return Workspace(tmp_path / "w")


def make(place, stage, key, *inputs, age=0.0, name="cells", files=("data.bin",), content=b"numbers " * 100, **summary):
    """An artefact of `age` days, made from `inputs`, artefacts or {role: entry}."""
    staging = place.run_dir(key) / "artefact"
    for file in files:
        (staging / file).parent.mkdir(parents=True, exist_ok=True)
        (staging / file).write_bytes(content)
    made_from = {}
    for entry in inputs:
        made_from |= (
            entry
            if isinstance(entry, dict)
            else {role_of(entry): {"id": entry.key, "uri": entry.uri, "stage": entry.stage}}
        )
    artefact = publish(
        staging, place, stage, key, inputs=made_from, config={}, code_version="c", summary={"name": name, **summary}
    )
    shutil.rmtree(place.run_dir(key))
    if age:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(time.time() - age * DAY))
        change(
            place, artefact.file("artefact.json"), lambda text: text.replace(artefact.created.encode(), moment.encode())
        )
    return artefact


def role_of(artefact) -> str:
    return {"preprocess": "data", "pretrain": "checkpoint", "finetune": "model"}.get(artefact.stage, artefact.stage)


def change(place, uri, how) -> None:
    if place.remote:
        fs, path = remote.filesystem(uri)
        fs.pipe_file(path, how(fs.cat_file(path)))
        return
    path, stat = Path(uri), os.stat(uri)
    path.write_bytes(how(path.read_bytes()))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as a disk does that forgets a bit


def flip(data: bytes) -> bytes:
    return bytes([data[0] ^ 1]) + data[1:]


def chain(place, end="1", age=0.0, **named):
    """Preprocessed data, a pretrained model, a fine-tuned one and its evaluation."""
    data = make(place, "preprocess", f"data{end}", age=age, **named)
    base = make(place, "pretrain", f"base{end}", data, age=age, files=("config.json",), **named)
    model = make(place, "finetune", f"model{end}", data, base, age=age, files=("config.json",), **named)
    return data, base, model, make(place, "evaluate", f"test{end}", data, model, age=age, **named)


def ids(artefacts) -> set:
    return {(artefact.stage, artefact.key) for artefact in artefacts}


def may_go(place, **options) -> set:
    """(stage, key) of the artefacts that a plan removes."""
    plan = plan_removals(take_inventory(place), MONTH, **options)
    return {removal.id for removal in plan.removals if removal.kind == "artefact"}


def findings(place, **options) -> list:
    return [(found.kind, found.key, found.what) for found in verify(take_inventory(place), **options)]


def test_an_inventory_tells_sizes_and_what_was_made_from_what(place):
    data, base, model, test = chain(place)
    split = make(place, "split", "s", name="mine", files=("split.csv",))
    other = make(place, "preprocess", "data2", {"split": {"id": "hash", "uri": split.file("split.csv")}})
    away = make(
        place,
        "interpret",
        "i",
        model,
        {"data": {"id": "gone", "uri": place.artefact_uri("preprocess", "gone"), "stage": "preprocess"}},
    )
    found = take_inventory(place)
    assert ids([data, base, model, test, split, other, away]) == set(found.stored)
    assert found.references[test.stage, test.key] == ids([data, model])
    assert found.references[other.stage, other.key] == ids([split])  # by address: an input inside an artefact
    assert found.referenced_by[data.stage, data.key] == ids([base, model, test])
    assert found.missing_inputs(found.stored["interpret", "i"]) == [("data", ("preprocess", "gone"))]
    stored = found.stored["preprocess", "data1"]
    assert stored.size == 800 + stored.files["artefact.json"].size and stored.name == "cells"
    assert abs(stored.made - time.time()) < 60 and abs(stored.touched - time.time()) < 60
    with pytest.raises(StorageError, match="nothing lies there; name the workspace"):
        take_inventory(Workspace(place.uri + "-of-nobody"))


def test_every_byte_is_compared_and_a_damaged_artefact_is_set_aside_and_made_again(place):
    data, base, model, test = chain(place)
    assert find_artefact(place, "preprocess", "data1") is not None  # its hash is remembered from here on
    assert findings(place) == []
    change(place, data.file("data.bin"), flip)
    change(place, model.file("config.json"), lambda text: text[:-3])
    where = base.file("config.json")
    remote.remove(where) if place.remote else Path(where).unlink()
    change(place, test.file("artefact.json"), lambda text: b"{")
    quick = {key for kind, key, _ in findings(place, quick=True) if kind == "damaged"}
    assert quick == {"base1", "model1", "test1"} | ({"data1"} if place.remote else set())
    inventory = take_inventory(place)
    found = verify(inventory)
    said = {finding.key: finding.what for finding in found}
    assert {finding.kind for finding in found} == {"damaged"} and set(said) == {"data1", "base1", "model1", "test1"}
    assert "data.bin has sha256" in said["data1"] and "config.json is missing" in said["base1"]
    assert "config.json has 797 bytes, the manifest says 800" in said["model1"] and "manifest" in said["test1"]
    assert find_artefact(place, "preprocess", "data1") is None  # also where the date of the file did not change

    moved = repair(inventory, found)
    assert len(moved) == 4 and not take_inventory(place).stored
    assert {kind for kind, *_ in findings(place)} == {"set aside"}
    files = next(files for uri, files in quarantined(place) if "/data1-" in uri)
    assert {file.name for file in files} == {"artefact.json", "data.bin", "quarantine.json"}
    assert make(place, "preprocess", "data1").uri == data.uri and find_artefact(place, "preprocess", "data1")
    plan = plan_removals(take_inventory(place), MONTH, now=time.time() + 2 * MONTH)
    done = carry_out(take_inventory(place), plan)
    assert sum(removal.kind == "quarantine" for removal in done) == 4 and quarantined(place) == []


def test_publishing_over_a_damaged_artefact_sets_it_aside(place, caplog):
    data = make(place, "preprocess", "k")
    change(place, data.file("data.bin"), lambda text: text[:5])
    make(place, "preprocess", "k")
    assert find_artefact(place, "preprocess", "k") and "was damaged; set aside as" in caplog.text
    ((_, files),) = quarantined(place)
    assert {file.name: file.size for file in files}["data.bin"] == 5


def test_what_lies_there_without_a_manifest_is_told_and_removed_when_it_is_old(place):
    data = make(place, "preprocess", "k")
    for name in ("half/data.bin", "k/notes.txt"):
        target = f"{place.uri}/artefacts/preprocess/{name}"
        if not place.remote:
            Path(target).parent.mkdir(exist_ok=True)
            Path(target).write_text("x")
        else:
            fs, path = remote.filesystem(target)
            fs.pipe_file(path, b"x")
    assert {(kind, key) for kind, key, _ in findings(place)} == {("being published", "half"), ("strange file", "k")}
    inventory = take_inventory(place)
    assert plan_removals(inventory, MONTH).removals == []
    (removal,) = plan_removals(inventory, 3 * MONTH, now=time.time() + 2 * DAY).removals
    assert (removal.kind, removal.id) == ("leftover", ("preprocess", "half"))
    assert [
        entry.outcome for entry in carry_out(inventory, plan_removals(inventory, 3 * MONTH, now=time.time() + 2 * DAY))
    ] == [REMOVED]
    assert set(take_inventory(place).stored) == {(data.stage, data.key)}


def test_what_nothing_needs_goes_and_what_something_needs_stays(folder):
    place, old = folder, chain(folder, "1", age=90)
    test = old[-1]
    assert may_go(place) == set()  # `latest` stands for these models, and the evaluation is theirs
    assert may_go(place, keep_latest=False) == ids(old)
    newer = chain(place, "2", age=60)
    assert may_go(place) == ids(old)
    assert may_go(place, protected={("finetune", "model1"): "champion of bmfm-cells points to it"}) == set()
    assert may_go(place, keep_models="MLflow cannot be asked", keep_latest=False) == set()
    plan = plan_removals(
        take_inventory(place), MONTH, protected={("finetune", "model1"): "champion of bmfm-cells points to it"}
    )
    assert plan.kept["finetune", "model1"] == "champion of bmfm-cells points to it"
    assert plan.kept["preprocess", "data1"].endswith("was made from it")
    assert plan.kept["evaluate", "test1"] == "is the newest evaluation of a model that stays"
    study = make(place, "study", "s", {"10 %": {"id": test.key, "uri": test.uri, "stage": "evaluate"}})  # made just now
    assert may_go(place) == set()
    inventory = take_inventory(place)
    plan = plan_removals(inventory, MONTH, now=time.time() + 2 * MONTH)
    assert {removal.kind for removal in plan.removals} == {"artefact"}
    for removal in plan.removals:  # whatever interrupts it, nothing misses what it was made from
        left = take_inventory(place)
        assert not any(left.missing_inputs(item) for item in left.stored.values())
        assert [entry.outcome for entry in carry_out(inventory, type(plan)([removal], plan.kept))] == [REMOVED]
    assert set(take_inventory(place).stored) == ids(newer) and ids([study]) <= {removal.id for removal in plan.removals}


def test_named_splits_and_controls_of_a_standing_evaluation_stay(folder):
    place = folder
    data, _, model, test = chain(place, age=60)
    split = make(place, "split", "s", age=60, name="ours")
    passes = make(place, "embeddings", "e", data, model, age=60)
    ours = [
        make(place, "control", f"c{number}", *made_from, age=60)
        for number, made_from in enumerate([[data], [data, passes, model]])
    ]
    other = make(place, "control", "c9", make(place, "preprocess", "unused", age=60), age=60)
    assert may_go(place) == ids([other]) | {("preprocess", "unused")}
    assert may_go(place, keep_latest=False) == {
        *ids([data, model, test, passes, *ours, other]),
        ("preprocess", "unused"),
        ("pretrain", "base1"),
    }
    assert ("split", "s") not in may_go(place, keep_latest=False) and split


def test_nothing_that_a_run_uses_goes_not_even_when_the_run_begins_meanwhile(place):
    data = make(place, "preprocess", "data1", age=60)
    make(place, "evaluate", "test1", data, age=60)
    folder = place.run_dir("begun")
    job = {"stage": "finetune", "key": "begun", "name": "cells", "workspace": place.uri}
    job["inputs"] = {"data": {"id": data.key, "uri": data.uri, "stage": "preprocess"}}
    inventory = take_inventory(place)
    plan = plan_removals(inventory, MONTH)
    assert ("preprocess", "data1") in {removal.id for removal in plan.removals}
    (folder / "training").mkdir(parents=True)
    (folder / "job.json").write_text(json.dumps(job))
    lease = acquire(folder / "training")
    outcomes = {removal.id: removal.outcome for removal in carry_out(inventory, plan)}
    assert outcomes["preprocess", "data1"] == "stays: in use by run begun"
    assert outcomes["evaluate", "test1"] == REMOVED
    assert [run.state for run in scratch_of(take_inventory(place))] == ["running"] and (
        "preprocess",
        "data1",
    ) not in may_go(place)
    lease.release()
    now = time.time() + 2 * MONTH
    assert [run.state for run in scratch_of(take_inventory(place))] == ["unfinished"]
    make(place, "finetune", "begun2", data)
    shutil.copytree(folder, place.run_dir("begun2"))
    file = place.run_dir("begun2") / "job.json"
    file.write_text(json.dumps({**job, "key": "begun2"}))
    foreign = place.run_dir("foreign")
    shutil.copytree(folder, foreign)
    (foreign / "job.json").write_text(json.dumps({**job, "workspace": place.uri + "-other"}))
    plan = plan_removals(take_inventory(place), MONTH, now=time.time() + 2 * 3600)
    assert [removal.uri for removal in plan.removals if removal.kind == "run"] == [
        str(file.parent)
    ]  # finished: at once
    plan = plan_removals(take_inventory(place), MONTH, now=now)
    assert {removal.uri for removal in plan.removals if removal.kind == "run"} == {str(file.parent), str(folder)}
    carry_out(take_inventory(place), plan)
    assert not folder.exists() and not file.exists() and foreign.exists()


def test_a_lease_of_the_dead_is_told_and_one_of_another_machine_believed_while_it_is_fresh(folder):
    place = folder
    make(place, "preprocess", "k")
    run = place.run_dir("r")
    acquire(run)
    lease = json.loads((run / "lease.json").read_text())
    (run / "lease.json").write_text(json.dumps({**lease, "started": "1"}))
    assert [(kind, what.split(" was")[0]) for kind, _, what in findings(place)] == [
        ("stale lease", f"the lease of process {os.getpid()} on {lease['host']}")
    ]
    (run / "lease.json").write_text(json.dumps({**lease, "host": "elsewhere"}))
    assert [run.state for run in scratch_of(take_inventory(place))] == ["running"] and findings(place) == []


def test_an_interrupted_deletion_leaves_no_artefact_and_is_finished_by_the_next(place, monkeypatch):
    make(place, "preprocess", "k", files=("a.bin", "b.bin"), age=60)
    inventory = take_inventory(place)
    plan = plan_removals(inventory, MONTH)
    with monkeypatch.context() as patch:
        if place.remote:
            real = remote.remove
            patch.setattr(remote, "remove", lambda uri: real(uri) if uri.endswith("artefact.json") else 1 / 0)
            with pytest.raises(ZeroDivisionError):
                carry_out(inventory, plan)
        else:
            patch.setattr(shutil, "rmtree", lambda *words, **named: None)
            carry_out(inventory, plan)
    assert find_artefact(place, "preprocess", "k") is None
    later = plan_removals(take_inventory(place), MONTH, now=time.time() + 2 * DAY)
    assert [removal.kind for removal in later.removals] == ["leftover" if place.remote else "trash"]
    assert [removal.outcome for removal in carry_out(take_inventory(place), later)] == [REMOVED]
    if place.remote:
        with pytest.raises(StorageError, match="nothing lies there"):
            take_inventory(place)
    else:
        assert not (Path(place.uri) / ".trash").exists()


def test_the_parts_of_an_upload_that_broke_off_are_dropped_after_a_day(s3, tmp_path, monkeypatch):
    monkeypatch.setenv("BMFM_STATE", str(tmp_path / "state"))
    place = Workspace(f"{s3.uri}/w")
    s3.put("w/artefacts/preprocess/k/artefact.json", b"{}")
    for key in ("w/artefacts/preprocess/k/data.bin", "elsewhere/data.bin"):
        s3.client.create_multipart_upload(Bucket=s3.name, Key=key)
    inventory = take_inventory(place)
    plan = plan_removals(inventory, MONTH)  # this server says that every upload began years ago
    assert [removal.uri for removal in plan.removals if removal.kind == "upload"] == [
        f"{place.uri}/artefacts/preprocess/k/data.bin"
    ]
    carry_out(inventory, plan)
    assert [entry["Key"] for entry in s3.client.list_multipart_uploads(Bucket=s3.name)["Uploads"]] == [
        "elsewhere/data.bin"
    ]


def test_converted_models_count_in_the_cache_and_go_when_nobody_uses_them(folder, monkeypatch):
    place = folder
    make(place, "preprocess", "k")
    monkeypatch.setenv("BMFM_CACHE_SIZE", "1500")
    made = []

    def convert(key: str) -> Path:
        def write(target: Path) -> None:
            made.append(key)
            (target / "model.safetensors").write_bytes(bytes(1000))

        return made_once("converted", key, "v1", f"s3://user:word@models/{key}.ckpt", write)

    first = convert("a")
    assert convert("a") == first and made == ["a"]
    second = convert("b")
    assert first.exists() and second.exists()  # both are held by this process
    release_copies()
    third = convert("c")
    assert third.exists() and not first.exists() and not second.exists()
    (entry,) = entries(cache_dir())
    assert isinstance(entry, CacheEntry) and (entry.source, entry.size >= 1000) == ("s3://models/c.ckpt", True)
    later = time.time() + 2 * MONTH
    plan = plan_removals(take_inventory(place), MONTH, now=later)
    assert [removal.outcome for removal in carry_out(take_inventory(place), plan) if removal.kind == "cache"] == [
        "stays: a process uses it"
    ]
    release_copies()
    assert [removal.outcome for removal in carry_out(take_inventory(place), plan) if removal.kind == "cache"] == [
        REMOVED
    ]
    assert convert("c").exists() and made == ["a", "b", "c", "c"]


@pytest.mark.parametrize(("text", "seconds"), [("30d", MONTH), ("12h", DAY / 2), ("2w", 14 * DAY), ("0d", 0.0)])
def test_ages(text, seconds):
    assert read_age(text) == seconds


def test_what_is_no_age_is_refused():
    with pytest.raises(ConfigError, match="--older-than 30: is no age; write for example 30d"):
        read_age("30")
