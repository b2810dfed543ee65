"""The artefacts of a workspace as they lie there: sizes, ages, what each was made from, and what was made from it."""

import datetime
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from bmfm_pipeline.errors import StorageError
from bmfm_pipeline.storage import remote
from bmfm_pipeline.storage.artefact import Artefact
from bmfm_pipeline.storage.cache import MANIFEST
from bmfm_pipeline.storage.listing import File, list_files
from bmfm_pipeline.storage.uris import join_uri, local_path, strip_userinfo
from bmfm_pipeline.storage.workspace import Workspace

Name = tuple[str, str]  # (stage, key)
_AT_ONCE = 8
_ADDRESS = re.compile(r"(?:^|/)artefacts/([^/\s]+)/([^/\s]+)")


@dataclass(frozen=True)
class Stored:
    """One folder of the workspace's artefacts. Without a readable manifest `artefact` is None and `problem` says why."""

    stage: str
    key: str
    uri: str
    files: dict[str, File]
    artefact: Artefact | None
    problem: str = ""

    @property
    def id(self) -> Name:
        return self.stage, self.key

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files.values())

    @property
    def touched(self) -> float:
        """When the newest of its files was written, in seconds since the epoch."""
        return max((file.modified for file in self.files.values()), default=0.0)

    @property
    def made(self) -> float:
        """When it was published, as its manifest says, in seconds since the epoch."""
        try:
            return datetime.datetime.fromisoformat(self.artefact.created).timestamp()
        except (AttributeError, ValueError):
            return self.touched

    @property
    def name(self) -> str:
        return str(self.artefact.summary.get("name", "")) if self.artefact else ""

    @property
    def variant(self) -> str:
        return str(self.artefact.summary.get("variant", "")) if self.artefact else ""

    @property
    def is_model(self) -> bool:
        return self.artefact is not None and "config.json" in self.artefact.files

    @property
    def title(self) -> str:
        """For a person: stage, data set and the beginning of the key."""
        return " ".join(part for part in (self.stage, self.name, self.key[:12]) if part)


@dataclass
class Inventory:
    """What `take_inventory` found. `strays` are files below artefacts/ that lie in no artefact's folder."""

    workspace: Workspace
    stored: dict[Name, Stored] = field(default_factory=dict)
    strays: list[File] = field(default_factory=list)

    @cached_property
    def references(self) -> dict[Name, set[Name]]:
        """For each artefact those of this workspace that it was made from."""
        return {
            id: {name for _, name in named_inputs(item.artefact) if name in self.stored and name != id}
            for id, item in self.stored.items()
        }

    @cached_property
    def referenced_by(self) -> dict[Name, set[Name]]:
        found: dict[Name, set[Name]] = defaultdict(set)
        for id, names in self.references.items():
            for name in names:
                found[name].add(id)
        return found

    def missing_inputs(self, item: Stored) -> list[tuple[str, Name]]:
        """(role, artefact) of inputs that were artefacts of this workspace and are gone."""
        own = join_uri(self.workspace.uri, "artefacts") + "/"
        return [
            (role, name)
            for role, name, uri in _inputs(item.artefact)
            if name not in self.stored and (not uri or uri.startswith(own))
        ]


def named_inputs(artefact: Artefact | None) -> Iterator[tuple[str, Name]]:
    """(role, (stage, key)) of the artefacts that one was made from, or that one of its inputs lies in."""
    return ((role, name) for role, name, _ in _inputs(artefact))


def _inputs(artefact: Artefact | None) -> Iterator[tuple[str, Name, str]]:
    for role, entry in (artefact.inputs if artefact else {}).items():
        if not isinstance(entry, dict):
            continue
        uri = str(entry.get("uri", ""))
        if entry.get("stage") and entry.get("id"):
            yield role, (str(entry["stage"]), str(entry["id"])), uri
        else:
            for name in artefacts_named_in(uri):
                yield role, name, uri
        for part in (entry.get("files") or {}).values() if isinstance(entry.get("files"), dict) else ():
            for name in artefacts_named_in(str(part.get("uri", ""))):
                yield role, name, str(part.get("uri", ""))


def artefacts_named_in(value: Any) -> set[Name]:
    """(stage, key) of every address of an artefact in a text, or in the texts of nested dictionaries and lists."""
    if isinstance(value, str):
        return {(stage, key) for stage, key in _ADDRESS.findall(value)}
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple | set):
        return set().union(*map(artefacts_named_in, value))
    return set()


def take_inventory(workspace: Workspace) -> Inventory:
    """Look at all artefacts of a workspace: one listing, and each manifest.

    Raises StorageError when there is no such workspace, or (RemoteError) it cannot be reached.
    """
    if not remote.exists(workspace.uri):
        raise StorageError(
            f"{strip_userinfo(workspace.uri)}: nothing lies there; name the workspace with --workspace or BMFM_WORKSPACE"
        )
    place = join_uri(workspace.uri, "artefacts")
    folders: dict[Name, dict[str, File]] = defaultdict(dict)
    found = Inventory(workspace)
    for file in list_files(place):
        parts = file.name.split("/", 2)
        if len(parts) == 3:
            folders[parts[0], parts[1]][parts[2]] = File(parts[2], file.size, file.etag, file.modified)
        else:
            found.strays.append(file)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for item in pool.map(lambda pair: _read(workspace, *pair), folders.items()):
            found.stored[item.id] = item
    return found


def _read(workspace: Workspace, id: Name, files: dict[str, File]) -> Stored:
    uri = workspace.artefact_uri(*id)
    if MANIFEST not in files:
        return Stored(*id, uri, files, None, f"has no {MANIFEST}")
    try:
        artefact = Artefact(uri=uri, **json.loads(_bytes(workspace, join_uri(uri, MANIFEST))))
        if not all(
            isinstance(entry["sha256"], str) and isinstance(entry["bytes"], int) for entry in artefact.files.values()
        ):
            raise TypeError
    except (ValueError, TypeError, KeyError, AttributeError):
        return Stored(*id, uri, files, None, f"{MANIFEST} cannot be read as a manifest")
    return Stored(*id, uri, files, artefact)


def _bytes(workspace: Workspace, uri: str) -> bytes:
    try:
        return (remote.read_bytes(uri) if workspace.remote else local_path(uri).read_bytes()) or b""
    except FileNotFoundError:  # removed since it was listed
        return b""
    except PermissionError as error:
        raise StorageError(f"{uri}: cannot be read ({error.strerror})") from error
