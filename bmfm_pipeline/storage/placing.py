"""Copies at places that a user names, local or remote: whole or not at all, and never over something else."""

from pathlib import Path

from bmfm_pipeline.errors import StorageError
from bmfm_pipeline.storage.cache import localise
from bmfm_pipeline.storage.files import copy_atomic
from bmfm_pipeline.storage.hashing import hash_file
from bmfm_pipeline.storage.remote import describe, upload
from bmfm_pipeline.storage.transfer import etag_fits
from bmfm_pipeline.storage.uris import is_remote, local_path, strip_userinfo


def same_content(file: Path, uri: str) -> bool | None:
    """Whether `uri` holds the bytes of a local file; None when nothing is there."""
    if not is_remote(uri):
        there = local_path(uri)
        if not there.exists():
            return None
        return there.stat().st_size == file.stat().st_size and hash_file(there) == hash_file(file)
    found = describe(uri)
    if found is None:
        return None
    if found.size != file.stat().st_size:
        return False
    # A fitting ETag proves that the content is the same, one that does not fit proves nothing: it may be no MD5.
    return etag_fits(file, found.etag) or hash_file(localise(uri)) == hash_file(file)


def place_copy(file: Path, uri: str) -> bool:
    """Copy a local file to `uri` unless it is there; True when it was copied.

    Whatever lies there already stays: StorageError when it has other content.
    """
    same = same_content(file, uri)
    if same is None:
        try:
            if is_remote(uri):
                upload(file, uri, new=True)
            else:
                copy_atomic(file, local_path(uri))
            return True
        except FileExistsError:  # someone else was faster
            same = same_content(file, uri)
    if not same:
        raise other_content(uri)
    return False


def other_content(uri: str) -> StorageError:
    return StorageError(
        f"{strip_userinfo(uri)}: exists with other content and is not overwritten; move it away, name another path, or use it as it is "
        "with data_module.transform_datasets=false"
    )
