"""Small files written whole or not at all, and the words for a disk that is full or closed to us."""

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bmfm_pipeline.errors import StorageError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextlib.contextmanager
def disk_errors(path: str | os.PathLike, elsewhere: str = "--workspace") -> Iterator[None]:
    """Turn a full disk, a quota, a file size limit or missing permission into a StorageError that names the path.

    elsewhere: what names another place.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise StorageError(
                f"{path}: the disk is full or a file size limit was reached ({error.strerror}); nothing was published. "
                f"Free space, or choose another place with {elsewhere}, and run the same command again: finished stages are reused."
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            raise StorageError(
                f"{path}: not writable ({error.strerror}); choose another place with {elsewhere}"
            ) from error
        raise


def check_room(folder: Path, size: int, elsewhere: str = "--workspace") -> None:
    """StorageError when `size` bytes cannot be written below `folder`: known before the work, and before a library meets it."""
    with disk_errors(folder, elsewhere):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as stream:
            try:
                os.posix_fallocate(stream.fileno(), 0, max(1, size))
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # a file system that cannot tell
                    raise


def fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes_atomic(path: Path, data: bytes) -> None:
    path = Path(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(partial, 0o666 & ~umask)
            os.replace(partial, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(partial)
            raise


def write_text_atomic(path: Path, text: str) -> None:
    write_bytes_atomic(path, text.encode())


def write_json_atomic(path: Path, value: Any) -> None:
    write_bytes_atomic(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def read_json(path: str | os.PathLike) -> Any:
    """Parsed JSON of a local file; a damaged file is a StorageError that names it."""
    try:
        return json.loads(Path(path).read_text())
    except json.JSONDecodeError as error:
        raise StorageError(f"{path}: not valid JSON ({error})") from error


def copy_atomic(source: Path, target: Path) -> None:
    """Copy a file beside its target and rename it there; the target is never seen half written."""
    source, target = Path(source), Path(target)
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{os.getpid()}.part")
        try:
            shutil.copyfile(source, partial)
            with open(partial, "rb") as stream:
                os.fsync(stream.fileno())
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
