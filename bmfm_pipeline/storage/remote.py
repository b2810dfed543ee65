"""Remote objects: list, read, write; transient failures are tried again, the others are said in words.

Credentials and endpoint come from the usual AWS environment (AWS_ACCESS_KEY_ID, AWS_PROFILE, AWS_ENDPOINT_URL_S3 ...). fsspec and
s3fs are loaded only when an address is remote.
"""

import contextlib
import json
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from bmfm_pipeline.errors import ConfigError, StorageError
from bmfm_pipeline.storage.failures import RemoteError, code_of, endpoint, in_words, is_transient, reason, tells_secrets
from bmfm_pipeline.storage.uris import is_remote, join_uri, local_path, strip_userinfo

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

_FIRST_WAIT, _LONGEST_WAIT = 0.25, 20.0
_OPTIONS = {
    # One attempt in every library below, so that `attempt` alone decides what is tried again, and counts it.
    "config_kwargs": {"retries": {"total_max_attempts": 1}, "connect_timeout": 10, "read_timeout": 60},
    "use_listings_cache": False,
    "skip_instance_cache": True,
}
_filesystems: dict[tuple, Any] = {}
_lock = threading.Lock()
_retries = 0


@dataclass(frozen=True)
class RemoteObject:
    """One object: its name below the address that was asked for ('' when it is that address itself), size and version.

    `modified` is when it was written, in seconds since the epoch, 0 where the store does not say.
    """

    name: str
    size: int
    etag: str
    uri: str
    modified: float = 0.0


def filesystem(uri: str):
    """(fsspec file system, path inside it)."""
    return _filesystem(str(uri))


def _filesystem(uri: str, **how):
    import fsspec

    scheme = uri.split("://", 1)[0]
    # Credentials or an endpoint that change in the environment need another file system, which fsspec does not notice.
    key = (
        scheme,
        os.getpid(),
        *how,
        *sorted((name, value) for name, value in os.environ.items() if name[:4] == "AWS_"),
    )
    try:
        with _lock:
            if key not in _filesystems:
                fs = fsspec.filesystem(scheme, **(_OPTIONS if scheme == "s3" else {}), **how)
                if scheme == "s3":
                    fs.retries = 1
                _filesystems[key] = fs
        return _filesystems[key], _filesystems[key]._strip_protocol(uri)
    except (ImportError, ValueError) as error:
        raise StorageError(f"{strip_userinfo(uri)}: cannot be opened: {error}") from error


def open_zarr(uri: str):
    """The zarr group at `uri`, local or remote, for reading; StorageError when there is none."""
    import zarr

    def opened():
        if not is_remote(uri):
            return zarr.open_group(str(local_path(uri)), mode="r")
        fs, path = _filesystem(str(uri), asynchronous=True)
        return zarr.open_group(zarr.storage.FsspecStore(fs, path=path, read_only=True), mode="r")

    try:
        return attempt(uri, opened)
    except FileNotFoundError:
        raise StorageError(
            f"{strip_userinfo(str(uri))}: no zarr group lies there; write one with anndata's `adata.write_zarr(...)`"
        ) from None


def attempts_allowed() -> int:
    """How often a remote call is tried in all: $BMFM_RETRIES + 1."""
    text = os.environ.get("BMFM_RETRIES", "5")
    if not text.isdigit():
        raise ConfigError(f"BMFM_RETRIES must be a whole number of at least 0, found '{text}'")
    return int(text) + 1


def retries_made() -> int:
    """How many remote calls of this process had to be tried again so far."""
    return _retries


