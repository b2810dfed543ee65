"""Whether an account may do to a remote place all that a run does there: write, read, list, delete."""

import time
import uuid

from bmfm_pipeline.errors import StorageError
from bmfm_pipeline.storage.remote import attempt, describe, filesystem, missing, read_bytes, remove
from bmfm_pipeline.storage.uris import join_uri, strip_userinfo


def check_round_trip(uri: str) -> float:
    """Write a small object below `uri`, read it back, delete it; returns by how many seconds the store's clock is ahead.

    StorageError says which of these was refused. An object that cannot be deleted stays, and its name is said.
    """
    probe, content = join_uri(uri, f".bmfm-check-{uuid.uuid4().hex}"), uuid.uuid4().hex.encode()
    fs, path = filesystem(probe)
    before = time.time()
    try:
        attempt(probe, lambda: fs.pipe_file(path, content), "write")
    except FileNotFoundError:
        raise missing(uri) from None
    after = time.time()
    try:
        found = describe(probe)
        if read_bytes(probe) != content:
            raise StorageError(
                f"{strip_userinfo(probe)}: was written, and something else was read back; the store, or a cache before it, is not "
                "consistent"
            )
    finally:
        remove(probe)
    if read_bytes(probe) is not None:
        raise StorageError(
            f"{strip_userinfo(probe)}: was deleted, and is still there; the store, or a cache before it, is not consistent"
        )
    written = found.modified if found is not None else 0.0
    # Stores give whole seconds.
    return 0.0 if not written else min(0.0, written + 1 - before) or max(0.0, written - after)
