"""Which artefacts, run folders and copies may go, and why the others stay; and their removal."""

import contextlib
import fcntl
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from bmfm_pipeline.errors import ConfigError, StorageError
from bmfm_pipeline.storage import remote
from bmfm_pipeline.storage.cache import CacheEntry, cache_dir, entries, remove_unused
from bmfm_pipeline.storage.failures import RemoteError
from bmfm_pipeline.storage.files import disk_errors
from bmfm_pipeline.storage.life.inventory import Inventory, Name, Stored
from bmfm_pipeline.storage.life.removing import delete_folder, delete_stored, trash_folder
from bmfm_pipeline.storage.life.scratch import (
    FINISHED,
    JUST_NOW,
    RUNNING,
    has_living_lease,
    locked,
    scratch_of,
    used_now,
)
from bmfm_pipeline.storage.life.shared import holder, shared_runs
from bmfm_pipeline.storage.life.verifying import DAY
from bmfm_pipeline.storage.listing import list_files
from bmfm_pipeline.storage.locks import exclusive
from bmfm_pipeline.storage.quarantine import quarantined
from bmfm_pipeline.storage.shared_run import SharedRun
from bmfm_pipeline.storage.uris import join_uri, local_path

# Made while a model is evaluated and read again by later evaluations of the same data and models, which do not name them as inputs.
COMPANIONS = ("control", "embeddings")
# Pages and tables about other artefacts: small, and kept with those.
RESULTS = ("pipeline", "interpret", "study", "benchmark")
NAMED = "split"  # a split was given a name by a person, who may use it at any time
REMOVED = "removed"
_UNITS = {"h": DAY / 24, "d": DAY, "w": 7 * DAY}


def read_age(text: str) -> float:
    """Seconds of an age like 30d, 12h or 2w; ConfigError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([hdw])\s*", text.lower())
    if not found:
        raise ConfigError(f"--older-than {text}: is no age; write for example 30d (days), 12h (hours) or 2w (weeks)")
    return float(found[1]) * _UNITS[found[2]]


@dataclass(frozen=True)
class Removal:
    """Something that may go. `kind`: artefact, leftover, run, shared run, cache, quarantine, trash, upload or lock; `outcome` is filled when it was tried."""

    kind: str
    uri: str
    size: int
    what: str
    why: str
    id: Name | None = None
    files: tuple[str, ...] = ()
    outcome: str = ""


@dataclass
class Plan:
    """What may go, in the order in which it does, and {artefact: why it stays}."""

    removals: list[Removal] = field(default_factory=list)
    kept: dict[Name, str] = field(default_factory=dict)


def plan_removals(
    inventory: Inventory,
    older_than: float,
    *,
    protected: Mapping[Name, str] | None = None,
    keep_models: str = "",
    keep_latest: bool = True,
    now: float | None = None,
) -> Plan:
    """What nothing needs and is older than `older_than` seconds.

    An artefact stays when it is younger, `protected` (with the reason), in use by a run, a named split, what `latest` stands for (unless
    `keep_latest` is false), any model where `keep_models` says why, the newest evaluation of a model that stays, its controls, a page about
    what stays, or when something that stays was made from it. Run folders go when they are finished, or untouched for that long; copies and what was set aside when they are
    that old. Nothing that a living process holds goes.
    """
    now = time.time() if now is None else now
    plan = Plan(kept=_kept(inventory, now - older_than, protected or {}, keep_models, keep_latest))
    plan.removals += _artefacts(inventory, plan.kept, now)
    plan.removals += _runs(inventory, older_than, now)
    plan.removals += _rest(inventory, older_than, now)
    return plan


def _kept(
    inventory: Inventory, since: float, protected: Mapping[Name, str], keep_models: str, keep_latest: bool
) -> dict[Name, str]:
    kept: dict[Name, str] = {}
    whole = {id: item for id, item in inventory.stored.items() if item.artefact is not None}

    def keep(reasons: Mapping[Name, str]) -> None:
        fresh = {id: why for id, why in reasons.items() if id in inventory.stored and id not in kept}
        kept.update(fresh)
        waiting = list(fresh)
        while waiting:
            id = waiting.pop()
            for other in inventory.references[id]:
                if other not in kept:
                    kept[other] = f"{inventory.stored[id].title} was made from it"
                    waiting.append(other)

    reasons = {**used_now(inventory), **protected}
    for id, item in whole.items():
        if item.stage == NAMED:
            reasons.setdefault(id, f"its name, {item.name}, may be used at any time")
        elif item.made > since:
            reasons.setdefault(id, "is not old enough")
        elif keep_models and item.is_model:
            reasons.setdefault(id, keep_models)
    for item in latest_models(whole.values()) if keep_latest else ():
        reasons.setdefault(item.id, f"is what `latest` stands for: the newest {item.stage} of {item.name}")
    keep(reasons)
    keep({item.id: "is the newest evaluation of a model that stays" for item in _newest_tests(whole.values(), kept)})
    tests = [inventory.references[id] for id in kept if id[0] == "evaluate"]
    keep({id: "is read by an evaluation that stays" for id in whole if _is_read_by(inventory, id, tests)})
    about = {id: inventory.references[id] for id in whole if id[0] in RESULTS}
    keep({id: "is about what stays" for id, names in about.items() if names and names <= set(kept)})
    return kept


def _is_read_by(inventory: Inventory, id: Name, tests: list[set[Name]]) -> bool:
    """Whether one of the evaluations, each given by what it was made from, may read this control or these embeddings again."""
    if id[0] not in COMPANIONS:
        return False
    needs = {name for name in inventory.references[id] if name[0] not in COMPANIONS}
    return any(needs <= test for test in tests)


def latest_models(items: Iterable[Stored]) -> list[Stored]:
    """The newest model of each stage and data set; one that was made as a control is nobody's newest model."""
    newest: dict[tuple[str, str], Stored] = {}
    for item in items:
        if item.is_model and not item.variant:
            other = newest.get((item.stage, item.name))
            if other is None or other.artefact.created < item.artefact.created:
                newest[item.stage, item.name] = item
    return list(newest.values())


