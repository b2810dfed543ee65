"""Folders of work in progress: which are used now, which belong to something finished, and which were left by the dead."""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bmfm_pipeline.errors import StorageError
from bmfm_pipeline.storage.files import read_json
from bmfm_pipeline.storage.holders import is_alive
from bmfm_pipeline.storage.life.inventory import Inventory, Name, artefacts_named_in
from bmfm_pipeline.storage.life.shared import FINISHED, RUNNING, STRANGE, UNFINISHED, shared_runs
from bmfm_pipeline.storage.listing import size_and_time
from bmfm_pipeline.storage.uris import local_path
from bmfm_pipeline.storage.workspace import Workspace

_LEASE = "lease.json"
JUST_NOW = 3600.0  # seconds: between two steps of a flow nobody holds the folder


@dataclass(frozen=True)
class Scratch:
    """One folder runs/KEY. `state` is running, finished (its artefact is published), unfinished, or strange (it says of no job)."""

    path: Path
    size: int
    touched: float
    state: str
    stage: str = ""
    name: str = ""
    uses: set[Name] = field(default_factory=set)
    stale_lease: str = ""

    @property
    def title(self) -> str:
        return " ".join(part for part in (self.stage, self.name, self.path.name[:12]) if part)


def runs_folder(workspace: Workspace) -> Path:
    return workspace.run_dir("any").parent


def scratch_of(inventory: Inventory) -> list[Scratch]:
    """The run folders of a workspace on this machine; those of others that share the place are left out."""
    folder = runs_folder(inventory.workspace)
    found = (_look(path, inventory) for path in sorted(folder.iterdir()) if path.is_dir()) if folder.is_dir() else ()
    return [item for item in found if item is not None]


def _look(path: Path, inventory: Inventory) -> Scratch | None:
    job = _job(path)
    if job and not _same_place(str(job.get("workspace", "")), inventory.workspace):
        return None
    if not job and inventory.workspace.remote:  # of whichever workspace
        return None
    size, touched = size_and_time(path)
    dead = ", ".join(_words(lease) for lease, alive in _leases(path) if not alive)
    if in_use(path):
        state = RUNNING
    elif not job:
        state = STRANGE
    else:
        state = FINISHED if _is_published(job, inventory) else UNFINISHED
    return Scratch(
        path, size, touched, state, *(str(job.get(part, "")) for part in ("stage", "name")), _uses(job), dead
    )


def _job(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path / "job.json")
    except (OSError, StorageError):
        return {}
    return found if isinstance(found, dict) else {}


def _of(job: dict[str, Any]) -> Name:
    return str(job.get("stage", "")), str(job.get("key", ""))


def _same_place(uri: str, workspace: Workspace) -> bool:
    if workspace.remote:
        return uri.rstrip("/") == workspace.uri
    return bool(uri) and "://" not in uri and local_path(uri) == local_path(workspace.uri)


def _uses(job: dict[str, Any]) -> set[Name]:
    """What a job makes, and the artefacts that it reads."""
    if not job:
        return set()
    inputs = job.get("inputs") or {}
    own = {
        (str(entry["stage"]), str(entry["id"])) for entry in inputs.values() if entry.get("stage") and entry.get("id")
    }
    return {_of(job)} | own | artefacts_named_in(inputs)


def used_now(inventory: Inventory) -> dict[Name, str]:
    """{artefact: the run that makes or reads it} of the runs that a living process holds, or that stood between two steps just now."""
    folder, found = runs_folder(inventory.workspace), {}
    for path in folder.iterdir() if folder.is_dir() else ():
        job = _job(path) if path.is_dir() else {}
        if not job or not _same_place(str(job.get("workspace", "")), inventory.workspace):
            continue
        if in_use(path) or (not _is_published(job, inventory) and time.time() - size_and_time(path)[1] < JUST_NOW):
            found |= {name: f"in use by run {path.name[:12]}" for name in _uses(job)}
    for run in shared_runs(inventory):  # of other machines
        if run.state == RUNNING:
            found |= {name: f"in use by {run.holder}" for name in run.uses}
    return found


def _is_published(job: dict[str, Any], inventory: Inventory) -> bool:
    item = inventory.stored.get(_of(job))
    return item is not None and item.artefact is not None


def in_use(path: Path) -> bool:
    """Whether a process holds the lock of a run folder, or a lease in it."""
    if has_living_lease(path):
        return True
    with locked(path) as free:
        return not free


def has_living_lease(path: Path) -> bool:
    return any(alive for _, alive in _leases(path))


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Hold the lock of a run folder without waiting; gives False when another process has it."""
    try:
        handle = os.open(path / ".lock", os.O_RDWR)
    except FileNotFoundError:
        yield True
        return
    except OSError:
        yield False
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(handle)


def _leases(path: Path) -> list[tuple[dict[str, Any], bool]]:
    """(lease, whether its holder lives) of those that were not given back."""
    found = []
    for file in (path / _LEASE, *path.glob(f"*/{_LEASE}")):
        with contextlib.suppress(OSError, StorageError, ValueError, KeyError, AttributeError):
            lease = read_json(file)
            if lease and not lease.get("released"):
                found.append((lease, is_alive(lease, file)))
    return found


def _words(lease: dict[str, Any]) -> str:
    return f"process {lease.get('pid')} on {lease.get('host')}"
