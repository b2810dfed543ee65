"""Whether every artefact is what its manifest says, and what lies in a workspace that belongs to none."""

import hashlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from bmfm_pipeline.errors import StorageError
from bmfm_pipeline.storage import remote
from bmfm_pipeline.storage.cache import MANIFEST
from bmfm_pipeline.storage.hashing import hash_file
from bmfm_pipeline.storage.life.inventory import Inventory, Stored
from bmfm_pipeline.storage.life.scratch import FINISHED, JUST_NOW, RUNNING, STRANGE, scratch_of
from bmfm_pipeline.storage.life.shared import shared_runs
from bmfm_pipeline.storage.quarantine import quarantined, set_aside
from bmfm_pipeline.storage.uris import join_uri

DAY = 86400.0
# What must be mended; the other kinds are told for completeness.
PROBLEMS = ("damaged", "missing input", "half-published")
_BLOCK = 1 << 22
_AT_ONCE = 8
Tell = Callable[[int, int], None]


@dataclass(frozen=True)
class Finding:
    """Something that is not as it should be: its kind, where, what was found, what to do. `stage` and `key` of an artefact."""

    kind: str
    uri: str
    what: str
    cure: str
    stage: str = ""
    key: str = ""

    @property
    def is_problem(self) -> bool:
        return self.kind in PROBLEMS


def verify(inventory: Inventory, *, quick: bool = False, tell: Tell | None = None) -> list[Finding]:
    """Read every file of every artefact and compare its sha256 with the manifest; `quick` compares sizes, and on s3 versions.

    Then the references among them, folders without a manifest, and what runs left behind. `tell(done, total)` is called with bytes.
    """
    found: list[Finding] = []
    stored = sorted(inventory.stored.values(), key=lambda item: item.id)
    total, done = sum(item.size for item in stored), 0
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        checked = pool.map(lambda item: _of_artefact(inventory, item, quick), stored)
        for item, findings in zip(stored, checked, strict=True):
            found += findings
            done += item.size
            if tell:
                tell(done, total)
    return found + _of_runs(inventory) + _of_leftovers(inventory)


def _of_artefact(inventory: Inventory, item: Stored, quick: bool) -> list[Finding]:
    if item.artefact is None:
        return [_without_manifest(item)]
    cure = "`bmfm workspace verify --repair` sets it aside, and the next run makes it again"
    if wrong := _wrong_files(inventory, item, quick):
        return [Finding("damaged", item.uri, "; ".join(wrong), cure, *item.id)]
    found = []
    for role, (stage, key) in inventory.missing_inputs(item):
        what = f"its input {role}, {stage} {key[:12]}, is not in the workspace"
        found.append(
            Finding(
                "missing input",
                item.uri,
                what,
                f"run the command that made it again: {stage} is then made first",
                *item.id,
            )
        )
    if strange := sorted(set(item.files) - set(item.artefact.files) - {MANIFEST}):
        what = (
            f"holds files that its manifest does not name: {', '.join(strange[:5])}{' ...' if len(strange) > 5 else ''}"
        )
        found.append(Finding("strange file", item.uri, what, "nobody reads them; move them away", *item.id))
    return found


def _without_manifest(item: Stored) -> Finding:
    if MANIFEST in item.files:
        cure = "`bmfm workspace verify --repair` sets it aside, and the next run makes it again"
        return Finding("damaged", item.uri, item.problem, cure, *item.id)
    if time.time() - item.touched < DAY:
        return Finding(
            "being published", item.uri, f"{item.problem} yet", "wait; after a day it counts as left over", *item.id
        )
    return Finding(
        "half-published",
        item.uri,
        item.problem,
        "`bmfm workspace gc` deletes it: nobody reads a folder without one",
        *item.id,
    )


def _wrong_files(inventory: Inventory, item: Stored, quick: bool) -> list[str]:
    wrong = []
    for name, entry in item.artefact.files.items():
        there = item.files.get(name)
        if there is None:
            wrong.append(f"{name} is missing")
        elif there.size != entry["bytes"]:
            wrong.append(f"{name} has {there.size} bytes, the manifest says {entry['bytes']}")
        elif quick and there.etag == entry.get("etag", ""):
            continue
        elif why := _why_wrong(inventory, item.artefact.file(name), entry["sha256"]):
            wrong.append(f"{name} {why}")
    return wrong


