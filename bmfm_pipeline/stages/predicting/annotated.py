"""A copy of the input h5ad with predictions in obs and embeddings in obsm. The matrix is copied as it lies in the file, never loaded."""

import os
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from bmfm_pipeline.data.sources.tables import text
from bmfm_pipeline.errors import ConfigError, DataError
from bmfm_pipeline.stages.predicting.chunks import EMBEDDINGS
from bmfm_pipeline.stages.predicting.rows import UNKNOWN, Answers
from bmfm_pipeline.stages.predicting.tables import blocks, of_labels
from bmfm_pipeline.stages.predicting.unfinished import PredictedCells
from bmfm_pipeline.storage import check_room, disk_errors

PREFIX = "bmfm_"
EMBEDDING_KEY, MAP_KEY = "X_bmfm", "X_bmfm_umap"


def check_target(source, target: Path) -> None:
    """Say before the work what would stop the copy: a target that is the input, a full disk, a layout that nothing can be added to."""
    import h5py

    if target.exists() and os.path.samefile(target, source.path):
        raise ConfigError(f"{target}: is the input itself, which is never changed; name another file")
    if target.is_dir():
        raise ConfigError(f"{target}: is a folder; name the h5ad file itself")
    with h5py.File(source.path, "r") as file:
        for name in ("obsm", "uns"):
            if name in file and not isinstance(file[name], h5py.Group):
                raise DataError(
                    f"{source.path}: its {name} is in the layout of anndata before 0.7, to which nothing can be added; write the file again with "
                    "anndata's `anndata.read_h5ad(FILE).write_h5ad(...)`"
                )
    with disk_errors(target, "--output"):
        target.parent.mkdir(parents=True, exist_ok=True)
    check_room(target.parent, source.path.stat().st_size, "--output")


def write_annotated(
    source,
    target: Path,
    cells: PredictedCells,
    answers: Answers,
    poolings: Collection[str],
    about: dict[str, str],
    layout: np.ndarray | None = None,
) -> None:
    """Copy the file of `source` to `target`, and add to the copy, which appears when it is whole.

    obs: bmfm_LABEL, bmfm_LABEL_confidence (of classes), bmfm_reason; columns of these names are replaced. obsm: X_bmfm (cells, width)
    float32, nan where a cell could not be used, or X_bmfm_POOLING where there are several; X_bmfm_umap when `layout` (cells, 2) is given.
    uns/bmfm: `about`.
    """
    import h5py

    partial = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        shutil.copyfile(source.path, partial)
        os.chmod(partial, 0o666 & ~_umask())
        with h5py.File(partial, "r+") as file:
            _add_columns(source, file, _columns(cells, answers))
            obsm = _mapping(file, "obsm")
            for name in poolings:
                key = EMBEDDING_KEY if len(poolings) == 1 else f"{EMBEDDING_KEY}_{name}"
                _add_array(obsm, key, cells.rows(EMBEDDINGS + name))
            if layout is not None:
                _add_array(obsm, MAP_KEY, np.asarray(layout, dtype=np.float32))
            _replace(_mapping(file, "uns"), "bmfm", about)
        source.verify_unchanged()
        with open(partial, "rb") as stream:
            os.fsync(stream.fileno())
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def _umask() -> int:
    found = os.umask(0)
    os.umask(found)
    return found


def _columns(cells: PredictedCells, answers: Answers) -> dict[str, Any]:
    """The new columns of obs, as codes and numbers of all cells."""
    import pandas as pd

    known = {
        name: [*classes, *([UNKNOWN] if name in answers.thresholds and UNKNOWN not in classes else [])]
        for name, classes in answers.predictor.class_names.items()
    }
    codes: dict[str, list[np.ndarray]] = {name: [] for name in known}
    numbers: dict[str, list[np.ndarray]] = {name: [] for name in known}
    for where in blocks(cells.done):
        for name, rows in of_labels(cells, where, answers).items():
            if rows.words is None:
                numbers[name].append(rows.values)
                continue
            place = {word: code for code, word in enumerate(known[name])}
            for word in dict.fromkeys(rows.words):  # cells of several classes: whatever combinations there are
                if word is not None and word not in place:
                    place[word] = len(known[name])
                    known[name].append(word)
            codes[name].append(np.array([-1 if word is None else place[word] for word in rows.words], dtype=np.int32))
            numbers[name].append(rows.confidence)
    columns: dict[str, Any] = {}
    for name in known:
        if codes[name]:
            columns[PREFIX + name] = pd.Categorical.from_codes(np.concatenate(codes[name]), known[name])
        key = PREFIX + name + ("_confidence" if codes[name] else "")
        columns[key] = np.concatenate(numbers[name])
    reasons = cells.reason_codes().astype(np.int32) - 1
    columns[f"{PREFIX}reason"] = pd.Categorical.from_codes(reasons, cells.reasons[1:])
    return columns


def _add_columns(source, file, columns: dict[str, Any]) -> None:
    import h5py
    from anndata.io import write_elem

    if isinstance(file["obs"], h5py.Dataset):  # anndata before 0.7: one compound dataset, written anew as it is today
        table = source.obs.copy()
        for name, values in columns.items():
            table[name] = values
        del file["obs"]
        write_elem(file, "obs", table)
        return
    obs = file["obs"]
    order = [text(name) for name in obs.attrs.get("column-order", [])]
    for name, values in columns.items():
        _replace(obs, name, values)
        if name not in order:
            order.append(name)
    obs.attrs["column-order"] = np.array(order, dtype=h5py.string_dtype())


def _mapping(file, name: str):
    if name not in file:
        group = file.create_group(name)
        group.attrs["encoding-type"], group.attrs["encoding-version"] = "dict", "0.1.0"
    return file[name]


def _replace(group, name: str, value: Any) -> None:
    from anndata.io import write_elem

    if name in group:
        del group[name]
    write_elem(group, name, value)


def _add_array(group, key: str, rows: np.ndarray) -> None:
    if key in group:
        del group[key]
    made = group.create_dataset(key, shape=rows.shape, dtype=np.float32)
    made.attrs["encoding-type"], made.attrs["encoding-version"] = "array", "0.2.0"
    for where in blocks(len(rows)):
        made[where] = rows[where]
