"""Local paths and s3:// addresses behind one spelling. fsspec and s3fs are loaded only when an address is remote."""

import os
import shutil
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from bmfm_pipeline.errors import StorageError

REMOTE_SCHEMES = ("s3", "memory")


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


def join_uri(base: str, *parts: str) -> str:
    return "/".join([str(base).rstrip("/"), *(part.strip("/") for part in parts)])


def strip_userinfo(uri: str) -> str:
    """`uri` without a user name and password, for logs, manifests and MLflow."""
    if "://" not in uri or "@" not in uri:
        return uri
    parts = urlsplit(uri)
    host = parts.netloc.rsplit("@", 1)[-1]
    return urlunsplit((parts.scheme, host, parts.path, parts.query, parts.fragment))


def filesystem(uri: str):
    """(fsspec file system, path inside it). Credentials and endpoint come from the usual AWS environment."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(str(uri))
    except (ImportError, ValueError) as error:
        raise StorageError(f"{strip_userinfo(str(uri))}: cannot be opened: {error}") from error


def localise(uri: str, folder: Path) -> Path:
    """A local copy of a file or directory: the path itself when local, else downloaded under `folder` and renamed into place."""
    if not is_remote(uri):
        return local_path(uri)
    target = Path(folder) / str(uri).rstrip("/").rsplit("/", 1)[-1]
    if target.exists():
        return target
    fs, path = filesystem(uri)
    partial = target.with_name(f".{target.name}.{os.getpid()}.part")
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        if fs.isdir(path):
            fs.get(path.rstrip("/") + "/", str(partial) + "/", recursive=True)
        else:
            fs.get(path, str(partial))
    except FileNotFoundError:
        raise StorageError(f"{strip_userinfo(uri)}: does not exist") from None
    except Exception as error:  # botocore, aiohttp and OS errors share no base class
        shutil.rmtree(partial, ignore_errors=True)
        raise StorageError(f"{strip_userinfo(uri)}: download failed: {error}") from error
    os.replace(partial, target)
    return target
