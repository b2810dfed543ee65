"""Checkpoint files written whole: data beside its place, a manifest with its hash, then the rename. The newest valid one is resumed."""

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any

from bmfm_pipeline.errors import StorageError, TrainingError
from bmfm_pipeline.storage import hash_file, read_json, write_json_atomic


def save_checkpoint(trainer, path: Path, same_as: Path | None = None, **about) -> None:
    """Save beside `path`, flush, hash, write `path`.json, rename. `same_as` was saved a moment ago: it gets a second name.

    The manifest names the new file and the one it replaces, so that whichever of them is in place when the machine dies is valid.
    A full disk leaves the previous checkpoint as it was. Raises TrainingError.
    """
    partial = path.with_name(f".{path.name}.part")
    try:
        if same_as is None or not _linked(trainer, same_as, partial):
            trainer.save_checkpoint(partial)
        if trainer.is_global_zero:
            entry = {"sha256": hash_file(partial), "step": int(trainer.global_step), **about}
            replaced = _manifest(path) if path.exists() else {}
            if replaced:
                replaced.pop("replaces", None)
                entry["replaces"] = replaced
            write_json_atomic(manifest_of(path), entry)
            os.replace(partial, path)
    except (OSError, RuntimeError, StorageError) as error:
        room = _room(path, partial)
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise TrainingError(
            f"{path}: the checkpoint could not be written ({_first_line(error)}; {room}); "
            f"{'the previous checkpoint is kept' if path.exists() else 'there was none before it'}. Free space and run again to resume"
        ) from error


def write_file(checkpoint: dict[str, Any], path: Path) -> None:
    """torch.save straight into a file that is flushed to the disk: no second copy in memory, none in a temporary folder."""
    import torch

    with open(path, "wb") as stream:
        torch.save(checkpoint, stream)
        stream.flush()
        os.fsync(stream.fileno())


def _linked(trainer, source: Path, path: Path) -> bool:
    """Give a file a second name, which takes neither time nor room; False where file systems cannot."""
    linked = True
    if trainer.is_global_zero:
        try:
            path.unlink(missing_ok=True)
            os.link(source, path)
        except OSError:
            linked = False
    return trainer.strategy.broadcast(linked)


def _room(path: Path, partial: Path) -> str:
    """What a checkpoint takes, as far as that is known, and what its disk has left."""
    sizes = [file.stat().st_size for file in (path, partial) if file.exists()]
    free = shutil.disk_usage(path.parent).free + (partial.stat().st_size if partial.exists() else 0)
    return f"it takes {max(sizes, default=0) / 1e6:.1f} MB or more, and {free / 1e6:.1f} MB are free in {path.parent}"


def _first_line(error: BaseException) -> str:
    """Why it failed, in the words of the system where it has any."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def manifest_of(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _manifest(path: Path) -> dict[str, Any]:
    try:
        found = read_json(manifest_of(path))
    except (OSError, StorageError):  # a damaged manifest is as good as none
        return {}
    return found if isinstance(found, dict) else {}


def valid_entry(path: Path) -> dict[str, Any] | None:
    """What the manifest says about the bytes that are there; None when it knows other ones, or none."""
    if not path.is_file():
        return None
    manifest = _manifest(path)
    entries = [entry for entry in (manifest, manifest.get("replaces")) if entry and "sha256" in entry]
    digest = hash_file(path) if entries else ""
    return next((entry for entry in entries if entry["sha256"] == digest), None)


def newest_valid(folder: Path, report=print) -> Path | None:
    """The valid checkpoint with the most steps; each invalid one met on the way is named to `report`."""
    candidates = []
    for path in folder.glob("*.ckpt"):
        entry = valid_entry(path)
        if entry is None:
            report(f"{path}: incomplete or damaged, not used")
        else:
            candidates.append((entry["step"], path.stat().st_mtime_ns, path))
    return max(candidates)[2] if candidates else None


def remove_checkpoint(path: Path) -> None:
    path.unlink(missing_ok=True)
    manifest_of(path).unlink(missing_ok=True)


def clear_leftovers(folder: Path) -> None:
    """Files that a process left half written when it was killed; only for who holds the lease."""
    for leftover in folder.glob(".*.part"):
        leftover.unlink(missing_ok=True)


def read_place(path: Path) -> dict[str, Any]:
    """Where a checkpoint stands: {step, epoch, batches, validated_step, validation_due, ...}; its tensors are not read."""
    import torch

    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)["bmfm"]