def _newest_tests(items: Iterable[Stored], kept: Mapping[Name, str]) -> list[Stored]:
    newest: dict[Name, Stored] = {}
    for item in items:
        if item.stage != "evaluate":
            continue
        model = item.artefact.inputs.get("model", {})
        of = str(model.get("stage", "")), str(model.get("id", ""))
        if of in kept and (of not in newest or newest[of].artefact.created < item.artefact.created):
            newest[of] = item
    return list(newest.values())


def _artefacts(inventory: Inventory, kept: Mapping[Name, str], now: float) -> list[Removal]:
    """Those made from others go before what they were made from: whatever interrupts the removal, no input is missing."""
    found, seen = [], set()

    def visit(id: Name) -> None:
        if id in seen or id in kept:
            return
        seen.add(id)
        for other in sorted(inventory.referenced_by.get(id, ())):
            visit(other)
        item = inventory.stored[id]
        if item.artefact is not None:
            why = f"nothing needs it, {_days(now - item.made)} old"
            found.append(Removal("artefact", item.uri, item.size, item.title, why, id, tuple(item.files)))
        elif "artefact.json" not in item.files and now - item.touched > DAY:
            why = f"{item.problem}, {_days(now - item.touched)} old"
            found.append(Removal("leftover", item.uri, item.size, item.title, why, id, tuple(item.files)))

    for id in sorted(inventory.stored):
        visit(id)
    return found


def _runs(inventory: Inventory, older_than: float, now: float) -> list[Removal]:
    found = []
    for run in scratch_of(inventory):
        age = now - run.touched
        if run.state == RUNNING or age <= (min(JUST_NOW, older_than) if run.state == FINISHED else older_than):
            continue
        why = "its artefact is published" if run.state == FINISHED else f"{run.state}, untouched for {_days(age)}"
        found.append(Removal("run", str(run.path), run.size, run.title, why))
    for run in shared_runs(inventory):
        age = now - run.touched
        if run.state == RUNNING or age <= (min(JUST_NOW, older_than) if run.state == FINISHED else older_than):
            continue
        why = "its artefact is published" if run.state == FINISHED else f"{run.state}, untouched for {_days(age)}"
        found.append(Removal("shared run", run.uri, run.size, run.title, why))
    return found