def attempt(uri: str, call: Callable[[], Result], doing: str = "read") -> Result:
    """`call()`, tried again with exponential backoff after transient failures only; every retry is logged.

    FileNotFoundError and FileExistsError pass; every other failure becomes a RemoteError that says what to set.
    """
    global _retries
    allowed = attempts_allowed()
    for number in range(1, allowed + 1):
        try:
            return call()
        except (FileNotFoundError, FileExistsError, StorageError):
            raise
        except Exception as error:  # botocore, aiohttp and OS errors share no base class
            if not is_transient(error) or number == allowed:
                # A traceback prints the cause too.
                raise in_words(error, uri, doing, number) from (None if tells_secrets(error) else error)
            wait = min(_FIRST_WAIT * 2 ** (number - 1), _LONGEST_WAIT) * random.uniform(0.75, 1.25)
            with _lock:
                _retries += 1
            logger.warning(
                "%s: %s; retry %d of %d in %.1f s", strip_userinfo(str(uri)), reason(error), number, allowed - 1, wait
            )
            time.sleep(wait)
    raise AssertionError  # pragma: no cover


def _object(info: dict[str, Any], name: str, uri: str) -> RemoteObject:
    version = info.get("ETag") or info.get("VersionId") or info.get("created") or info.get("LastModified") or ""
    when = info.get("LastModified") or info.get("created")
    modified = when.timestamp() if hasattr(when, "timestamp") else 0.0
    return RemoteObject(name, int(info.get("size") or 0), str(version).strip('"'), uri, modified)


def objects_at(uri: str) -> list[RemoteObject]:
    """The object at `uri` (name ''), or all objects below `uri`/, sorted by name. StorageError when there is nothing."""
    uri = str(uri).rstrip("/")
    fs, path = filesystem(uri)

    def listed() -> list[RemoteObject]:
        with contextlib.suppress(FileNotFoundError):
            info = fs.info(path)
            if info["type"] == "file":
                return [_object(info, "", uri)]
        found = fs.find(path, detail=True)
        return [
            _object(info, file[len(path) :].lstrip("/"), join_uri(uri, file[len(path) :]))
            for file, info in sorted(found.items())
            if info["type"] == "file" and file != path and not file.endswith("/")
        ]

    try:
        found = attempt(uri, listed)
    except FileNotFoundError:
        found = []
    if not found:
        raise missing(uri)
    return found


def missing(uri: str) -> StorageError:
    """The error for an address where nothing lies: says whether the bucket or the key is what is missing."""
    shown = strip_userinfo(uri)
    if str(uri).startswith("s3://"):
        fs, path = filesystem(uri)
        bucket = path.split("/", 1)[0]
        try:
            attempt(uri, lambda: fs.info(bucket))
        except FileNotFoundError:
            return StorageError(
                f"{shown}: does not exist: there is no bucket '{bucket}' at {endpoint()}; correct the name, or set AWS_ENDPOINT_URL_S3"
            )
    return StorageError(f"{shown}: does not exist; correct the address, or upload the file")


def folder_names(uri: str) -> list[str]:
    """Names of what lies directly below `uri`, sorted; none when nothing does."""
    fs, path = filesystem(uri)
    try:
        return sorted(entry.rstrip("/").rsplit("/", 1)[-1] for entry in attempt(uri, lambda: fs.ls(path, detail=False)))
    except FileNotFoundError:
        return []


def exists(uri: str | os.PathLike) -> bool:
    """Whether a file, folder, object, or anything below it, lies at `uri`, local or remote."""
    if not is_remote(uri):
        return local_path(uri).exists()
    fs, path = filesystem(uri)
    return bool(attempt(uri, lambda: fs.exists(path)))


def describe(uri: str) -> RemoteObject | None:
    """The object at `uri`, or None when there is none."""
    fs, path = filesystem(uri)
    try:
        info = attempt(uri, lambda: fs.info(path))
    except FileNotFoundError:
        return None
    return _object(info, "", str(uri)) if info["type"] == "file" else None


def read_bytes(uri: str) -> bytes | None:
    """The whole object, or None when there is none."""
    fs, path = filesystem(uri)
    try:
        return attempt(uri, lambda: fs.cat_file(path))
    except FileNotFoundError:
        return None


