"""Results that a person wants at an s3:// address: written on this machine, then uploaded whole."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bmfm_pipeline.storage import Workspace, check_allowed, hash_bytes, is_remote, join_uri, local_path, strip_userinfo
from bmfm_pipeline.storage.remote import check_writable, upload


def written_to(output: str | Path, place: Workspace, write: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """What `write(folder)` returns, with its files at `output`: a local folder, or s3://bucket/prefix.

    A remote place gets the files when all are written; until then they lie in the workspace's state, where the same call goes on after it
    was stopped. Addresses in the answer are those of `output`. Raises StorageError when nothing can be written there.
    """
    check_allowed(output, "--output")
    if not is_remote(output):
        return write(local_path(output))
    output = str(output).rstrip("/")
    check_writable(output)
    folder = place.state_dir / "outputs" / hash_bytes(output.encode())[:32]
    found = write(folder)
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = file.relative_to(folder).as_posix()
        if not any(part.startswith(".") for part in name.split("/")):
            upload(file, join_uri(output, name))
    shutil.rmtree(folder, ignore_errors=True)
    return _moved(found, str(folder), strip_userinfo(output))


def _moved(value: Any, folder: str, output: str) -> Any:
    """`value` with every path below `folder` as an address below `output`."""
    if isinstance(value, dict):
        return {name: _moved(entry, folder, output) for name, entry in value.items()}
    if isinstance(value, list):
        return [_moved(entry, folder, output) for entry in value]
    if isinstance(value, str) and (value == folder or value.startswith(folder + "/")):
        return output + value[len(folder) :]
    return value
