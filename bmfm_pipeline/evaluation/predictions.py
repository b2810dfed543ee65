"""Stored predictions: one parquet file per evaluation, from which every metric, interval and plot is made."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bmfm_pipeline.config.losses import IGNORED_LABEL
from bmfm_pipeline.errors import DataError
from bmfm_pipeline.storage import read_json, write_json_atomic

MANY_CLASSES = 256
TOP = 20


@dataclass
class LabelPredictions:
    """Predictions of one label column for n cells.

    Classes: `truth` and `predicted` are class ids (n,), -100 where the truth is unknown, `probabilities` (n, C). Regression:
    `truth` and `predicted` are values (n,), truth nan where unknown; `class_names` is empty. `only_top`: probabilities beyond
    the largest of each cell are stored as 0. Several classes a cell: `truth` and `predicted` are 0 and 1 for each class (n, C);
    `part_of` is the label column where one of its classes stands by itself.
    """

    truth: np.ndarray
    predicted: np.ndarray
    probabilities: np.ndarray | None = None
    class_names: list[str] = field(default_factory=list)
    only_top: bool = False
    part_of: str | None = None

    @property
    def is_regression(self) -> bool:
        return not self.class_names

    @property
    def has_several(self) -> bool:
        """Whether a cell may have several classes; such predictions are scored and stored class by class."""
        return self.predicted.ndim == 2

    @property
    def known(self) -> np.ndarray:
        return np.isfinite(self.truth) if self.is_regression else self.truth >= 0


@dataclass
class Predictions:
    """All label columns of the cells `cells` (n,), in the order they were read; `logits` what probabilities were computed from, (n, C) by label column, where asked for."""

    cells: list[str]
    labels: dict[str, LabelPredictions]
    embeddings: np.ndarray | None = None
    logits: dict[str, np.ndarray] = field(default_factory=dict)


def write_predictions(path: str | Path, predictions: Predictions, split: str = "test") -> None:
    """One row per cell. Per label column NAME: NAME, NAME_predicted and NAME_probabilities (float16 list in class order); above
    256 classes instead NAME_top_classes, NAME_top_probabilities (20) and NAME_true_probability. Class names are in the metadata.

    Where another label column is already called one of these, NAME is written with underscores appended.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, pa.Array] = {
        "cell": pa.array(predictions.cells, pa.string()),
        "split": pa.array([split] * len(predictions.cells)),
    }
    about: dict[str, dict] = {}
    for name, label in predictions.labels.items():
        own = _columns_of(label)
        prefix = name
        while any(prefix + ending in columns for ending in own):
            prefix += "_"
        columns |= {prefix + ending: values for ending, values in own.items()}
        about[name] = {"class_names": label.class_names, "prefix": prefix}
        if label.part_of is not None:
            about[name]["part_of"] = label.part_of
    table = pa.table(columns).replace_schema_metadata({"bmfm": json.dumps({"labels": about})})
    pq.write_table(table, path)


def _columns_of(label: LabelPredictions) -> dict[str, Any]:
    """The columns of one label, by the ending of their names."""
    import pyarrow as pa

    if label.is_regression:
        return {
            "": pa.array(label.truth.astype(np.float32), pa.float32()),
            "_predicted": pa.array(label.predicted.astype(np.float32), pa.float32()),
        }
    columns = {"": _names(label.truth, label.class_names), "_predicted": _names(label.predicted, label.class_names)}
    if label.probabilities is None:
        return columns
    if len(label.class_names) <= MANY_CLASSES:
        return columns | {"_probabilities": _lists(label.probabilities.astype(np.float16), pa.float16())}
    top = _top(label.probabilities)
    true = label.probabilities[np.arange(len(label.truth)), np.maximum(label.truth, 0)]
    return columns | {
        "_top_classes": _lists(top.astype(np.int32), pa.int32()),
        "_top_probabilities": _lists(np.take_along_axis(label.probabilities, top, 1).astype(np.float16), pa.float16()),
        "_true_probability": pa.array(np.where(label.truth >= 0, true, np.nan).astype(np.float32)),
    }


def _names(ids: np.ndarray, class_names: list[str]):
    """Class names of ids; null for a negative id."""
    import pyarrow as pa

    names = np.array([*class_names, None], dtype=object)
    return pa.array(names[np.where(ids >= 0, ids, len(class_names))], pa.string())


def _top(probabilities: np.ndarray) -> np.ndarray:
    return np.argsort(-probabilities, axis=1, kind="stable")[:, :TOP]


def _lists(values: np.ndarray, kind):
    import pyarrow as pa

    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel(), kind), values.shape[1])


