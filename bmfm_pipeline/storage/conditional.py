"""Small JSON objects that several machines write: read with version and age, written only over the version that was read."""

import email.utils
import json
from dataclasses import dataclass
from typing import Any

from bmfm_pipeline.storage import remote
from bmfm_pipeline.storage.failures import RemoteError, code_of

_CHANGED = ("PreconditionFailed", "412")
_UNKNOWN = ("NotImplemented", "501")
_LOOKS = 5


@dataclass(frozen=True)
class Versioned:
    """An object as it was read: its value, its version, and how long ago it was written, in seconds by the clock of the store."""

    value: dict[str, Any]
    etag: str
    age: float = 0.0


def read_versioned(uri: str) -> Versioned | None:
    """The object at `uri`; None when there is none. What is no JSON object reads as {}. Raises RemoteError."""
    for _ in range(_LOOKS):
        before = _head(uri)
        if before is None:
            return None
        data = remote.read_bytes(uri)
        if data is not None and (now := _head(uri)) is not None and now[0] == before[0]:
            return Versioned(_parsed(data), *now)
    raise RemoteError(f"{uri}: is written so often that it cannot be read; run the same command again")


def write_over(uri: str, value: dict[str, Any], etag: str | None) -> str:
    """Write `value` over the version `etag` (None: where nothing lies); the new version.

    Raises FileExistsError when another process wrote meanwhile. A store without conditional writes is asked before instead, which leaves
    a moment in which two may both write.
    """
    if not uri.startswith("s3://"):
        return _write_after_looking(uri, value, etag)
    fs, path = remote.filesystem(uri)
    bucket, key, _ = fs.split_path(path)
    condition = {"IfMatch": f'"{etag}"'} if etag else {"IfNoneMatch": "*"}
    body = _bytes(value)
    try:
        answer = remote.attempt(
            uri, lambda: fs.call_s3("put_object", Bucket=bucket, Key=key, Body=body, **condition), "write"
        )
        return str(answer["ETag"]).strip('"')
    except (FileExistsError, FileNotFoundError):
        pass
    except RemoteError as error:
        if code_of(error) in _UNKNOWN:
            return _write_after_looking(uri, value, etag)
        if code_of(error) not in _CHANGED:
            raise
    now = read_versioned(uri)
    if now is not None and now.value == value:  # it arrived, and only the answer was lost
        return now.etag
    raise FileExistsError(uri)


def _write_after_looking(uri: str, value: dict[str, Any], etag: str | None) -> str:
    now = read_versioned(uri)
    if (None if now is None else now.etag) != etag:
        raise FileExistsError(uri)
    fs, path = remote.filesystem(uri)
    remote.attempt(uri, lambda: fs.pipe_file(path, _bytes(value)), "write")
    written = _head(uri)
    return written[0] if written else ""


def _head(uri: str) -> tuple[str, float] | None:
    """(version, age)."""
    if not uri.startswith("s3://"):
        found = remote.describe(uri)
        return None if found is None else (found.etag, 0.0)
    fs, path = remote.filesystem(uri)
    bucket, key, _ = fs.split_path(path)
    try:
        head = remote.attempt(uri, lambda: fs.call_s3("head_object", Bucket=bucket, Key=key))
    except FileNotFoundError:
        return None
    said = head.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date", "")
    try:
        age = email.utils.parsedate_to_datetime(said).timestamp() - head["LastModified"].timestamp()
    except (KeyError, TypeError, ValueError):  # no clock of the store
        age = 0.0
    return str(head["ETag"]).strip('"'), max(0.0, age)


def _bytes(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def _parsed(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
