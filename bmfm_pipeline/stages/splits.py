"""Splits as inputs and artefacts: found by name, address or file, and published under a name of their own."""

import shutil
from pathlib import Path
from typing import Any

from bmfm_pipeline.config import RunConfig, require_path
from bmfm_pipeline.config.splits import PLACE, resolve_split
from bmfm_pipeline.errors import DataError, StorageError
from bmfm_pipeline.stages.jobs import KEY_LENGTH, Job
from bmfm_pipeline.storage import (
    Artefact,
    Workspace,
    content_hash,
    exclusive_file,
    exists,
    hash_json,
    is_remote,
    join_uri,
    list_artefacts,
    local_path,
    publish,
    read_json,
    strip_userinfo,
)

STAGE = "split"


def split_input(run: RunConfig, workspace: Workspace) -> dict[str, dict[str, Any]]:
    """The split file that a run reads, by role, with the hash of its content; empty when the split is made anew."""
    plan = resolve_split(run)
    if plan.method == "file":
        path = require_path(plan.file, f"{PLACE}.file")
        if not exists(path):
            raise DataError(f"{PLACE}.file: {path} does not exist; name a csv file with the columns cell and split")
    elif plan.method == "reuse":
        path = find_split(require_path(plan.reuse, f"{PLACE}.reuse"), workspace)
    else:
        return {}
    path = path if is_remote(path) else str(local_path(path))
    return {"split": {"id": content_hash(path, workspace.memo), "uri": strip_userinfo(path)}}


def find_split(name: str, workspace: Workspace) -> str:
    """The split.csv behind a name given with split.name, the address of an artefact, or that of a csv file."""
    if name.endswith(".csv") or "/" in name or is_remote(name):
        for candidate in (name, join_uri(name, "split.csv")):
            if candidate.endswith(".csv") and exists(candidate):
                return candidate
        raise DataError(f"{PLACE}.reuse: {name} is neither a csv file nor a folder with a split.csv")
    known = _named(workspace)
    if name not in known:
        there = ", ".join(sorted(known)) or "there is none yet"
        raise DataError(
            f"{PLACE}.reuse: no split is called '{name}' in workspace {workspace.uri} ({there}); a run gives its split a name with "
            f"{PLACE}.name=NAME. The address of an artefact or of a split.csv can be named too"
        )
    return known[name].file("split.csv")


def _named(workspace: Workspace) -> dict[str, Artefact]:
    """Splits by name; those inside preprocessed data count as well, should the copy that bears the name be gone."""
    found: dict[str, Artefact] = {}
    for artefact in list_artefacts(workspace, "preprocess"):
        if name := artefact.config.get("transform", {}).get("split", {}).get("name"):
            found[name] = artefact
    return found | {artefact.summary["name"]: artefact for artefact in list_artefacts(workspace, STAGE)}


def refuse_other_split(name: str, found: str, workspace: Workspace) -> None:
    there = _named(workspace).get(name)
    if there is None or there.stage != STAGE:
        return
    if there.summary["hash"] != found:
        raise StorageError(
            f"{PLACE}.name: '{name}' is already the name of another split ({there.uri}, made {there.created}); choose another name, or use "
            f"that split with {PLACE}.reuse={name}"
        )


def publish_named(job: Job, name: str) -> str:
    """Publish the split of a job as an artefact of its own; returns its address. One that is there already is kept."""
    info = read_json(job.staging / "split.json")
    folder = job.run_dir / "named-split"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for file in ("split.csv", "split.json"):
        shutil.copyfile(job.staging / file, folder / file)
    key = hash_json({"stage": STAGE, "name": name, "split": info["hash"]})[:KEY_LENGTH]

    def publish_it() -> Artefact:
        refuse_other_split(name, info["hash"], job.place)
        return publish(
            folder, job.place, STAGE, key,
            inputs={role: job.inputs[role] for role in ("source", "split") if role in job.inputs},
            config=job.view.get("transform", {}).get("split", {}), code_version=job.code,
            summary={"name": name, "hash": info["hash"], **info["counts"]},
        )  # fmt: skip

    if job.place.remote:
        return publish_it().uri
    with exclusive_file(Path(job.place.uri) / "artefacts" / STAGE / "names"):
        return publish_it().uri