def _rest(inventory: Inventory, older_than: float, now: float) -> list[Removal]:
    found = []
    for uri, files in quarantined(inventory.workspace):
        age = now - max(file.modified for file in files)
        if age > older_than:
            why, names = f"set aside {_days(age)} ago", tuple(file.name for file in files)
            found.append(
                Removal("quarantine", uri, sum(file.size for file in files), uri.rsplit("/", 1)[-1], why, files=names)
            )
    for file in inventory.strays:
        if file.name.rsplit("/", 1)[-1].startswith(".") and now - file.modified > max(DAY, older_than):
            uri = join_uri(inventory.workspace.uri, "artefacts", file.name)
            found.append(Removal("lock", uri, file.size, file.name, "left by a process that ended"))
    trash = trash_folder(inventory.workspace.run_dir("any").parent.parent)
    for path in trash.iterdir() if trash.is_dir() else ():
        size = sum(file.size for file in list_files(str(path)))
        found.append(Removal("trash", str(path), size, path.name, "its deletion was interrupted"))
    for upload in remote.pending_uploads(inventory.workspace.uri):
        if (age := now - upload.began) > DAY:
            why = f"its upload began {_days(age)} ago and did not end"
            found.append(Removal("upload", upload.uri, 0, upload.uri.rsplit("/", 1)[-1], why, files=(upload.id,)))
    return found + [_of_cache(entry, now) for entry in entries(cache_dir()) if now - entry.used > older_than]


def _of_cache(entry: CacheEntry, now: float) -> Removal:
    used = f"unused for {_days(now - entry.used)}" if entry.used else "nothing is known of its use"
    return Removal("cache", str(entry.folder), entry.size, entry.source, used)


def carry_out(inventory: Inventory, plan: Plan, tell: Callable[[Removal], None] | None = None) -> list[Removal]:
    """Remove what the plan names; each with its `outcome`: removed, or why it stayed. What a run has begun to use meanwhile stays."""
    done: list[Removal] = []
    stayed: set[Name] = set()
    watch = _Watch(inventory)
    for removal in plan.removals:
        outcome = ""
        if removal.id is not None:
            outcome = "stays: something made from it stays" if removal.id in stayed else watch.use_of(removal.id)
        if not outcome:
            try:
                outcome = _remove(inventory, removal)
            except RemoteError:
                raise
            except (StorageError, OSError) as error:
                outcome = f"could not be removed: {error}"
        if outcome != REMOVED and removal.id:
            stayed |= {removal.id, *inventory.references[removal.id]}
        done.append(replace(removal, outcome=outcome))
        if tell:
            tell(done[-1])
    return done


class _Watch:
    """What runs use, looked at again every few seconds while things are removed."""

    def __init__(self, inventory: Inventory):
        self.inventory, self._asked = inventory, float("-inf")
        self._found: dict[Name, str] = {}

    def use_of(self, id: Name) -> str:
        if time.monotonic() - self._asked > 2:
            self._found = {}
            for used, why in used_now(self.inventory).items():
                self._found[used] = f"stays: {why}"
                for other in self.inventory.references.get(used, ()):
                    self._found.setdefault(other, "stays: something that a run uses was made from it")
            self._asked = time.monotonic()
        return self._found.get(id, "")


def _remove(inventory: Inventory, removal: Removal) -> str:
    workspace, path = inventory.workspace, Path(removal.uri)
    if removal.kind in ("artefact", "leftover", "quarantine"):
        delete_stored(workspace, removal.uri, removal.files)
    elif removal.kind == "run":
        with locked(path) as free:
            if not free or has_living_lease(path):
                return "stays: a process works in it"
            delete_folder(path, path.parent.parent)
    elif removal.kind == "shared run":
        if who := holder(removal.uri):
            return f"stays: {who} works on it"
        SharedRun(removal.uri).remove()
    elif removal.kind == "trash":
        delete_folder(path, path.parent.parent)
    elif removal.kind == "upload":
        remote.abort_upload(removal.uri, *removal.files)
    elif removal.kind == "lock":
        return _remove_lock(workspace.remote, removal.uri)
    else:
        with exclusive(cache_dir()):
            if not remove_unused(path):
                return "stays: a process uses it"
    return REMOVED


def _remove_lock(is_remote: bool, uri: str) -> str:
    if is_remote:
        remote.remove(uri)
        return REMOVED
    with disk_errors(uri), contextlib.suppress(FileNotFoundError):
        handle = os.open(local_path(uri), os.O_RDWR)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(local_path(uri))
        except BlockingIOError:
            return "stays: a process holds it"
        finally:
            os.close(handle)
    return REMOVED


def _days(seconds: float) -> str:
    for length, name in ((DAY, "days"), (DAY / 24, "hours"), (60.0, "minutes")):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {name}"
    return "a moment"
