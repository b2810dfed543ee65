"""How sure a prediction is, and what that was worth: a few numbers per cell, from which calibration is measured, however many classes."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bmfm_pipeline.evaluation.common_classes import CommonClasses, merged_log_probabilities
from bmfm_pipeline.evaluation.predictions import LabelPredictions, Predictions
from bmfm_pipeline.evaluation.several_classes import scored_classes
from bmfm_pipeline.training.temperature import scaled_log_probabilities

FILE = "confidences.parquet"
# Controls' probabilities are stored with five decimals: what is below may be anything up to half of one.
SMALLEST_STORED = 5e-6


@dataclass
class Confidences:
    """Of n cells: `confidence`, the probability of the predicted class; `right`, whether it is the true one; `loss`, minus the log of
    the true class's probability; `brier`, the squared distance of all probabilities to the truth, 0 to 2 (Brier 1950). Each (n,), and
    nan or False where `known` says that the truth is not."""

    confidence: np.ndarray
    right: np.ndarray
    loss: np.ndarray
    brier: np.ndarray
    known: np.ndarray

    def at(self, rows: np.ndarray) -> "Confidences":
        return Confidences(*(values[rows] for values in vars(self).values()))


def confidences_of(log_probabilities: np.ndarray, truth: np.ndarray, predicted: np.ndarray) -> Confidences:
    """From log-probabilities (n, C), class ids of the truth (below 0 unknown) and of the predictions (n,)."""
    cells, known = np.arange(len(truth)), truth >= 0
    own = log_probabilities[cells, np.maximum(truth, 0)]
    probabilities = np.exp(log_probabilities)
    brier = (probabilities**2).sum(axis=1) - 2 * np.exp(own) + 1
    return Confidences(
        probabilities[cells, predicted],
        (predicted == truth) & known,
        np.where(known, -own, np.nan),
        np.where(known, brier, np.nan),
        known,
    )


def confidences_of_control(label: LabelPredictions) -> Confidences | None:
    """From stored probabilities; None where there are none, or only the largest of each cell."""
    if label.probabilities is None or label.only_top or label.is_regression:
        return None
    with np.errstate(divide="ignore"):
        return confidences_of(np.log(np.maximum(label.probabilities, SMALLEST_STORED)), label.truth, label.predicted)


def confidences_of_model(
    predictions: Predictions,
    temperatures: Mapping[str, float],
    labels: Mapping[str, np.ndarray],
    common: Mapping[str, CommonClasses] | None = None,
) -> dict[str, dict[str, Confidences]]:
    """{target: {"calibrated": ..., "uncalibrated": ...}} from the logits that `predictions` kept, before they are taken apart by class.

    A label column is a target; of one whose cells may have several classes each class is that is scored, which `labels`, those of all
    cells, say. `common` are the classes that predictions are scored in, where these are not the model's own.
    """
    found = {}
    for name, logits in predictions.logits.items():
        label, temperature = predictions.labels[name], temperatures.get(name, 1.0)
        ways = {"calibrated": temperature, "uncalibrated": 1.0}
        if not label.has_several:
            found[name] = {}
            for way, value in ways.items():
                scaled = scaled_log_probabilities(logits, value)
                if common and name in common:
                    scaled = merged_log_probabilities(scaled, common[name])
                found[name][way] = confidences_of(scaled, label.truth, label.predicted)
            continue
        for target, position in scored_classes(name, labels[name], label.class_names).items():
            both = np.stack([np.zeros(len(logits)), logits[:, position]], axis=1)
            truth, predicted = (values[:, position].astype(np.int64) for values in (label.truth, label.predicted))
            found[target] = {
                way: confidences_of(scaled_log_probabilities(both, value), truth, predicted)
                for way, value in ways.items()
            }
    return found


def write_confidences(folder: Path, cells: list[str], found: dict[str, dict[str, Confidences]]) -> None:
    """One row per cell and target: cell, target, right (null where the truth is unknown), confidence, loss, brier, and the last three
    once more with uncalibrated_ before. No file where nothing was found."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not found:
        return
    columns: dict[str, list] = {"cell": [], "target": [], "right": []}
    for target, ways in found.items():
        known = ways["calibrated"].known
        columns["cell"].append(pa.array(cells, pa.string()))
        columns["target"].append(pa.array([target] * len(cells), pa.string()))
        columns["right"].append(pa.array(ways["calibrated"].right, mask=~known))
        for way, prefix in (("calibrated", ""), ("uncalibrated", "uncalibrated_")):
            for name in ("confidence", "loss", "brier"):
                values = getattr(ways[way], name)
                columns.setdefault(prefix + name, []).append(pa.array(values.astype(np.float32), pa.float32()))
    table = pa.table({name: pa.chunked_array(parts) for name, parts in columns.items()})
    pq.write_table(table.replace_schema_metadata({"bmfm": json.dumps(list(found))}), folder / FILE)


def read_confidences(folder: Path) -> dict[str, dict[str, Confidences]]:
    """What write_confidences wrote, each target's cells in the order of predictions.parquet; nothing where there is no such file."""
    import pyarrow.parquet as pq

    if not (folder / FILE).exists():
        return {}
    table = pq.read_table(folder / FILE)
    targets = json.loads(table.schema.metadata[b"bmfm"])
    found: dict[str, dict[str, Confidences]] = {}
    count = table.num_rows // len(targets)
    for position, target in enumerate(targets):
        own = table.slice(position * count, count)
        right = own["right"].to_numpy(zero_copy_only=False)
        known = ~own["right"].is_null().to_numpy(zero_copy_only=False)
        found[target] = {}
        for way, prefix in (("calibrated", ""), ("uncalibrated", "uncalibrated_")):
            values = (own[prefix + name].to_numpy().astype(np.float64) for name in ("confidence", "loss", "brier"))
            confidence, loss, brier = values
            found[target][way] = Confidences(confidence, np.where(known, right, False).astype(bool), loss, brier, known)
    return found
