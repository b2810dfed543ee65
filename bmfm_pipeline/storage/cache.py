"""Local copies of remote files and folders, shared by processes and bounded: what was used least recently goes first.

An entry is one version of one address: `objects/<hash>/` with `data/NAME` (the copy, read-only), `entry.json`, and `use.lock`, which
every process that was given the copy holds until it ends, so that nothing in use is removed. What was made from other content, such as
a model from a checkpoint, lies beside them under the name of its kind, and counts as well: `KIND/<hash>/VERSION/`, with the same notes.
"""

import contextlib
import fcntl
import json
import logging
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bmfm_pipeline.errors import ConfigError, StorageError
from bmfm_pipeline.storage.failures import RemoteError
from bmfm_pipeline.storage.files import check_room, disk_errors, write_json_atomic
from bmfm_pipeline.storage.hashing import hash_json
from bmfm_pipeline.storage.locks import exclusive
from bmfm_pipeline.storage.remote import RemoteObject, objects_at, read_bytes, retries_made
from bmfm_pipeline.storage.transfer import ObjectChanged, fetch_object, is_whole
from bmfm_pipeline.storage.uris import is_remote, local_path, strip_userinfo

logger = logging.getLogger(__name__)
MANIFEST = "artefact.json"
KINDS = ("objects", "converted")
_DEFAULT_SIZE = "50GB"
_ELSEWHERE = "BMFM_CACHE_DIR"
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_held: dict[Path, int] = {}
_held_lock = threading.Lock()


def cache_dir() -> Path:
    """Where copies lie: $BMFM_CACHE_DIR, else $BMFM_STATE/cache, else the user's cache folder."""
    if chosen := os.environ.get("BMFM_CACHE_DIR"):
        return local_path(chosen)
    if state := os.environ.get("BMFM_STATE"):
        return local_path(state) / "cache"
    return local_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "bmfm"


def cache_limit() -> int:
    """The most bytes that copies may take: $BMFM_CACHE_SIZE, e.g. 50GB, 800 MB, 2TiB."""
    text = os.environ.get("BMFM_CACHE_SIZE") or _DEFAULT_SIZE
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    if not found or found[2] not in _UNITS:
        raise ConfigError(f"BMFM_CACHE_SIZE: '{text}' is not a size; write for example 50GB")
    return int(float(found[1]) * _UNITS[found[2]])


def localise(uri: str | os.PathLike, sha256: str | None = None) -> Path:
    """A local file or folder with the content of `uri`: the path itself when local, else a read-only copy in the cache.

    The newest version is looked up each time, and downloaded when it is not there yet; an artefact's files are checked against
    its manifest, a remote file against `sha256` where that is given. Raises StorageError when nothing lies there, when it does not fit, or (RemoteError) the store cannot be reached.
    """
    if not is_remote(uri):
        return local_path(uri)
    uri = str(uri).rstrip("/")
    for _ in range(3):
        objects, expected = _what_lies_at(uri)
        try:
            return _Entry(uri, objects).copy(expected if sha256 is None else {"": sha256})
        except ObjectChanged:
            logger.warning("%s: changed while it was fetched; starting anew", strip_userinfo(uri))
    raise StorageError(
        f"{strip_userinfo(uri)}: changed again and again while it was fetched; wait until it is complete"
    )


def adopt(folder: Path, uri: str) -> None:
    """Make `folder`, whose content was just uploaded to `uri`, the cached copy of it; removed when it does not fit."""
    try:
        objects, _ = _what_lies_at(uri)
        _Entry(uri, objects).take(folder)
    except (StorageError, OSError) as error:
        logger.debug("%s: not kept in the cache: %s", uri, error)
    shutil.rmtree(folder, ignore_errors=True)


