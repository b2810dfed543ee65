"""One writer at a time on a run folder of this machine."""

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
