"""Damaged artefacts set aside: out of the way of the next run, and there to be looked at."""

import datetime
import os
from pathlib import Path

from bmfm_pipeline.storage import remote
from bmfm_pipeline.storage.cache import MANIFEST
from bmfm_pipeline.storage.files import disk_errors, write_json_atomic
from bmfm_pipeline.storage.listing import File, list_files
from bmfm_pipeline.storage.uris import join_uri
from bmfm_pipeline.storage.workspace import Workspace

WHY = "quarantine.json"


def quarantine_uri(workspace: Workspace) -> str:
    return join_uri(workspace.uri, "quarantine")


def set_aside(workspace: Workspace, stage: str, key: str, why: str) -> str | None:
    """Move an artefact's folder to quarantine/STAGE/KEY-TIME, with the reason in it; its address there, None where nothing lay.

    The place is then free, so that the next run makes the artefact anew.
    """
    uri = workspace.artefact_uri(stage, key)
    now = datetime.datetime.now(datetime.UTC)
    target = join_uri(quarantine_uri(workspace), stage, f"{key}-{now:%Y%m%dT%H%M%S%f}")
    note = {"was": uri, "set_aside": now.isoformat(timespec="seconds"), "why": why}
    if not workspace.remote:
        with disk_errors(target):
            Path(target).parent.mkdir(parents=True, exist_ok=True)
            try:
                os.rename(uri, target)
            except FileNotFoundError:
                return None
            write_json_atomic(Path(target) / WHY, note)
        return target
    files = list_files(uri)
    if not files:
        return None
    names = [file.name for file in files if file.name != MANIFEST]
    if len(names) < len(files):  # from here on it is no artefact any more
        remote.copy(join_uri(uri, MANIFEST), join_uri(target, MANIFEST))
        remote.remove(join_uri(uri, MANIFEST))
    for name in names:
        remote.copy(join_uri(uri, name), join_uri(target, name))
    remote.write_json(join_uri(target, WHY), note)
    for name in names:
        remote.remove(join_uri(uri, name))
    return target


def quarantined(workspace: Workspace) -> list[tuple[str, list[File]]]:
    """(address, files) of each folder that was set aside."""
    place, found = quarantine_uri(workspace), {}
    for file in list_files(place):
        parts = file.name.split("/", 2)
        if len(parts) == 3:
            entry = File(parts[2], file.size, file.etag, file.modified)
            found.setdefault(join_uri(place, parts[0], parts[1]), []).append(entry)
    return sorted(found.items())
