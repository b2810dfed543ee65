"""Stored predictions: one parquet file per evaluation, from which every metric, interval and plot is made."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from bmfm_pipeline.storage import read_json, write_json_atomic

MANY_CLASSES = 256
TOP = 20


@dataclass
class LabelPredictions:
    """Predictions of one label column for n cells.

    Classes: `truth` and `predicted` are class ids (n,), -100 where the truth is unknown, `probabilities` (n, C). Regression:
    `truth` and `predicted` are values (n,), truth nan where unknown; `class_names` is empty.
    """

    truth: np.ndarray
    predicted: np.ndarray
    probabilities: np.ndarray | None = None
    class_names: list[str] = field(default_factory=list)

    @property
    def is_regression(self) -> bool:
        return not self.class_names

    @property
    def known(self) -> np.ndarray:
        return np.isfinite(self.truth) if self.is_regression else self.truth >= 0


@dataclass
class Predictions:
    """All label columns of the cells `cells` (n,), in the order they were read; `fields` holds sums over masked positions."""

    cells: list[str]
    labels: dict[str, LabelPredictions]
    fields: dict[str, float] = field(default_factory=dict)
    embeddings: np.ndarray | None = None


def write_predictions(path: str | Path, predictions: Predictions, split: str = "test") -> None:
    """One row per cell. Per label column NAME: NAME, NAME_predicted and NAME_probabilities (float16 list in class order); above
    256 classes instead NAME_top_classes, NAME_top_probabilities (20) and NAME_true_probability. Class names are in the metadata.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, pa.Array] = {
        "cell": pa.array(predictions.cells, pa.string()),
        "split": pa.array([split] * len(predictions.cells)),
    }
    about: dict[str, dict] = {}
    for name, label in predictions.labels.items():
        about[name] = {"class_names": label.class_names}
        if label.is_regression:
            columns[name] = pa.array(label.truth.astype(np.float32), pa.float32())
            columns[f"{name}_predicted"] = pa.array(label.predicted.astype(np.float32), pa.float32())
            continue
        names = np.array([*label.class_names, None], dtype=object)
        columns[name] = pa.array(names[np.where(label.truth >= 0, label.truth, len(label.class_names))], pa.string())
        columns[f"{name}_predicted"] = pa.array(names[label.predicted], pa.string())
        if label.probabilities is None:
            continue
        if len(label.class_names) <= MANY_CLASSES:
            columns[f"{name}_probabilities"] = _lists(label.probabilities.astype(np.float16), pa.float16())
        else:
            top = np.argsort(-label.probabilities, axis=1)[:, :TOP]
            columns[f"{name}_top_classes"] = _lists(top.astype(np.int32), pa.int32())
            columns[f"{name}_top_probabilities"] = _lists(
                np.take_along_axis(label.probabilities, top, 1).astype(np.float16), pa.float16()
            )
            true = label.probabilities[np.arange(len(label.truth)), np.maximum(label.truth, 0)]
            columns[f"{name}_true_probability"] = pa.array(np.where(label.truth >= 0, true, np.nan).astype(np.float32))
    table = pa.table(columns).replace_schema_metadata(
        {"bmfm": json.dumps({"labels": about, "fields": predictions.fields})}
    )
    pq.write_table(table, path)


def _lists(values: np.ndarray, kind):
    import pyarrow as pa

    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel(), kind), values.shape[1])


def read_predictions(path: str | Path) -> Predictions:
    """What write_predictions wrote; probabilities above 256 classes are zero outside the stored ones."""
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    about = json.loads(table.schema.metadata[b"bmfm"])
    labels = {}
    for name, entry in about["labels"].items():
        names = entry["class_names"]
        truth, predicted = table[name].to_pylist(), table[f"{name}_predicted"].to_pylist()
        if not names:
            labels[name] = LabelPredictions(np.array(truth, dtype=np.float64), np.array(predicted, dtype=np.float64))
            continue
        ids = {value: index for index, value in enumerate(names)}
        true_ids = np.array([-100 if value is None else ids[value] for value in truth])
        predicted_ids = np.array([ids[value] for value in predicted])
        labels[name] = LabelPredictions(
            true_ids, predicted_ids, _probabilities(table, name, len(names), true_ids), names
        )
    return Predictions(table["cell"].to_pylist(), labels, about["fields"])


def _probabilities(table, name: str, n_classes: int, truth: np.ndarray) -> np.ndarray | None:
    if f"{name}_probabilities" in table.column_names:
        flat = table[f"{name}_probabilities"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        return flat.astype(np.float64).reshape(-1, n_classes)
    if f"{name}_top_classes" not in table.column_names:
        return None
    found = np.zeros((table.num_rows, n_classes))
    top = np.array(table[f"{name}_top_classes"].to_pylist())
    np.put_along_axis(found, top, np.array(table[f"{name}_top_probabilities"].to_pylist(), dtype=np.float64), 1)
    known = truth >= 0
    found[np.flatnonzero(known), truth[known]] = np.array(table[f"{name}_true_probability"].to_pylist())[known]
    return found


def write_control_predictions(path: Path, controls: dict[str, dict[str, LabelPredictions]]) -> None:
    """Predictions of the controls, as class ids beside the model's: {control: {label: predictions}}."""
    plain = {
        control: {
            name: {
                "predicted": label.predicted.tolist(),
                "probabilities": None if label.probabilities is None else label.probabilities.round(5).tolist(),
            }
            for name, label in labels.items()
        }
        for control, labels in controls.items()
    }
    write_json_atomic(path, plain)


def read_control_predictions(path: Path, model: Predictions) -> dict[str, dict[str, LabelPredictions]]:
    found: dict[str, dict[str, LabelPredictions]] = {}
    for control, labels in read_json(path).items():
        found[control] = {}
        for name, entry in labels.items():
            probabilities = None if entry["probabilities"] is None else np.array(entry["probabilities"])
            found[control][name] = LabelPredictions(
                model.labels[name].truth, np.array(entry["predicted"]), probabilities, model.labels[name].class_names
            )
    return found
