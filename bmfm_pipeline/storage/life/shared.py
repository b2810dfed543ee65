"""Copies of run folders in a remote workspace, from which other machines go on: whose they are, and whether somebody works on them."""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from bmfm_pipeline.storage.conditional import read_versioned
from bmfm_pipeline.storage.holders import EXPIRES_AFTER, lives_here
from bmfm_pipeline.storage.life.inventory import Inventory, Name, artefacts_named_in
from bmfm_pipeline.storage.listing import list_files
from bmfm_pipeline.storage.shared_run import JOB, LEASE
from bmfm_pipeline.storage.uris import join_uri

RUNNING, FINISHED, UNFINISHED, STRANGE = "running", "finished", "unfinished", "strange"


@dataclass(frozen=True)
class SharedScratch:
    """One folder runs/KEY of the remote workspace. `holder` is the process that works on it, where one gives signs of life."""

    uri: str
    size: int
    touched: float
    state: str
    stage: str = ""
    name: str = ""
    uses: set[Name] = field(default_factory=set)
    holder: str = ""

    @property
    def path(self) -> str:
        """Where it lies, as run folders of this machine say it."""
        return self.uri

    @property
    def title(self) -> str:
        key = self.uri.rsplit("/", 1)[-1][:12]
        return " ".join(part for part in (self.stage, self.name, key) if part)


def shared_runs(inventory: Inventory) -> list[SharedScratch]:
    """All of a remote workspace; none of a local one."""
    if not inventory.workspace.remote:
        return []
    place, found = join_uri(inventory.workspace.uri, "runs"), defaultdict(list)
    for file in list_files(place):
        key, _, name = file.name.partition("/")
        if name:
            found[key].append(file)
    return [_look(inventory, join_uri(place, key), files) for key, files in sorted(found.items())]


def _look(inventory: Inventory, uri: str, files: list) -> SharedScratch:
    size, touched = sum(file.size for file in files), max(file.modified for file in files)
    about = read_versioned(join_uri(uri, JOB))
    job = about.value if about else {}
    who = holder(uri)
    id = str(job.get("stage", "")), str(job.get("key", ""))
    item = inventory.stored.get(id)
    if who:
        state = RUNNING
    elif not job.get("stage"):
        state = STRANGE
    else:
        state = FINISHED if item is not None and item.artefact is not None else UNFINISHED
    return SharedScratch(uri, size, touched, state, id[0], str(job.get("name", "")), _uses(job, id), who)


def holder(uri: str) -> str:
    """'process 12 on HOST' that works on the run whose copy lies at `uri`; '' when nobody gives a sign of life."""
    lease = read_versioned(join_uri(uri, LEASE))
    if lease is None or not lease.value or lease.value.get("released"):
        return ""
    here = lives_here(lease.value)
    alive = lease.age < EXPIRES_AFTER if here is None else here
    return f"process {lease.value.get('pid')} on {lease.value.get('host')}" if alive else ""


def _uses(job: dict[str, Any], id: Name) -> set[Name]:
    inputs = job.get("inputs") or {}
    own = {
        (str(entry["stage"]), str(entry["id"]))
        for entry in inputs.values()
        if isinstance(entry, dict) and entry.get("stage") and entry.get("id")
    }
    return {id} | own | artefacts_named_in(inputs)