def made_once(kind: str, key: str, version: str, source: str, make: Callable[[Path], object]) -> Path:
    """The folder that `make` fills from the content `key`: made when it is not in the cache in this `version`, and held by this process.

    kind: one of KINDS. Other versions of it are removed. It counts towards $BMFM_CACHE_SIZE; what was used least recently makes room for it.
    """
    root = cache_dir()
    folder = root / kind / key
    target = folder / version
    with disk_errors(folder, _ELSEWHERE):
        folder.mkdir(parents=True, exist_ok=True)
    with exclusive(root):
        folder.mkdir(exist_ok=True)
        _hold(folder)
    with exclusive(folder):
        if target.is_dir() and "size" in _read_entry(folder):
            os.utime(folder / "entry.json")
            return target
        with disk_errors(folder, _ELSEWHERE):
            if not target.is_dir():
                for old in folder.iterdir():
                    if old.is_dir():
                        shutil.rmtree(old)
                staging = Path(tempfile.mkdtemp(dir=folder))
                try:
                    make(staging)
                    staging.chmod(0o755)
                    os.replace(staging, target)
                except BaseException:
                    shutil.rmtree(staging, ignore_errors=True)
                    raise
            size = _size_of(folder)
            write_json_atomic(folder / "entry.json", {"uri": strip_userinfo(source), "size": size, "complete": True})
    with exclusive(root):
        _shrink(root, cache_limit(), keep=folder)
    return target


