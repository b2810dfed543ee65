"""A stage's process that is killed while it publishes, two that make the same at once, and an artefact that is damaged later."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from running_stages import ALL_STEPS, content

from bmfm_pipeline.storage import Workspace, find_artefact, list_artefacts
from bmfm_pipeline.storage.life import take_inventory, verify
from bmfm_pipeline.storage.locks import exclusive
from bmfm_pipeline.storage.quarantine import quarantined

pytestmark = pytest.mark.slow


def key_of(undisturbed: dict) -> str:
    return Path(undisturbed["uri"]).name


def only_artefact(workspace: Workspace) -> Path:
    """The one folder of the workspace's artefacts; nothing else lies among them."""
    (folder,) = (Path(workspace.uri) / "artefacts" / "preprocess").iterdir()
    return folder


@pytest.mark.parametrize(("place", "published"), [("manifest is written", False), ("folder is in place", True)])
def test_a_stage_killed_while_it_publishes_leaves_a_whole_artefact_or_none(
    stages, undisturbed, tmp_path, place, published
):
    workspace = Workspace(tmp_path / "w")
    assert stages.run(workspace.uri, die=place).status == signal.SIGKILL
    assert (find_artefact(workspace, "preprocess", key_of(undisturbed)) is not None) is published
    assert len(list_artefacts(workspace, "preprocess")) == published
    again = stages.run(workspace.uri).made
    assert again["cached"] is published and (again["steps"] == ALL_STEPS) is not published
    assert content(again["uri"]) == content(undisturbed["uri"])
    assert only_artefact(workspace) == Path(again["uri"])
    assert not [finding for finding in verify(take_inventory(workspace)) if finding.is_problem]


@pytest.mark.parametrize("place", ["first file is uploaded", "all but the manifest is uploaded"])
def test_on_s3_a_stage_killed_while_it_publishes_leaves_nothing_that_a_reader_takes_for_an_artefact(
    stages, undisturbed, s3, tmp_path, monkeypatch, place
):
    monkeypatch.setenv("BMFM_STATE", str(tmp_path / "state"))
    here = {**s3.environment, "BMFM_STATE": str(tmp_path / "state"), "BMFM_CACHE_DIR": str(tmp_path / "cache")}
    workspace, key = Workspace(f"{s3.uri}/w"), key_of(undisturbed)
    assert stages.run(workspace.uri, die=place, **here).status == signal.SIGKILL
    there = s3.keys()
    assert [name for name in there if key in name and "/artefacts/" in name]
    assert find_artefact(workspace, "preprocess", key) is None and list_artefacts(workspace, "preprocess") == []
    again = stages.run(workspace.uri, **here).made
    assert not again["cached"]
    found = find_artefact(workspace, "preprocess", key)
    assert content(found.local()) == content(undisturbed["uri"])


def test_of_two_runs_of_one_artefact_at_once_one_builds_and_the_other_waits_and_takes_it(
    stages, undisturbed, tmp_path, wait_for
):
    workspace = Workspace(tmp_path / "w")
    with exclusive(workspace.run_dir(key_of(undisturbed))):  # both arrive before either begins
        both = [stages.start(workspace.uri), stages.start(workspace.uri)]
        for name in both:
            wait_for(lambda name=name: "waiting for another process that works in" in stages.log(name), 60, name)
    made = [stages.wait(name).made for name in both]
    assert made[0]["uri"] == made[1]["uri"] and made[0]["hash"] == made[1]["hash"]
    manifest = json.loads((Path(made[0]["uri"]) / "artefact.json").read_text())
    assert [(step["step"], step["attempts"]) for step in manifest["cost"]["steps"]] == [
        (step, 1) for step in ALL_STEPS[:-1]
    ]
    assert content(made[0]["uri"]) == content(undisturbed["uri"])
    assert only_artefact(workspace) == Path(made[0]["uri"])


def damage(folder: Path) -> None:
    """One bit, in a file whose size and name stay."""
    file = folder / "processed.h5ad"
    bytes_ = bytearray(file.read_bytes())
    bytes_[len(bytes_) // 2] ^= 1
    file.write_bytes(bytes_)


@pytest.mark.parametrize("die", [None, "damaged one is set aside"])
def test_a_damaged_artefact_is_found_set_aside_and_built_again_also_by_a_process_that_is_killed_at_it(
    stages, undisturbed, tmp_path, die
):
    workspace = Workspace(tmp_path / "w")
    first = stages.run(workspace.uri).made
    damage(Path(first["uri"]))
    assert find_artefact(workspace, "preprocess", key_of(undisturbed)) is None
    if die:
        assert stages.run(workspace.uri, die=die).status == signal.SIGKILL
        assert list_artefacts(workspace, "preprocess") == []
    second = stages.run(workspace.uri)
    assert second.made["steps"] == ALL_STEPS
    assert die or "incomplete or damaged and will be rebuilt" in second.made["reason"]
    assert content(second.made["uri"]) == content(undisturbed["uri"])
    assert stages.run(workspace.uri).made["cached"]
    ((aside, files),) = quarantined(workspace)
    assert "processed.h5ad" in {file.name for file in files}
    assert die or "its bytes were not those" in (Path(aside) / "quarantine.json").read_text()


HOURS = 3600.0


@pytest.mark.parametrize("hours", [-30, 30])
def test_an_artefact_of_a_machine_whose_clock_is_wrong_by_hours_is_used_and_a_change_to_it_is_noticed(
    stages, undisturbed, tmp_path, hours
):
    workspace = Workspace(tmp_path / "w")
    folder = Path(stages.run(workspace.uri).made["uri"])
    then = time.time() + hours * HOURS
    for path in [*folder.rglob("*"), folder, stages.cells]:
        os.utime(path, (then, then))
    assert stages.run(workspace.uri).made["cached"]
    before = (folder / "processed.h5ad").stat()
    damage(folder)
    os.utime(folder / "processed.h5ad", (then - 1, then - 1))  # written by that machine a moment earlier or later
    assert (folder / "processed.h5ad").stat().st_size == before.st_size
    again = stages.run(workspace.uri).made
    assert not again["cached"] and content(again["uri"]) == content(undisturbed["uri"])
