"""One writer at a time, on a run folder or a file of this machine."""

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from bmfm_pipeline.storage.files import disk_errors


@contextlib.contextmanager
def exclusive(folder: Path, on_wait: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold `folder`/.lock; waits for another process that holds it, saying so once. The kernel frees it when a holder dies."""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if on_wait:
                on_wait(f"waiting for another process that works in {folder}")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def exclusive_file(target: Path, on_wait: Callable[[str], None] | None = None) -> Iterator[None]:
    """One process at a time works on `target`; waits for another one, saying so once. The lock file beside it is removed at the end."""
    lock = target.with_name(f".{target.name}.lock")
    said = False
    while True:
        with disk_errors(lock):
            lock.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if on_wait and not said:
                on_wait(f"waiting for another process that works on {target}")
                said = True
            fcntl.flock(handle, fcntl.LOCK_EX)
        # The holder before removed the file it held: a lock on a removed file guards nothing.
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(handle).st_ino == os.stat(lock).st_ino:
                break
        os.close(handle)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(handle)
