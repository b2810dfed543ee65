"""Content hashes of files, folders and plain values; large inputs are read once and remembered."""

import contextlib
import hashlib
import json
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bmfm_pipeline.errors import StorageError
from bmfm_pipeline.storage.remote import RemoteObject, objects_at, read_bytes
from bmfm_pipeline.storage.uris import is_remote, local_path

_BLOCK = 1 << 20
# Seconds between writes of a memo that many files are looked up in: each waits for the disk.
_WRITE_EVERY = 1.0
# Bytes below which a file is read faster than one write of the memo lasts.
_SMALL = 1 << 20


def hash_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def hash_json(value: Any) -> str:
    """sha256 of the canonical JSON of a plain value: key order and spacing do not matter."""
    return hash_bytes(json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode())


def _stamp(path: Path) -> tuple[int, int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


def hash_file(path: str | Path) -> str:
    """sha256 of a local file; a file that changes while it is read is an error, for its hash would belong to no version."""
    path = Path(path)
    before = _stamp(path)
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    if _stamp(path) != before:
        raise StorageError(f"{path}: changed while it was being read; wait until it is complete and run again")
    return digest.hexdigest()


class ContentMemo:
    """Remembers content hashes by (path, size, mtime, inode), in a small SQLite file shared by processes; of small files only among many."""

    def __init__(self, file: Path | None):
        self.file = file
        self._held: sqlite3.Connection | None = None
        self._pending: list[tuple[str, str, str]] = []
        self._written = 0.0

    def _open(self) -> sqlite3.Connection | None:
        if self.file is None:
            return None
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(self.file, timeout=30)
            connection.execute("CREATE TABLE IF NOT EXISTS hashes (path TEXT PRIMARY KEY, stamp TEXT, sha256 TEXT)")
            return connection
        except (sqlite3.Error, OSError):  # a memo that cannot be kept only costs time
            return None

    @contextlib.contextmanager
    def for_many(self) -> Iterator["ContentMemo"]:
        """While inside, the file is open and written once a second, not once for each of thousands of files."""
        self._held, self._written = self._open(), time.monotonic()
        try:
            yield self
        finally:
            held, self._held = self._held, None
            if held is not None:
                with contextlib.suppress(sqlite3.Error):
                    self._write(held)
                held.close()

    def _write(self, connection: sqlite3.Connection) -> None:
        """All rows in one short transaction: others wait for the file while one is open."""
        rows, self._pending, self._written = self._pending, [], time.monotonic()
        with connection:
            connection.executemany("INSERT OR REPLACE INTO hashes VALUES (?, ?, ?)", rows)

    def hash_anew(self, path: str | Path) -> str:
        """The sha256 of the bytes as they are now: what is remembered is replaced, for a disk can change them and not their date."""
        return self.hash_file(Path(path), anew=True)

    def hash_file(self, path: Path, *, anew: bool = False) -> str:
        path = Path(path).absolute()
        size, *_ = found = _stamp(path)
        connection = self._held or (None if size < _SMALL and not anew else self._open())
        if connection is None:
            return hash_file(path)
        stamp = repr(found)
        try:
            row = connection.execute(
                "SELECT sha256 FROM hashes WHERE path = ? AND stamp = ?", (str(path), stamp)
            ).fetchone()
            if row and not anew:
                return row[0]
            digest = hash_file(path)
            self._pending.append((str(path), stamp, digest))
            if connection is not self._held or time.monotonic() - self._written >= _WRITE_EVERY:
                self._write(connection)
            return digest
        except sqlite3.Error:
            return hash_file(path)
        finally:
            if connection is not self._held:
                connection.close()


def content_hash(uri: str | Path, memo: ContentMemo | None = None) -> str:
    """sha256 of a file's bytes, or of a folder's relative names and bytes. Objects on s3 are told by ETag and size."""
    if is_remote(uri):
        return _remote_hash(str(uri))
    path = local_path(uri)
    one = (memo or ContentMemo(None)).hash_file
    try:
        if path.is_dir():
            return hash_json(
                {str(file.relative_to(path)): one(file) for file in sorted(path.rglob("*")) if file.is_file()}
            )
        return one(path)
    except FileNotFoundError:
        raise StorageError(f"{path}: does not exist") from None
    except PermissionError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror})") from error


def _remote_hash(uri: str) -> str:
    objects = objects_at(uri)
    if not objects[0].name:
        return _remote_file_hash(objects[0])
    return hash_json({item.name: _remote_file_hash(item) for item in objects})


def _remote_file_hash(item: RemoteObject) -> str:
    if item.uri.startswith("s3://"):
        return hash_json([item.etag, item.size])
    return hash_bytes(read_bytes(item.uri) or b"")
