"""Taking away what lies in a workspace: first out of sight in one step, then byte by byte."""

import contextlib
import os
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bmfm_pipeline.storage import remote
from bmfm_pipeline.storage.cache import MANIFEST
from bmfm_pipeline.storage.files import disk_errors
from bmfm_pipeline.storage.uris import join_uri, local_path
from bmfm_pipeline.storage.workspace import Workspace

_AT_ONCE = 8


def trash_folder(place: Path) -> Path:
    """Where local folders wait, out of sight of every reader, while they are deleted."""
    return place / ".trash"


def delete_stored(workspace: Workspace, uri: str, files: Iterable[str]) -> None:
    """Delete a folder below the workspace. Local: one rename, then its files. s3: the manifest first, without which it is nothing."""
    if not workspace.remote:
        delete_folder(local_path(uri), Path(workspace.uri))
        return
    remote.remove(join_uri(uri, MANIFEST))
    _each(lambda name: remote.remove(join_uri(uri, name)), files)


def delete_folder(path: Path, place: Path) -> None:
    """Delete a local folder on the disk of `place`; nobody sees a part of it."""
    aside = trash_folder(place) / f"{path.parent.name}-{path.name}-{os.getpid()}"
    with disk_errors(path):
        aside.parent.mkdir(exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            os.rename(path, aside)
        shutil.rmtree(aside, ignore_errors=True)
        with contextlib.suppress(OSError):  # something else waits there
            aside.parent.rmdir()


def _each(act, names: Iterable[str]) -> None:
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for _ in pool.map(act, names):
            pass
