"""Stages as processes of their own that can be killed anywhere, without a second of imports each."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ALL_STEPS = ["check", "split", "label_dictionary", "vocabulary", "transform", "publish"]
OWN_PLACES = ("BMFM_CACHE_DIR", "BMFM_DATA_HOME")
TIMED = "report.json"  # says how long steps took
NOWHERE = "http://127.0.0.1:1"  # an MLflow that does not answer costs no database


@dataclass(frozen=True)
class Ended:
    """One stage that ended: its wait status, what it gave back (None without) and what it said."""

    status: int
    result: dict | None
    log: str

    @property
    def made(self) -> dict:
        assert self.status == 0, self.log[-3000:]
        return self.result


class Stages:
    """The process that forks stages; each preprocesses the same cells, in the workspace that is named."""

    def __init__(self, folder: Path, cells: Path):
        self.folder, self.cells, self._number = folder, cells, 0
        self._ended: dict[str, int] = {}
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("stage_forks.py"))],
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **{name: str(folder / name) for name in OWN_PLACES}},
        )

    def start(self, workspace, die: str | None = None, most_bytes: int | None = None, **environment: str) -> str:
        """Begin a stage, which kills itself at the place `die` or can write no larger file; the name by which it is waited for."""
        self._number += 1
        name = f"stage{self._number}"
        request = {
            "name": name,
            "target": str(self.cells),
            "workspace": str(workspace),
            "environment": {"MLFLOW_TRACKING_URI": NOWHERE, **environment},
            "die": die,
            "most_bytes": most_bytes,
        }
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return name

    def log(self, name: str) -> str:
        file = self.folder / f"{name}.log"
        return file.read_text() if file.exists() else ""

    def wait(self, name: str) -> Ended:
        while name not in self._ended:
            told = json.loads(self.process.stdout.readline())
            self._ended[told["name"]] = told["status"]
        file = self.folder / f"{name}.json"
        return Ended(self._ended[name], json.loads(file.read_text()) if file.exists() else None, self.log(name))

    def run(self, workspace, die: str | None = None, most_bytes: int | None = None, **environment: str) -> Ended:
        return self.wait(self.start(workspace, die, most_bytes, **environment))


def content(folder) -> dict[str, str]:
    """{file: sha256} of what a stage has computed."""
    files = json.loads((Path(folder) / "artefact.json").read_text())["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name != TIMED}
