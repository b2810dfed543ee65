"""Predictions of one control as files: arrays in predictions.npz, what they are in control.json."""

from pathlib import Path
from typing import Any

import numpy as np

from bmfm_pipeline.evaluation.predictions import MANY_CLASSES, TOP, LabelPredictions
from bmfm_pipeline.storage import read_json, write_json_atomic


def write_control(folder: Path, rows: np.ndarray, found: dict[str, LabelPredictions], about: dict[str, Any]) -> None:
    """Write what a control predicts for `rows` of the processed data: {target: predictions (rows,)}.

    Above 256 classes only the 20 largest probabilities of a cell are kept, as for the model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    arrays, targets = {"rows": np.asarray(rows, dtype=np.int64)}, []
    for number, (name, predictions) in enumerate(found.items()):
        targets.append({"name": name, "class_names": predictions.class_names})
        arrays[f"{number}.predicted"] = predictions.predicted
        if predictions.probabilities is None:
            continue
        if len(predictions.class_names) <= MANY_CLASSES:
            arrays[f"{number}.probabilities"] = predictions.probabilities.astype(np.float32)
            continue
        top = np.argsort(-predictions.probabilities, axis=1, kind="stable")[:, :TOP]
        arrays[f"{number}.top_classes"] = top.astype(np.int32)
        largest = np.take_along_axis(predictions.probabilities, top, 1)
        arrays[f"{number}.top_probabilities"] = largest.astype(np.float32)
    np.savez(folder / "predictions.npz", **arrays)
    write_json_atomic(folder / "control.json", {**about, "targets": targets})


def read_control(
    folder: Path, rows: np.ndarray, truth: dict[str, np.ndarray] | None = None
) -> dict[str, LabelPredictions]:
    """{target: predictions of `rows`}, in their order, all of which the control must have; `truth` {target: (rows,)} goes with them."""
    about, found = read_json(folder / "control.json"), {}
    with np.load(folder / "predictions.npz", allow_pickle=False) as arrays:
        places = _places(arrays["rows"], np.asarray(rows), folder)
        for number, target in enumerate(about["targets"]):
            names, predicted = target["class_names"], arrays[f"{number}.predicted"][places]
            probabilities, only_top = None, f"{number}.top_classes" in arrays
            if only_top:
                probabilities = np.zeros((len(places), len(names)))
                values = arrays[f"{number}.top_probabilities"][places]
                np.put_along_axis(probabilities, arrays[f"{number}.top_classes"][places].astype(np.int64), values, 1)
            elif f"{number}.probabilities" in arrays:
                probabilities = arrays[f"{number}.probabilities"][places].astype(np.float64)
            unknown = np.full(len(places), -100 if names else np.nan)
            own = unknown if truth is None else truth.get(target["name"], unknown)
            found[target["name"]] = LabelPredictions(own, predicted, probabilities, names, only_top=only_top)
    return found


def _places(there: np.ndarray, rows: np.ndarray, folder: Path) -> np.ndarray:
    order = np.argsort(there, kind="stable")
    found = np.minimum(np.searchsorted(there, rows, sorter=order), max(0, len(there) - 1))
    places = order[found] if len(there) else np.zeros(len(rows), dtype=np.int64)
    if len(rows) and (not len(there) or (there[places] != rows).any()):
        raise ValueError(f"{folder}: the control has no prediction for some of the cells")
    return places
