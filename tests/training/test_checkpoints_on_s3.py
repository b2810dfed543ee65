"""Checkpoints of a remote workspace: copied there while training goes on, brought to whichever machine trains next."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from s3_server import Proxy
from training_cases import StopAtLook, assert_same_training, checkpoint, notes

from bmfm_pipeline.errors import TrainingError
from bmfm_pipeline.training.child import train

WAY = {"task__checkpoints_every_n_train_steps": 1, "task__val_check_interval": 3}


@pytest.fixture
def machine(cases, s3):
    """machine(name) -> the same training in a run folder of its own, with its copy in the bucket."""

    def make(name: str):
        shared = {"uri": f"{s3.uri}/w/runs/key", "job": {"stage": "pretrain", "key": "key"}}
        return replace(cases.spec(name, **WAY), shared=shared)

    return make


def state(s3) -> dict:
    return json.loads(s3.get("w/runs/key/state.json"))


class AtLook(StopAtLook):
    """Does something when training looks for the n-th time whether it should stop."""

    def __init__(self, actions: dict):
        super().__init__()
        self.actions = actions

    @property
    def reason(self):
        if action := self.actions.pop(self.looks, None):
            action()
        return super().reason


def test_stopped_here_resumed_there_and_back(cases, machine, s3):
    here, there, reference = machine("here"), machine("there"), cases.spec("reference", **WAY)
    assert cases.train(here, StopAtLook(5))[0] is None
    first = state(s3)
    assert first["step"] == checkpoint(here)["bmfm"]["step"] > 0
    stored = {entry["sha256"] for entry in first["files"].values()}
    assert {key for key in set(s3.keys()) if "/files/" in key} == {f"w/runs/key/files/{sha256}" for sha256 in stored}

    assert cases.train(there, StopAtLook(4))[0] is None
    assert state(s3)["step"] > first["step"]
    summary, events = cases.train(here)  # its own checkpoint is the older one
    assert any("taken from s3://" in text for text in notes(events))
    assert_same_training(here, cases.train(reference) and reference)
    assert summary["checkpoints_uploaded"] >= 1 and "checkpoint_uploads_failed" not in summary
    assert json.loads(s3.get("w/runs/key/lease.json"))["released"] and json.loads(s3.get("w/runs/key/job.json"))
    assert not list(Path(here.run_dir).glob("uploading")) and not list(Path(here.run_dir).glob("arriving"))


def test_what_lies_here_wins_when_it_is_further(cases, machine, s3):
    spec = machine("here")
    cases.train(spec, StopAtLook(4))
    kept = {key: s3.get(key) for key in set(s3.keys())}
    cases.train(spec, StopAtLook(4))
    further = checkpoint(spec)["bmfm"]["step"]
    for key, body in kept.items():  # as after a kill before the upload
        s3.put(key, body)
    _, events = cases.train(spec, StopAtLook(3))
    assert not any("taken from" in text for text in notes(events)) and state(s3)["step"] > further


def test_a_damaged_copy_is_named_and_an_older_whole_one_used(cases, machine, s3):
    here = machine("here")
    cases.train(here, StopAtLook(9))
    files = state(s3)["files"]
    best = next(name for name in files if "val_loss" in name and name.endswith(".ckpt"))
    assert files["checkpoints/last.ckpt"]["sha256"] != files[best]["sha256"]
    s3.put(f"w/runs/key/files/{files['checkpoints/last.ckpt']['sha256']}", b"not what was written")
    shutil.rmtree(here.run_dir)
    _, events = cases.train(machine("there"), StopAtLook(1))
    said = notes(events)
    assert any("checkpoints/last.ckpt is incomplete or damaged, not used" in text for text in said)
    assert any(text.startswith(f"resuming from {Path(best).name} ") for text in said)


def test_uploads_that_fail_are_counted_and_training_goes_on(cases, machine, s3, monkeypatch):
    monkeypatch.setenv("BMFM_RETRIES", "0")
    spec, reference = machine("here"), cases.spec("reference", **WAY)
    with Proxy(s3.server) as proxy:
        s3.through(proxy)
        broken = AtLook({3: lambda: setattr(proxy, "limit", -1), 9: lambda: setattr(proxy, "limit", float("inf"))})
        summary, events = cases.train(spec, broken)
    s3.directly()
    assert summary["checkpoint_uploads_failed"] >= 1
    assert any("could not be copied to s3://" in text and "training goes on" in text for text in notes(events))
    cases.train(reference)
    assert_same_training(spec, reference)
    assert state(s3)["step"] == checkpoint(spec)["bmfm"]["step"]


def test_who_was_taken_over_stops_and_changes_nothing_more(cases, machine, s3):
    spec, taken = machine("here"), {}

    def take_over() -> None:
        taken["state"] = s3.put("w/runs/key/state.json", b'{"number": 7}')

    with pytest.raises(TrainingError, match=r"taken over|is gone"):
        stop = AtLook({4: take_over})
        train(spec, stop)
    assert state(s3) == {"number": 7}
