"""Artefacts: directories with a manifest, published whole or not at all, named by the hash of what made them."""

import datetime
import json
import logging
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bmfm_pipeline.errors import StorageError
from bmfm_pipeline.storage import remote
from bmfm_pipeline.storage.cache import MANIFEST, adopt, localise
from bmfm_pipeline.storage.failures import RemoteError
from bmfm_pipeline.storage.files import disk_errors, fsync_folder, read_json, write_json_atomic
from bmfm_pipeline.storage.hashing import ContentMemo, hash_bytes, hash_file
from bmfm_pipeline.storage.quarantine import set_aside
from bmfm_pipeline.storage.uris import is_remote, join_uri, local_path, strip_userinfo
from bmfm_pipeline.storage.workspace import Workspace

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Artefact:
    """The manifest of one published directory: what it is, what made it, and the sha256 of each of its files."""

    uri: str
    stage: str
    key: str
    inputs: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    code_version: str = ""
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    created: str = ""
    cost: dict[str, Any] = field(default_factory=dict)

    @property
    def hash(self) -> str:
        """Hash of the content: two builds of one key may be compared by it."""
        return hash_bytes(json.dumps({name: entry["sha256"] for name, entry in sorted(self.files.items())}).encode())

    def local(self) -> Path:
        """The directory on this machine: a checked, read-only copy in the cache when it is remote."""
        return localise(self.uri)

    def local_file(self, name: str) -> Path:
        """One of its files on this machine; of a remote artefact only this one is fetched."""
        return localise(self.file(name), self.files[name]["sha256"] if name in self.files else None)

    def file(self, name: str) -> str:
        return join_uri(self.uri, name)


def publish(
    staging: Path,
    workspace: Workspace,
    stage: str,
    key: str,
    *,
    inputs: dict[str, Any],
    config: dict[str, Any],
    code_version: str,
    summary: dict[str, Any] | None = None,
    cost: dict[str, Any] | None = None,
) -> Artefact:
    """Make the files in `staging` the artefact (stage, key). `cost`: what its steps took, on which machine; no part of its hash.

    Local: manifest written in `staging`, everything flushed, then one rename. s3: files first, the manifest last. A valid artefact
    that is already there wins (someone else was faster); a damaged one is set aside and replaced. Raises StorageError when the disk is full.
    """
    staging = Path(staging)
    uri = workspace.artefact_uri(stage, key)
    with disk_errors(uri):
        files = {}
        for path in sorted(staging.rglob("*")):
            name = str(path.relative_to(staging))
            if path.is_file() and name != MANIFEST:
                with open(path, "rb") as stream:
                    os.fsync(stream.fileno())
                files[name] = {"sha256": hash_file(path), "bytes": path.stat().st_size}
        artefact = Artefact(
            uri=uri,
            stage=stage,
            key=key,
            inputs=inputs,
            config=config,
            code_version=code_version,
            files=files,
            summary=summary or {},
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            cost=cost or {},
        )
        existing = find_artefact(workspace, stage, key)
        if existing is not None:
            shutil.rmtree(staging)
            return existing
        _set_damaged_aside(workspace, artefact)
        if workspace.remote:
            _upload(staging, artefact)
            adopt(staging, uri)
        else:
            _write_manifest(staging, artefact)
            _rename_into_place(staging, Path(uri))
    return artefact


def _set_damaged_aside(workspace: Workspace, artefact: Artefact) -> None:
    """What lies at the place of a new artefact was no valid one, or it would have been used."""
    if not remote.exists(artefact.file(MANIFEST)):
        return
    try:
        target = set_aside(workspace, artefact.stage, artefact.key, "its bytes were not those of its manifest")
    except (StorageError, OSError) as error:  # no reason to lose what was just made
        logger.warning("%s: the damaged artefact could not be set aside: %s", strip_userinfo(artefact.uri), error)
        return
    if target:
        logger.warning("%s: was damaged; set aside as %s", strip_userinfo(artefact.uri), strip_userinfo(target))


