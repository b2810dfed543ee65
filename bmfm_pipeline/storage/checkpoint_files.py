"""A .ckpt file and what lies beside it and says how to read it. Light to import: planning asks for it."""

import contextlib
from collections.abc import Callable
from pathlib import Path

from bmfm_pipeline.errors import CheckpointError, StorageError
from bmfm_pipeline.storage.cache import localise
from bmfm_pipeline.storage.hashing import content_hash, hash_file, hash_json
from bmfm_pipeline.storage.uris import is_remote, local_path

# Files of a model folder that say what the model is and how cells are read, beside the weights.
BESIDE_WEIGHTS = (
    "config.json", "bmfm.json", "label_dict.json", "transforms.json", "run_config.json", "preprocessing.json", "training.json",
    "tokenizers", "gene_tables",
)  # fmt: skip


def is_checkpoint_file(uri: str) -> bool:
    return uri.endswith(".ckpt")


def fetch_checkpoint(uri: str) -> Path:
    """A local .ckpt file with its neighbours: the path itself, or a copy of the folder that it lies in. Raises CheckpointError."""
    if not is_remote(uri):
        path = local_path(uri)
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file")
        return path
    place = uri.rpartition("/")[0]
    parent = place.rpartition("/")[0] if place.endswith("/checkpoints") else place
    with contextlib.suppress(StorageError):
        inside = localise(parent) / uri.removeprefix(parent + "/")
        if inside.is_file():
            return inside
    return localise(uri)


def neighbours(path: Path) -> tuple[Path | None, Path | None]:
    """(the model folder, the folder of tokenizers) that a .ckpt file lies in or beside; None where there is none."""
    for folder in (path.parent, path.parent.parent):
        if (folder / "config.json").exists() and (folder / "bmfm.json").exists():
            return folder, folder / "tokenizers"
    found = sorted(entry for entry in path.parent.glob("tokenizers*") if entry.is_dir())
    return None, found[0] if found else None


def checkpoint_hash(path: Path, hash_one: Callable[[Path], str] = hash_file) -> str:
    """Hash of a .ckpt file and of its neighbours: the same content has the same hash wherever it lies."""
    folder, tokenizers = neighbours(path)
    beside = [tokenizers] if folder is None else [folder / name for name in BESIDE_WEIGHTS]
    there = {entry.name: content_hash(entry) for entry in beside if entry is not None and entry.exists()}
    return hash_json([hash_one(path), there])