def _why_wrong(inventory: Inventory, uri: str, expected: str) -> str:
    """What is wrong with the bytes as they are now, whatever is remembered of the file; '' when nothing is."""
    try:
        if inventory.workspace.remote:
            digest = hashlib.sha256()
            for block in remote.read_blocks(uri, _BLOCK):
                digest.update(block)
            found = digest.hexdigest()
        else:
            found = hash_file(uri)
            if found != expected:
                inventory.workspace.memo.hash_anew(uri)  # what is remembered is wrong
    except FileNotFoundError:
        return "is missing"
    except PermissionError as error:
        raise StorageError(
            f"{uri}: cannot be read ({error.strerror}); run as the user who owns the workspace"
        ) from error
    except OSError as error:  # the disk
        return f"cannot be read ({error.strerror or error})"
    return "" if found == expected else f"has sha256 {found[:16]}, the manifest says {expected[:16]}"


def _of_runs(inventory: Inventory) -> list[Finding]:
    found = []
    for run in scratch_of(inventory):
        age, uri = time.time() - run.touched, str(run.path)
        if run.stale_lease:
            what = f"the lease of {run.stale_lease} was not given back, and that process is gone"
            found.append(Finding("stale lease", uri, what, "the next run takes the folder over; nothing is to be done"))
        if run.state == STRANGE and age > JUST_NOW:
            found.append(
                Finding("orphaned run", uri, "says of no job", "`bmfm workspace gc` deletes it when it is old")
            )
        elif run.state == FINISHED and age > JUST_NOW:
            what = f"scratch of {run.title}, which is published"
            found.append(Finding("finished run", uri, what, "`bmfm workspace gc` deletes it"))
        elif run.state not in (RUNNING, FINISHED, STRANGE) and age > DAY:
            what = f"{run.title} was begun and not finished; nobody has touched it for {age / DAY:.0f} days"
            found.append(
                Finding(
                    "unfinished run",
                    uri,
                    what,
                    "the same command goes on with it; `bmfm workspace gc` deletes it when it is old",
                )
            )
    for run in shared_runs(inventory):
        age = time.time() - run.touched
        if run.state == RUNNING or age <= (JUST_NOW if run.state in (FINISHED, STRANGE) else DAY):
            continue
        kind = {FINISHED: "finished run", STRANGE: "orphaned run"}.get(run.state, "unfinished run")
        what = {
            FINISHED: f"checkpoints of {run.title}, which is published",
            STRANGE: "says of no job",
        }.get(run.state, f"checkpoints of {run.title}, begun and not finished, for {age / DAY:.0f} days")
        cure = "the same command goes on with it, on any machine; " if kind == "unfinished run" else ""
        found.append(Finding(kind, run.uri, what, f"{cure}`bmfm workspace gc` deletes it when it is old"))
    return found


def _of_leftovers(inventory: Inventory) -> list[Finding]:
    found = []
    for file in inventory.strays:
        uri = join_uri(inventory.workspace.uri, "artefacts", file.name)
        if not file.name.rsplit("/", 1)[-1].startswith("."):
            found.append(Finding("strange file", uri, "lies among the artefacts and is none", "move it away"))
        elif time.time() - file.modified > DAY:
            found.append(
                Finding("stale lock", uri, "was left by a process that ended", "`bmfm workspace gc` deletes it")
            )
    for upload in remote.pending_uploads(inventory.workspace.uri):
        if time.time() - upload.began > DAY:
            found.append(
                Finding("stale upload", upload.uri, "was begun and not ended", "`bmfm workspace gc` drops its parts")
            )
    for uri, files in quarantined(inventory.workspace):
        size = sum(file.size for file in files)
        found.append(
            Finding(
                "set aside",
                uri,
                f"{size} bytes of a damaged artefact",
                "look at it, or let `bmfm workspace gc` delete it",
            )
        )
    return found


def repair(inventory: Inventory, findings: list[Finding]) -> list[dict[str, Any]]:
    """Set damaged artefacts aside: [the finding with "quarantine", where it lies now]."""
    moved = []
    for finding in findings:
        if finding.kind == "damaged":
            target = set_aside(inventory.workspace, finding.stage, finding.key, finding.what)
            moved.append({**asdict(finding), "quarantine": target})
    return moved
