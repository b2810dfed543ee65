"""Two coordinates per predicted cell, and how well embeddings mix the batches of the input."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bmfm_pipeline.data.label_values import missing_mask
from bmfm_pipeline.errors import ConfigError, did_you_mean
from bmfm_pipeline.evaluation.integration import DESCRIPTIONS, MOST_CELLS, Scores, integration_scores
from bmfm_pipeline.evaluation.umap import place_beside, umap
from bmfm_pipeline.stages.predicting.chunks import EMBEDDINGS, LOGITS
from bmfm_pipeline.stages.predicting.rows import Answers
from bmfm_pipeline.stages.predicting.tables import write_table
from bmfm_pipeline.stages.predicting.unfinished import PredictedCells
from bmfm_pipeline.storage import write_json_atomic

FITTED = 20_000  # a map is fitted to at most so many cells; others are placed beside them


def check_batch_column(source, column: str | None) -> None:
    """ConfigError when obs has no such column: said before hours of work."""
    if column is not None and column not in source.obs:
        columns = [str(name) for name in source.obs.columns]
        hint = did_you_mean(column, columns, f"columns: {', '.join(columns[:30]) or 'none'}")
        raise ConfigError(f"{source.path}: obs has no batch column '{column}'; {hint}")


class CellMap:
    """What is made of the embeddings of all predicted cells, those of the first pooling."""

    def __init__(self, source, cells: PredictedCells, answers: Answers, pooling: str, seed: int):
        self.source, self.cells, self.answers, self.seed = source, cells, answers, seed
        self.embeddings = cells.rows(EMBEDDINGS + pooling)

    def _some(self, most: int) -> np.ndarray:
        """Rows of usable cells, a seeded sample of them where there are more than `most`."""
        rows = np.flatnonzero(self.cells.reason_codes() == 0)
        rows = rows[np.isfinite(self.embeddings[rows]).all(axis=1)] if len(rows) <= most else rows
        if len(rows) > most:
            rows = np.sort(np.random.default_rng([self.seed & 0xFFFFFFFF, 0x0A]).choice(rows, most, replace=False))
            rows = rows[np.isfinite(self.embeddings[rows]).all(axis=1)]
        return rows

    def layout(self) -> np.ndarray:
        """(cells, 2) float32, nan for unusable cells. DataError below 3 usable cells."""
        rows = self._some(FITTED)
        fitted = np.asarray(self.embeddings[rows])
        layout = np.full((self.cells.done, 2), np.nan, np.float32)
        of_fitted = umap(fitted, self.seed)
        if len(rows) < np.count_nonzero(self.cells.reason_codes() == 0):
            layout = place_beside(self.embeddings, fitted, of_fitted)
        layout[rows] = of_fitted
        return layout

    def write(self, path: Path, layout: np.ndarray, names: Sequence[str]) -> None:
        write_table(path, {"cell": names, "x": layout[:, 0], "y": layout[:, 1]})

    def integration(self, batch_column: str) -> tuple[Scores, list[str]]:
        """Scores of a sample of cells against the input's own labels where it has them, else against those predicted."""
        rows = self._some(MOST_CELLS)
        table = self.source.obs.iloc[rows]
        batches = _texts(table[batch_column])
        notes = []
        names = [name for name, classes in self.answers.predictor.class_names.items() if classes]
        if not names:
            return {}, ["integration: the model predicts no classes, which the scores need"]
        if names[0] in table:
            labels = _texts(table[names[0]])
            notes.append(f"integration: labels are the input's own '{names[0]}'")
        else:
            logits = np.asarray(self.cells.rows(LOGITS + names[0])[rows])
            labels = self.answers.of_label(names[0], logits, np.ones(len(rows), dtype=bool)).words
            notes.append(f"integration: labels are the predicted '{names[0]}', which favours the model")
        scores, more = integration_scores(np.asarray(self.embeddings[rows]), labels, batches, self.seed)
        usable = int(np.count_nonzero(self.cells.reason_codes() == 0))
        if usable > len(rows):
            notes.append(f"integration: of {usable} cells, a random {len(rows)} (seed {self.seed})")
        return scores, [*notes, *more]

    def write_scores(self, path: Path, scores: Scores, notes: list[str]) -> None:
        described = {name: {**entry, "what": DESCRIPTIONS[name]} for name, entry in scores.items()}
        write_json_atomic(path, {"scores": described, "notes": notes})


def _texts(column: Any) -> np.ndarray:
    """Values of an obs column as text, None where missing."""
    values = column.astype(str).to_numpy(dtype=object, copy=True)
    values[missing_mask(column)] = None
    return values
