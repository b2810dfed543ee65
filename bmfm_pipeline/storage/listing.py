"""What lies below a folder or an s3:// prefix, with sizes and times, in one pass."""

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bmfm_pipeline.errors import StorageError
from bmfm_pipeline.storage import remote
from bmfm_pipeline.storage.failures import RemoteError
from bmfm_pipeline.storage.uris import is_remote, local_path


@dataclass(frozen=True)
class File:
    """One file: its name below the place that was listed, bytes, version ('' for a local one), and when it was written."""

    name: str
    size: int
    etag: str
    modified: float


def list_files(uri: str) -> list[File]:
    """All files below `uri`, by name; none where nothing lies. Raises RemoteError when a store cannot be reached."""
    if is_remote(uri):
        try:
            objects = remote.objects_at(uri)
        except RemoteError:
            raise
        except StorageError:
            return []
        return [File(item.name, item.size, item.etag, item.modified) for item in objects if item.name]
    root = str(local_path(uri))
    return sorted(_walk(root, len(root) + 1), key=lambda file: file.name)


def _walk(folder: str, cut: int) -> Iterator[File]:
    try:
        entries = list(os.scandir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in entries:
        with contextlib.suppress(FileNotFoundError):
            if entry.is_dir(follow_symlinks=False):
                yield from _walk(entry.path, cut)
            else:
                stat = entry.stat(follow_symlinks=False)
                yield File(entry.path[cut:], stat.st_size, "", stat.st_mtime)


def size_and_time(folder: Path) -> tuple[int, float]:
    """(bytes of the files below `folder`, when the newest of them, or the folder itself, was written)."""
    files = list_files(str(folder))
    try:
        own = folder.stat().st_mtime
    except FileNotFoundError:
        own = time.time()
    return sum(file.size for file in files), max([own, *(file.modified for file in files)])
