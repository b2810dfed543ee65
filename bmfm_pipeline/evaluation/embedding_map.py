"""Test cells on a map of their embeddings, with what is true and what was predicted of each, and how well batches mix."""

from typing import Any

import numpy as np

from bmfm_pipeline.data.label_values import missing_mask
from bmfm_pipeline.errors import ConfigError
from bmfm_pipeline.evaluation.confidences import Confidences
from bmfm_pipeline.evaluation.integration import DESCRIPTIONS, integration_scores
from bmfm_pipeline.evaluation.predictions import LabelPredictions, Predictions
from bmfm_pipeline.evaluation.umap import umap

FILE = "embedding_map.json"
MOST_CELLS = 5000
MOST_TARGETS = 12  # of a label whose classes are scored one by one
FEWEST_CELLS = 3


def embedding_map(
    embeddings: np.ndarray,
    predictions: Predictions,
    confidences: dict[str, dict[str, Confidences]] | None = None,
    batches: np.ndarray | None = None,
    seed: int = 0,
) -> dict[str, Any] | None:
    """{method, cells, x, y, n_of, truth, predicted, confidence, integration, notes}; None where fewer than three cells have embeddings.

    embeddings : (n, d) in the order of `predictions.cells`; of more than 5,000 cells a seeded sample is drawn. `truth`, `predicted` and
    `confidence` are lists by target, of class names, or numbers where these are predicted, None where unknown. batches : (n,) text or
    None, for the scores of evaluation/integration.py, with the truth of the first target of classes as labels.
    """
    rows, notes = np.flatnonzero(np.isfinite(embeddings).all(axis=1)), []
    if len(rows) < FEWEST_CELLS:
        return None
    if len(rows) > MOST_CELLS:
        notes.append(f"map: of {len(rows)} cells, a random {MOST_CELLS} (seed {seed})")
        rows = np.sort(np.random.default_rng([seed & 0xFFFFFFFF, 0x0A]).choice(rows, MOST_CELLS, replace=False))
    layout = umap(embeddings[rows], seed)
    targets = list(predictions.labels)[:MOST_TARGETS]
    if len(targets) < len(predictions.labels):
        notes.append(f"map: coloured by {len(targets)} of {len(predictions.labels)} labels")
    integration: dict[str, Any] = {}
    if batches is not None:
        scores, more = _integration(embeddings, predictions, batches, seed)
        integration = {name: {**entry, "what": DESCRIPTIONS[name]} for name, entry in scores.items()}
        notes += more
    return {
        "method": "umap",
        "cells": [predictions.cells[row] for row in rows],
        "x": layout[:, 0].round(4).astype(float).tolist(),
        "y": layout[:, 1].round(4).astype(float).tolist(),
        "n_of": len(predictions.cells),
        "truth": {name: _words(predictions.labels[name], predictions.labels[name].truth, rows) for name in targets},
        "predicted": {
            name: _words(predictions.labels[name], predictions.labels[name].predicted, rows) for name in targets
        },
        "confidence": _confidence(predictions, confidences or {}, targets, rows),
        "integration": integration,
        "notes": notes,
    }


def _words(label: LabelPredictions, values: np.ndarray, rows: np.ndarray) -> list:
    chosen = values[rows]
    if label.is_regression:
        return [float(value) if np.isfinite(value) else None for value in chosen]
    return [label.class_names[int(value)] if value >= 0 else None for value in chosen]


def _confidence(
    predictions: Predictions, confidences: dict[str, dict[str, Confidences]], targets: list[str], rows: np.ndarray
) -> dict[str, list[float]]:
    """By target of classes: calibrated where that is known, else as the model has it."""
    found = {}
    for name in targets:
        label = predictions.labels[name]
        if name in confidences:
            found[name] = confidences[name]["calibrated"].confidence[rows].round(4).tolist()
        elif label.probabilities is not None and label.probabilities.ndim == 2:
            found[name] = label.probabilities[rows].max(axis=1).round(4).tolist()
    return found


def _integration(embeddings: np.ndarray, predictions: Predictions, batches: np.ndarray, seed: int):
    for name, label in predictions.labels.items():
        if not label.is_regression and not label.has_several:
            everything = np.arange(len(predictions.cells))
            labels = np.array(_words(label, label.truth, everything), dtype=object)
            scores, notes = integration_scores(embeddings, labels, batches, seed)
            return scores, [f"integration: labels are the true '{name}'", *notes]
    return {}, ["integration: no label of classes is predicted, which the scores need"]


def batches_of_cells(store, column: str, rows: np.ndarray) -> np.ndarray:
    """Values of an obs column of the processed data as text, None where missing, (rows,)."""
    check_batch_column(store, column)
    values = store.column(column)[rows]
    missing = missing_mask(values)
    return np.array([None if gone else str(value) for value, gone in zip(values, missing, strict=True)], dtype=object)


def check_batch_column(store, column: str | None) -> None:
    """ConfigError when the processed data have no such column."""
    if column is not None and column not in store.obs_columns:
        raise ConfigError(
            f"evaluation.batch_column: the processed data have no obs column '{column}'; there are {', '.join(store.obs_columns[:30])}"
        )
