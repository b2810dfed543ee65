"""A disk that is full, by a limit on the size of files: said in words, nothing is published, and with room the next run finishes.

tests/faults/test_training.py does the same to a training.
"""

import resource
import subprocess
import sys
from pathlib import Path

import pytest
from running_stages import ALL_STEPS, content

from bmfm_pipeline.storage import Workspace, find_artefact, list_artefacts

pytestmark = pytest.mark.slow
_FULL_DISK = """
import resource, sys
from pathlib import Path
from bmfm_pipeline.errors import StorageError
from bmfm_pipeline.storage import Workspace, publish, write_json_atomic
workspace = Workspace(sys.argv[1])
staging = workspace.run_dir("k") / "artefact"
staging.mkdir(parents=True)
(staging / "a.txt").write_text("x")
resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
try:
    publish(staging, workspace, "preprocess", "k", inputs={}, config={"long": "y" * 1000}, code_version="c")
except StorageError as error:
    print("StorageError:", error)
"""


def test_a_full_disk_is_named_and_publishes_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", _FULL_DISK, str(tmp_path / "w")], capture_output=True, text=True, check=True
    )
    assert "disk is full or a file size limit was reached" in done.stdout, done.stderr
    assert "--workspace" in done.stdout
    assert find_artefact(Workspace(tmp_path / "w"), "preprocess", "k") is None
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 200


@pytest.mark.parametrize("most_bytes", [12_000, 60_000])
def test_a_stage_without_room_publishes_nothing_and_finishes_once_there_is_room(
    stages, undisturbed, tmp_path, most_bytes
):
    workspace = Workspace(tmp_path / "w")
    starved = stages.run(workspace.uri, most_bytes=most_bytes)
    assert starved.result is None
    assert "the disk is full or a file size limit was reached" in starved.log
    assert "--workspace" in starved.log and "run the same command again" in starved.log
    assert list_artefacts(workspace, "preprocess") == []
    assert not list(Path(workspace.uri).rglob("*.part"))
    made = stages.run(workspace.uri).made
    assert made["steps"] == ALL_STEPS and content(made["uri"]) == content(undisturbed["uri"])