def read_blocks(uri: str, size: int) -> Iterator[bytes]:
    """The object at `uri` in blocks of `size` bytes. Raises FileNotFoundError when there is none."""
    fs, path = filesystem(uri)
    total = int(attempt(uri, lambda: fs.info(path))["size"] or 0)
    for start in range(0, total, size):
        yield attempt(uri, lambda start=start: fs.cat_file(path, start=start, end=min(total, start + size)))


def remove(uri: str) -> None:
    """Delete one object; one that is not there is no error."""
    fs, path = filesystem(uri)
    with contextlib.suppress(FileNotFoundError):
        attempt(uri, lambda: fs.rm_file(path), "delete")


def copy(source: str, target: str) -> None:
    """Copy one object to another place of the same store, inside the store."""
    fs, path = filesystem(source)
    attempt(source, lambda: fs.cp_file(path, filesystem(target)[1]), "copy")


def write_json(uri: str, value: Any) -> None:
    """Put a small JSON object at `uri`."""
    fs, path = filesystem(uri)
    attempt(uri, lambda: fs.pipe_file(path, (json.dumps(value, indent=1) + "\n").encode()), "write")


def upload(source: Path, uri: str, *, new: bool = False) -> None:
    """Put a local file at `uri`; readers see the old object or the whole new one, never a part.

    new: FileExistsError when an object is there already, also when another process puts it there meanwhile.
    """
    fs, path = filesystem(uri)
    exclusive = new and str(uri).startswith("s3://")
    if new and not exclusive and exists(uri):
        raise FileExistsError(uri)
    try:
        attempt(uri, lambda: fs.put_file(str(source), path, **({"mode": "create"} if exclusive else {})), "write")
    except FileNotFoundError as error:
        if not Path(source).exists():
            raise
        raise missing(uri) from error
    except RemoteError as error:
        if not (exclusive and code_of(error) in ("NotImplemented", "501")):
            raise
        if exists(uri):  # a server without conditional writes
            raise FileExistsError(uri) from error
        upload(source, uri)


@dataclass(frozen=True)
class PendingUpload:
    """A large object whose upload was begun and not ended: its parts cost room and are seen by no reader."""

    uri: str
    id: str
    began: float


def pending_uploads(uri: str) -> list[PendingUpload]:
    """Unfinished uploads below `uri`; none where the store cannot list them, or this account may not."""
    if not str(uri).startswith("s3://"):
        return []
    fs, path = filesystem(uri)
    bucket, prefix, _ = fs.split_path(path)
    asked, found = {"Bucket": bucket, "Prefix": f"{prefix}/" if prefix else ""}, []
    try:
        while True:
            page = attempt(uri, lambda asked=asked: fs.call_s3("list_multipart_uploads", **asked))
            for entry in page.get("Uploads") or []:
                found.append(
                    PendingUpload(f"s3://{bucket}/{entry['Key']}", entry["UploadId"], entry["Initiated"].timestamp())
                )
            if not page.get("IsTruncated"):
                return found
            asked |= {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}
    except (FileNotFoundError, RemoteError) as error:
        logger.debug("%s: unfinished uploads cannot be listed: %s", strip_userinfo(uri), error)
        return []


def abort_upload(uri: str, id: str) -> None:
    """Drop the parts of an unfinished upload."""
    fs, path = filesystem(uri)
    bucket, key, _ = fs.split_path(path)
    with contextlib.suppress(FileNotFoundError):
        attempt(uri, lambda: fs.call_s3("abort_multipart_upload", Bucket=bucket, Key=key, UploadId=id), "delete")


def check_writable(uri: str) -> None:
    """Write and delete an empty object below `uri`; RemoteError or StorageError when that is refused."""
    probe = join_uri(uri, ".bmfm-write-check")
    fs, path = filesystem(probe)
    try:
        attempt(probe, lambda: fs.pipe_file(path, b""), "write")
    except FileNotFoundError:
        raise missing(uri) from None
    with contextlib.suppress(RemoteError):  # an account that may write but not delete
        remove(probe)
