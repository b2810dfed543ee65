"""The pairs of classes that a model confuses most, with the genes that tell them apart and those in which confused cells differ."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from bmfm_pipeline.evaluation.predictions import LabelPredictions

MOST_PAIRS, MOST_GENES = 8, 8
# Of many label columns (each class of a column of several classes is one), those with the most confused cells.
MOST_LABELS = 10
# Fewer confused cells than this say nothing about genes.
FEWEST_CELLS = 3
MOST_CELLS = 2000  # of one class, of the training cells
CHUNK = 4096
MEASURE = "log1p of counts per 10,000"


def confused_pairs(predictions: LabelPredictions, most: int = MOST_PAIRS) -> list[dict[str, Any]]:
    """[{"true", "predicted", "cells", "of", "share"}]: cells of class `true` called `predicted`, most cells first."""
    known = predictions.known
    truth, guess, n = predictions.truth[known], predictions.predicted[known], len(predictions.class_names)
    counts = np.bincount(truth * n + guess, minlength=n * n).reshape(n, n)
    totals = counts.sum(axis=1)
    np.fill_diagonal(counts, 0)
    order = np.argsort(-counts, axis=None, kind="stable")[:most]
    names = predictions.class_names
    return [
        {
            "true": names[true],
            "predicted": names[other],
            "cells": int(counts[true, other]),
            "of": int(totals[true]),
            "share": float(counts[true, other] / totals[true]),
        }
        for true, other in (divmod(int(place), n) for place in order)
        if counts[true, other]
    ]


def describe_confused(
    labels: Mapping[str, LabelPredictions],
    test_rows: np.ndarray,
    trained: Mapping[str, np.ndarray],
    train_rows: np.ndarray,
    values_of: Callable[[np.ndarray], Any],
    genes: Sequence[str],
    *,
    seed: int = 0,
    measure: str = MEASURE,
) -> dict[str, Any]:
    """{"measure", "labels": {label: [pair]}}: each pair of confused_pairs with `genes_of_classes` and `genes_of_confused`.

    `test_rows` (n,) are the rows of the predictions, `trained` {label: class ids of all cells}, `train_rows` the rows that the two
    classes are described by, at most MOST_CELLS of each class; `values_of(rows)` gives a CSR (rows, genes) of `measure`. A gene of
    genes_of_classes has the mean in cells truly of either class (training cells), their difference, Cohen's d, and the mean in the
    confused cells; one of genes_of_confused the means in confused and in right cells of the true class (test cells), and their d.
    `position` (0 to 1): where the confused cells lie between the two classes, along the difference of the classes' means.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    classes = {name: entry for name, entry in labels.items() if not entry.is_regression}
    all_pairs = {name: pairs for name, entry in classes.items() if (pairs := confused_pairs(entry))}
    chosen = sorted(all_pairs, key=lambda name: -sum(pair["cells"] for pair in all_pairs[name]))[:MOST_LABELS]
    for name in (name for name in all_pairs if name in chosen):
        predictions, pairs = classes[name], all_pairs[name]
        ids = {value: index for index, value in enumerate(predictions.class_names)}
        groups: dict[tuple, np.ndarray] = {}
        for pair in pairs:
            true, other = ids[pair["true"]], ids[pair["predicted"]]
            for one in (true, other):
                groups["class", one] = _some(train_rows[trained[name][train_rows] == one], seed)
                groups["right", one] = test_rows[(predictions.truth == one) & (predictions.predicted == one)]
            groups["confused", true, other] = test_rows[(predictions.truth == true) & (predictions.predicted == other)]
        moments = _moments(groups, values_of, len(genes))
        found[name] = [_pair(pair, ids, moments, genes) for pair in pairs]
    return {"measure": measure, "labels": found}


def _some(rows: np.ndarray, seed: int) -> np.ndarray:
    if len(rows) <= MOST_CELLS:
        return rows
    return np.sort(np.random.default_rng(seed).choice(rows, MOST_CELLS, replace=False))


def _moments(
    groups: dict[tuple, np.ndarray], values_of, n_genes: int
) -> dict[tuple, tuple[int, np.ndarray, np.ndarray]]:
    """{group: (cells, mean (genes,), variance (genes,))}; every chunk of rows is read once for all groups that hold it."""
    from scipy import sparse

    names = list(groups)
    rows = np.unique(np.concatenate([groups[name] for name in names]))
    totals = np.zeros((2, len(names), n_genes))
    for start in range(0, len(rows), CHUNK):
        chunk = rows[start : start + CHUNK]
        values = values_of(chunk).astype(np.float64)
        member = sparse.csr_matrix(np.stack([np.isin(chunk, groups[name]) for name in names]).astype(np.float64))
        totals[0] += (member @ values).toarray()
        values.data **= 2
        totals[1] += (member @ values).toarray()
    found = {}
    for index, name in enumerate(names):
        n = len(groups[name])
        mean = totals[0, index] / max(n, 1)
        variance = np.maximum(totals[1, index] - n * mean**2, 0) / max(n - 1, 1)
        found[name] = (n, mean, variance)
    return found


def _pair(pair: dict[str, Any], ids: dict[str, int], moments, genes: Sequence[str]) -> dict[str, Any]:
    true, other = ids[pair["true"]], ids[pair["predicted"]]
    own, theirs = moments["class", true], moments["class", other]
    confused, right = moments["confused", true, other], moments["right", true]
    described = {
        **pair,
        "training_cells": {"true": own[0], "predicted": theirs[0]},
        "right_cells": right[0],
        "position": None,
        "genes_of_classes": [],
        "genes_of_confused": [],
    }
    if own[0] and theirs[0]:
        effect = _effect(theirs, own)
        described["position"] = _position(own[1], theirs[1], confused[1])
        described["genes_of_classes"] = [
            {
                "gene": str(genes[index]),
                "mean_true": float(own[1][index]),
                "mean_predicted": float(theirs[1][index]),
                "difference": float(theirs[1][index] - own[1][index]),
                "effect": float(effect[index]),
                "mean_confused": float(confused[1][index]),
            }
            for index in _largest(theirs[1] - own[1])
        ]
    if min(confused[0], right[0]) >= FEWEST_CELLS:
        effect = _effect(confused, right)
        described["genes_of_confused"] = [
            {
                "gene": str(genes[index]),
                "mean_confused": float(confused[1][index]),
                "mean_right": float(right[1][index]),
                "difference": float(confused[1][index] - right[1][index]),
                "effect": float(effect[index]),
            }
            for index in _largest(confused[1] - right[1])
        ]
    return described


def _effect(one, other) -> np.ndarray:
    """Cohen's d (genes,): the difference of the means by the pooled standard deviation; 0 where neither group varies."""
    (n, mean, variance), (m, other_mean, other_variance) = one, other
    pooled = np.sqrt(((n - 1) * variance + (m - 1) * other_variance) / max(n + m - 2, 1))
    return np.divide(mean - other_mean, pooled, out=np.zeros_like(mean), where=pooled > 0)


def _position(own: np.ndarray, theirs: np.ndarray, confused: np.ndarray) -> float | None:
    """0 where the confused cells are as their own class is, 1 where they are as the one they were called."""
    way = theirs - own
    length = float(way @ way)
    return float((confused - own) @ way / length) if length else None


def _largest(differences: np.ndarray) -> np.ndarray:
    order = np.argsort(-np.abs(differences), kind="stable")[:MOST_GENES]
    return order[differences[order] != 0]
