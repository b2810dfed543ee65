"""Checkpoint files written whole: data beside its place, a manifest with its hash, then the rename. The newest valid one is resumed."""

import contextlib
import os
from pathlib import Path
from typing import Any

from bmfm_pipeline.errors import StorageError, TrainingError
from bmfm_pipeline.storage import hash_file, read_json, write_json_atomic


def save_checkpoint(trainer, path: Path, **about) -> None:
    """Save beside `path`, flush, hash, write `path`.json, rename.

    The manifest names the new file and the one it replaces, so that whichever of them is in place when the machine dies is valid.
    A full disk leaves the previous checkpoint as it was. Raises TrainingError.
    """
    partial = path.with_name(f".{path.name}.part")
    try:
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
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise TrainingError(
            f"{path}: the checkpoint could not be written ({_first_line(error)}); the previous checkpoint is kept. "
            "Free space and run again to resume"
        ) from error


def write_file(checkpoint: dict[str, Any], path: Path) -> None:
    """torch.save straight into a file that is flushed to the disk: no second copy in memory, none in a temporary folder."""
    import torch

    with open(path, "wb") as stream:
        torch.save(checkpoint, stream)
        stream.flush()
        os.fsync(stream.fileno())


def _first_line(error: Exception) -> str:
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