def _rename_into_place(staging: Path, target: Path) -> None:
    fsync_folder(staging)
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():  # what was no artefact, and could not be set aside
        shutil.rmtree(target)
    try:
        os.rename(staging, target)
    except OSError as error:
        if not target.exists():
            raise
        # Another process published the same key between our check and the rename: theirs is as good as ours.
        shutil.rmtree(staging, ignore_errors=True)
        if not (target / MANIFEST).exists():
            raise StorageError(f"{target}: cannot be replaced ({error})") from error
    fsync_folder(target.parent)


def _write_manifest(folder: Path, artefact: Artefact) -> None:
    write_json_atomic(folder / MANIFEST, {name: value for name, value in asdict(artefact).items() if name != "uri"})


def _upload(staging: Path, artefact: Artefact) -> None:
    """Files first, the manifest last; it notes the ETag of each, by which a file that was replaced is found out."""
    remote.remove(artefact.file(MANIFEST))  # that of a damaged artefact: no reader may take old words for new files
    for name in artefact.files:
        remote.upload(staging / name, artefact.file(name))
    arrived = {item.name: item for item in remote.objects_at(artefact.uri)} if artefact.files else {}
    for name, entry in artefact.files.items():
        if name not in arrived or arrived[name].size != entry["bytes"]:
            raise RemoteError(f"{artefact.file(name)}: did not arrive whole; run the same command again")
        entry["etag"] = arrived[name].etag
    _write_manifest(staging, artefact)
    remote.upload(staging / MANIFEST, artefact.file(MANIFEST))


def load_artefact(uri: str) -> Artefact:
    """The artefact at `uri`; StorageError when there is no manifest."""
    manifest = _read_manifest(uri)
    if manifest is None:
        raise StorageError(f"{uri}: not an artefact (no {MANIFEST}); list what there is with `bmfm plan`")
    return Artefact(uri=uri, **manifest)


def _read_manifest(uri: str) -> dict[str, Any] | None:
    if is_remote(uri):
        data = remote.read_bytes(join_uri(uri, MANIFEST))
        try:
            return None if data is None else json.loads(data)
        except ValueError as error:
            raise StorageError(f"{join_uri(uri, MANIFEST)}: not valid JSON ({error})") from error
    path = local_path(uri) / MANIFEST
    return read_json(path) if path.exists() else None


def find_artefact(workspace: Workspace, stage: str, key: str) -> Artefact | None:
    """The valid artefact (stage, key), or None when it is absent, incomplete or its bytes are not those of its manifest.

    Raises RemoteError when the workspace cannot be reached: what cannot be seen is not taken for absent.
    """
    uri = workspace.artefact_uri(stage, key)
    try:
        artefact = load_artefact(uri)
        return artefact if _is_whole(artefact, workspace.memo) else None
    except RemoteError:
        raise
    except (StorageError, TypeError):
        return None


def _is_whole(artefact: Artefact, memo: ContentMemo) -> bool:
    if is_remote(artefact.uri):
        there = {item.name: item for item in remote.objects_at(artefact.uri)}
        if any(name not in there or there[name].size != entry["bytes"] for name, entry in artefact.files.items()):
            return False
        if any(there[name].etag != entry.get("etag") for name, entry in artefact.files.items()):
            localise(
                artefact.uri
            )  # copied by other means, or replaced: fetching it compares every file with its sha256
        return True
    folder = Path(artefact.uri)
    for name, entry in artefact.files.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != entry["bytes"] or memo.hash_file(file) != entry["sha256"]:
            return False
    return True


def list_artefacts(workspace: Workspace, stage: str) -> list[Artefact]:
    """All artefacts of a stage, newest first; unreadable ones are left out."""
    if workspace.remote:
        names = remote.folder_names(join_uri(workspace.uri, "artefacts", stage))
    else:
        folder = Path(workspace.uri) / "artefacts" / stage
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    found = []
    for name in names:
        try:
            found.append(load_artefact(workspace.artefact_uri(stage, name)))
        except RemoteError:
            raise
        except (StorageError, TypeError):
            continue
    return sorted(found, key=lambda artefact: artefact.created, reverse=True)