def read_predictions(path: str | Path) -> Predictions:
    """What write_predictions wrote; above 256 classes the probabilities are zero outside the largest of each cell.

    The probability of the true class is stored too, but not put back: it would rank every cell of a class above the cells of others
    whose small probability was cut off, and make the areas under the curves too good.
    """
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    about = json.loads(table.schema.metadata[b"bmfm"])
    labels = {}
    for name, entry in about["labels"].items():
        names, prefix = entry["class_names"], entry["prefix"]
        truth, predicted = (table[prefix + ending].to_pylist() for ending in ("", "_predicted"))
        if not names:
            labels[name] = LabelPredictions(np.array(truth, dtype=np.float64), np.array(predicted, dtype=np.float64))
            continue
        ids = {value: index for index, value in enumerate(names)} | {None: IGNORED_LABEL}
        true_ids, predicted_ids = (
            np.array([ids[value] for value in values], dtype=np.int64) for values in (truth, predicted)
        )
        labels[name] = LabelPredictions(
            true_ids,
            predicted_ids,
            _probabilities(table, prefix, len(names)),
            names,
            only_top=f"{prefix}_top_classes" in table.column_names,
            part_of=entry.get("part_of"),
        )
    return Predictions(table["cell"].to_pylist(), labels)


def _probabilities(table, prefix: str, n_classes: int) -> np.ndarray | None:
    if f"{prefix}_probabilities" in table.column_names:
        return _stored(table, f"{prefix}_probabilities", n_classes)
    if f"{prefix}_top_classes" not in table.column_names:
        return None
    found = np.zeros((table.num_rows, n_classes))
    top = _stored(table, f"{prefix}_top_classes", TOP).astype(np.int64)
    np.put_along_axis(found, top, _stored(table, f"{prefix}_top_probabilities", TOP), 1)
    return found


def _stored(table, column: str, width: int) -> np.ndarray:
    flat = table[column].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return flat.astype(np.float64).reshape(-1, width)


def write_embeddings(folder: Path, split: str, embeddings: np.ndarray, rows: np.ndarray) -> None:
    """embeddings/SPLIT.npy, float32 (cells, features), and embeddings/SPLIT_rows.npy, the rows of the processed file they are of."""
    place = folder / "embeddings"
    place.mkdir(exist_ok=True)
    np.save(place / f"{split}.npy", np.ascontiguousarray(embeddings, dtype=np.float32))
    np.save(place / f"{split}_rows.npy", np.asarray(rows, dtype=np.int64))


def read_embeddings(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray] | None:
    """(embeddings, rows) as write_embeddings wrote them; None where there are none."""
    place = folder / "embeddings"
    if not (place / f"{split}.npy").exists():
        return None
    return np.load(place / f"{split}.npy", allow_pickle=False), np.load(place / f"{split}_rows.npy", allow_pickle=False)


def write_control_predictions(path: Path, controls: dict[str, dict[str, LabelPredictions]]) -> None:
    """Predictions of the controls, as class ids beside the model's: {control: {label: predictions}}."""
    write_json_atomic(
        path,
        {control: {name: _plain(label) for name, label in labels.items()} for control, labels in controls.items()},
    )


def _plain(label: LabelPredictions) -> dict[str, Any]:
    """Above 256 classes the largest probabilities only, as for the model: both are compared at the same resolution."""
    plain: dict[str, Any] = {"predicted": label.predicted.tolist()}
    if label.probabilities is None:
        return plain
    if len(label.class_names) <= MANY_CLASSES:
        return plain | {"probabilities": label.probabilities.round(5).tolist()}
    top = _top(label.probabilities)
    largest = np.take_along_axis(label.probabilities, top, 1).round(5)
    return plain | {"top_classes": top.tolist(), "top_probabilities": largest.tolist()}


def read_control_predictions(path: Path, model: Predictions) -> dict[str, dict[str, LabelPredictions]]:
    """What write_control_predictions wrote, with the truth and the class names of `model`."""
    return {
        control: {name: _beside(model.labels[name], entry) for name, entry in labels.items()}
        for control, labels in read_json(path).items()
    }


def _beside(model: LabelPredictions, entry: dict[str, Any]) -> LabelPredictions:
    predicted = np.array(entry["predicted"])
    if len(predicted) != len(model.truth):
        raise DataError(
            f"the controls hold {len(predicted)} predictions, the model {len(model.truth)}: they are not of the same cells; "
            "run `bmfm evaluate` again"
        )
    probabilities = None
    if "top_classes" in entry:
        probabilities = np.zeros((len(predicted), len(model.class_names)))
        np.put_along_axis(probabilities, np.array(entry["top_classes"]), np.array(entry["top_probabilities"]), 1)
    elif "probabilities" in entry:
        probabilities = np.array(entry["probabilities"])
    return LabelPredictions(
        model.truth,
        predicted,
        probabilities,
        model.class_names,
        only_top="top_classes" in entry,
        part_of=model.part_of,
    )
