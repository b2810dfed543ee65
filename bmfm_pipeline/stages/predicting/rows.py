"""From logits to what is said of each cell: label, confidence, probabilities. The one place where numbers become answers."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bmfm_pipeline.errors import ConfigError
from bmfm_pipeline.stages.predicting.predictor import Predictor
from bmfm_pipeline.training.temperature import (
    confidence_of,
    read_calibration,
    scaled_probabilities,
    temperatures,
)

UNKNOWN = "unknown"


@dataclass
class LabelRows:
    """What is said of n cells for one label column; where `usable` (n,) is False there is nothing.

    `words` (n,) object: class names, or classes joined by the column's separator; None for a number, which is in `values` (n,).
    `confidence` (n,), nan where there is none, and `probabilities` (n, C) are those of classes.
    """

    words: np.ndarray | None
    values: np.ndarray | None = None
    confidence: np.ndarray | None = None
    probabilities: np.ndarray | None = None


@dataclass
class Answers:
    """How a model's logits are read: temperatures fitted to dev cells where it has them, and the confidence below which a cell is unknown.

    `unknown_below`: a number for all labels, or 'auto' for the threshold that was picked on dev cells. Raises ConfigError where the
    model has none.
    """

    predictor: Predictor
    unknown_below: float | str | None = None
    temperatures: dict[str, float] = field(init=False)
    thresholds: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        calibration = read_calibration(self.predictor.folder)
        self.temperatures = temperatures(calibration)
        named = [name for name, classes in self.predictor.class_names.items() if classes]
        self.thresholds = {}
        for name in named if self.unknown_below is not None else []:
            self.thresholds[name] = self._threshold(name, calibration.get(name, {}))

    def _threshold(self, name: str, fitted: dict[str, Any]) -> float:
        if self.unknown_below != "auto":
            return float(self.unknown_below)
        picked = (fitted.get("unknown") or {}).get("threshold")
        if picked is None:
            why = (fitted.get("unknown") or {}).get("note") or "the model carries no calibration"
            raise ConfigError(
                f"--unknown-below auto: no threshold is known for '{name}' ({why}); give a number between 0 and 1"
            )
        return float(picked)

    def of_label(self, name: str, logits: np.ndarray, usable: np.ndarray) -> LabelRows:
        """Rows of label column `name` from logits (n, C), or (n, 1) where a number is predicted."""
        column = next(entry for entry in self.predictor.run.label_columns if entry.label_column_name == name)
        classes = self.predictor.class_names[name]
        if not classes:
            return LabelRows(None, values=np.where(usable, logits[:, 0], np.nan).astype(np.float32))
        known = np.where(usable[:, None], logits, 0)
        several = column.is_multilabel
        probabilities = scaled_probabilities(known, self.temperatures.get(name, 1.0), several)
        confidence = confidence_of(probabilities, several)
        names = np.array(classes, dtype=object)
        if several:
            words = np.array([_joined(names[row], column.multilabel_str_sep) for row in known > 0], dtype=object)
        else:
            words = names[known.argmax(axis=1)]
        if name in self.thresholds:
            words[confidence < self.thresholds[name]] = UNKNOWN
        words[~usable], confidence[~usable], probabilities[~usable] = None, np.nan, np.nan
        return LabelRows(words, None, confidence.astype(np.float32), probabilities.astype(np.float32))


def _joined(chosen: np.ndarray, separator: str) -> str:
    return separator.join(chosen) or separator  # the separator alone is how a file says "none of them"