def _size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _what_lies_at(uri: str) -> tuple[list[RemoteObject], dict[str, str]]:
    """The objects to copy, and the sha256 of those that are known by one."""
    objects = objects_at(uri)
    if strange := [item.name for item in objects if {".", ".."} & set(item.name.split("/"))]:
        raise StorageError(
            f"{strip_userinfo(uri)}: holds '{strange[0]}', which is no name for a file; rename that object"
        )
    names = {item.name: item for item in objects}
    if MANIFEST not in names:
        return objects, {}
    try:
        files = json.loads(read_bytes(names[MANIFEST].uri) or b"")["files"]
        expected = {name: entry["sha256"] for name, entry in files.items()}
        sizes = {name: entry["bytes"] for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise StorageError(
            f"{strip_userinfo(names[MANIFEST].uri)}: is no manifest; delete the folder and make it again"
        ) from None
    for name, size in sizes.items():
        if name not in names or names[name].size != size:
            raise StorageError(
                f"{strip_userinfo(uri)}: the artefact is incomplete or damaged: {name} is missing or has another size; "
                "run the stage that made it again"
            )
    return [item for item in objects if item.name in expected or item.name == MANIFEST], expected


class _Entry:
    """One version of one address in the cache."""

    def __init__(self, uri: str, objects: list[RemoteObject]):
        self.uri, self.objects = uri, objects
        self.size = sum(item.size for item in objects)
        self.root = cache_dir()
        key = hash_json([uri, [[item.name, item.size, item.etag] for item in objects]])[:32]
        self.folder = self.root / "objects" / key
        self.target = self.folder / "data" / uri.rsplit("/", 1)[-1]

    def copy(self, expected: dict[str, str]) -> Path:
        """The path of the copy, fetched when it is not complete."""
        self._reserve()
        shown = strip_userinfo(self.uri)
        with exclusive(
            self.folder, on_wait=lambda _: logger.info("%s: another process is fetching it; waiting", shown)
        ):
            if not self._is_complete():
                logger.info("%s: fetching %s into %s", shown, in_words(self.size), self.root)
                before = retries_made()
                self._fetch(expected)
                if retried := retries_made() - before:
                    logger.warning("%s: complete after %d retries", shown, retried)
        return self.target

    def take(self, folder: Path) -> None:
        """Move a finished folder in as the copy."""
        self._reserve()
        with exclusive(self.folder):
            if not self._is_complete():
                self._finish(lambda place: shutil.move(folder, place))

    def _fetch(self, expected: dict[str, str]) -> None:
        partial = self.folder / "part"
        missing = self.size - sum(file.stat().st_blocks * 512 for file in partial.rglob("*") if file.is_file())
        check_room(self.folder, max(missing, 1), _ELSEWHERE)
        for item in self.objects:
            place = partial / "copy" / item.name if item.name else partial / "copy"
            if not is_whole(place):
                fetch_object(item, place, expected.get(item.name))
        self._finish(lambda place: os.replace(partial / "copy", place))

    def _finish(self, put: Callable[[Path], object]) -> None:
        with disk_errors(self.folder, _ELSEWHERE):
            shutil.rmtree(self.folder / "data", ignore_errors=True)  # damaged, or it would have been used
            self.target.parent.mkdir()
            put(self.target)
            for file in [self.target, *self.target.rglob("*")]:
                if file.is_file():
                    file.chmod(0o444)
            shutil.rmtree(self.folder / "part", ignore_errors=True)
            self._note(complete=True)

    def _note(self, complete: bool) -> None:
        entry = {"uri": strip_userinfo(self.uri), "size": self.size, "complete": complete}
        write_json_atomic(self.folder / "entry.json", entry)

    def _is_complete(self) -> bool:
        if not _read_entry(self.folder).get("complete"):
            return False
        files = [(self.target / item.name if item.name else self.target, item.size) for item in self.objects]
        return all(file.is_file() and file.stat().st_size == size for file, size in files)

    def _reserve(self) -> None:
        """Hold the entry, and make room for it, before anything is fetched."""
        with disk_errors(self.root, _ELSEWHERE):
            self.root.mkdir(parents=True, exist_ok=True)
        with exclusive(self.root), disk_errors(self.folder, _ELSEWHERE):
            self.folder.mkdir(parents=True, exist_ok=True)
            _hold(self.folder)
            if "size" in _read_entry(self.folder):
                os.utime(self.folder / "entry.json")
                return
            limit = cache_limit()
            used = _shrink(self.root, limit - self.size, keep=self.folder)
            if used + self.size > limit:
                _let_go(self.folder)
                shutil.rmtree(self.folder, ignore_errors=True)
                raise RemoteError(
                    f"{strip_userinfo(self.uri)}: {in_words(self.size)} do not fit into the cache {self.root}: it may take "
                    f"{in_words(limit)}, of which {in_words(used)} are in use; set BMFM_CACHE_SIZE (or BMFM_CACHE_DIR, to another disk)"
                )
            self._note(complete=False)


def _hold(folder: Path) -> None:
    """Say that this process uses an entry, until it ends or lets go of it."""
    with _held_lock:
        known = _held.get(folder)
        if known is not None:
            if _same_file(known, folder / "use.lock"):
                return
            os.close(known)
        handle = os.open(folder / "use.lock", os.O_RDWR | os.O_CREAT, 0o666)
        fcntl.flock(handle, fcntl.LOCK_SH)
        _held[folder] = handle


def _let_go(folder: Path) -> None:
    with _held_lock:
        if (handle := _held.pop(folder, None)) is not None:
            os.close(handle)


def _same_file(handle: int, path: Path) -> bool:
    try:
        there, open_file = path.stat(), os.fstat(handle)
    except OSError:
        return False
    return (there.st_dev, there.st_ino) == (open_file.st_dev, open_file.st_ino)


def release_copies() -> None:
    """Let go of every copy this process was given: they may be removed to make room. For processes that live on."""
    with _held_lock:
        for handle in _held.values():
            os.close(handle)
        _held.clear()


def _read_entry(folder: Path) -> dict:
    try:
        return json.loads((folder / "entry.json").read_text())
    except (OSError, ValueError):
        return {}


@dataclass(frozen=True)
class CacheEntry:
    """One entry: its folder, what it is a copy of, its bytes, and when it was used last, in seconds since the epoch (0: unknown)."""

    folder: Path
    source: str
    size: int
    used: float


def entries(root: Path) -> list[CacheEntry]:
    """All entries of a cache, least recently used first."""
    found = []
    for kind in KINDS:
        for folder in (root / kind).iterdir() if (root / kind).is_dir() else ():
            note, known = folder / "entry.json", _read_entry(folder)
            with contextlib.suppress(OSError):
                used = note.stat().st_mtime if note.exists() else 0.0
                size = int(known["size"]) if "size" in known else _size_of(folder)
                found.append(CacheEntry(folder, str(known.get("uri", kind)), size, used))
    return sorted(found, key=lambda entry: (entry.used, str(entry.folder)))


def _shrink(root: Path, limit: int, keep: Path) -> int:
    """Remove entries that nobody holds, least recently used first, until at most `limit` bytes are left; returns what is left."""
    found = entries(root)
    total = sum(entry.size for entry in found)
    for entry in found:
        folder, size = entry.folder, entry.size
        if total <= limit:
            break
        if folder != keep and remove_unused(folder):
            logger.info("%s: removed from the cache to make room (%s)", folder, in_words(size))
            total -= size
    return total


def remove_unused(folder: Path) -> bool:
    """Remove an entry that no process holds; whether it is gone. Call with the cache's own folder held (`exclusive`)."""
    try:
        handle = os.open(folder / "use.lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
        return not folder.exists()
    except BlockingIOError:
        return False
    finally:
        os.close(handle)


def in_words(size: int) -> str:
    """A number of bytes for a person."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size} bytes"
