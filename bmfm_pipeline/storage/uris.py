"""Local paths and s3:// addresses behind one spelling: what an address is, without touching what lies there."""

import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from bmfm_pipeline.errors import StorageError

REMOTE_SCHEMES = ("s3", "memory")
_WILDCARDS = re.compile(r"[*?\[]")
# An absolute path or an address that begins a text or follows a space, a bracket, a quotation mark, = or :.
_PLACE = re.compile(r"(?:^|(?<=[\s('\"=:]))(?:~?/|[A-Za-z]:[\\/]|[A-Za-z][A-Za-z0-9+.-]*://)[^\s'\",;()]+")


def is_remote(uri: str | os.PathLike) -> bool:
    """True for an address that needs a network file system; `file://` and plain paths are local."""
    scheme = str(uri).split("://", 1)[0] if "://" in str(uri) else ""
    if scheme and scheme not in (*REMOTE_SCHEMES, "file"):
        raise StorageError(
            f"{strip_userinfo(str(uri))}: scheme '{scheme}' is not supported; use a local path or s3://bucket/key"
        )
    return scheme in REMOTE_SCHEMES


def local_path(uri: str | os.PathLike) -> Path:
    """The absolute local path behind a plain path or a file:// address."""
    text = str(uri)
    return Path(text[len("file://") :] if text.startswith("file://") else text).expanduser().absolute()


def is_pattern(uri: str | os.PathLike) -> bool:
    """Whether a path has wildcards, so that it may stand for several files."""
    return bool(_WILDCARDS.search(str(uri)))


def join_uri(base: str, *parts: str) -> str:
    return "/".join([str(base).rstrip("/"), *(part.strip("/") for part in parts)])


def strip_userinfo(uri: str) -> str:
    """`uri` without a user name and password, for logs, manifests and MLflow."""
    if "://" not in uri or "@" not in uri:
        return uri
    parts = urlsplit(uri)
    host = parts.netloc.rsplit("@", 1)[-1]
    return urlunsplit((parts.scheme, host, parts.path, parts.query, parts.fragment))


def without_places(value: Any) -> Any:
    """A copy of nested dictionaries and lists whose texts tell no place of this machine: of paths and addresses the last part is left."""
    if isinstance(value, dict):
        return {key: without_places(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [without_places(entry) for entry in value]
    return _PLACE.sub(_last_part, value) if isinstance(value, str) else value


def _last_part(found: re.Match) -> str:
    text = found[0].split("?")[0].rstrip("/\\")
    return re.split(r"[/\\]", text)[-1]
