"""Checkpoints written whole: data first, then a small manifest with its hash; the newest valid one is where a run resumes."""

import contextlib
import os
from pathlib import Path

from bmfm_pipeline.errors import TrainingError
from bmfm_pipeline.storage import hash_file, read_json, write_json_atomic


def save_checkpoint(trainer, path: Path, **about) -> None:
    """Save beside `path`, flush, rename, then write `path`.json. A full disk leaves the previous checkpoint as it was."""
    partial = path.with_name(f".{path.name}.part")
    try:
        trainer.save_checkpoint(partial)
        if trainer.is_global_zero:
            with open(partial, "rb") as stream:
                os.fsync(stream.fileno())
            digest = hash_file(partial)
            os.replace(partial, path)
            write_json_atomic(manifest_of(path), {"sha256": digest, "step": int(trainer.global_step), **about})
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise TrainingError(
            f"{path}: the checkpoint could not be written ({error}); the previous checkpoint is kept. Free space and run again to resume"
        ) from error


def manifest_of(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def is_valid(path: Path) -> bool:
    """Whether a checkpoint's bytes are those of its manifest."""
    manifest = manifest_of(path)
    if not path.is_file() or not manifest.is_file():
        return False
    try:
        return read_json(manifest)["sha256"] == hash_file(path)
    except Exception:  # a damaged manifest is as good as none
        return False


def newest_valid(folder: Path, report=print) -> Path | None:
    """The valid checkpoint with the most steps; each invalid one met on the way is named to `report`."""
    candidates = []
    for path in folder.glob("*.ckpt"):
        if is_valid(path):
            candidates.append((read_json(manifest_of(path))["step"], path.stat().st_mtime_ns, path))
        else:
            report(f"{path}: incomplete or damaged, not used")
    return max(candidates)[2] if candidates else None
