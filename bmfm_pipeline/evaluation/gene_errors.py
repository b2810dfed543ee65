"""Errors at masked positions gene by gene, beside always guessing the gene's mean in training: gene_errors.csv and its summary."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bmfm_pipeline.evaluation.field_predictions import FieldRows
from bmfm_pipeline.evaluation.metric_kinds.classes import divided
from bmfm_pipeline.evaluation.metric_kinds.scores import Ranking

LISTED = 30
# A gene with fewer positions says little: it is in the table, but neither compared nor listed.
LEAST = 10
COLUMNS = (
    "field",
    "gene",
    "n",
    "n_nonzero",
    "mae",
    "mae_nonzero",
    "null_mae",
    "null_mae_nonzero",
    "mean_label",
    "sd_label",
    "mean_predicted",
    "sd_predicted",
    "zero_f1",
    "training_mean",
)


def gene_errors(rows: FieldRows) -> list[dict[str, Any]]:
    """One entry per gene, by falling number of positions; nothing where a field has no numbers or no genes.

    Errors are |prediction - label|, of tokens the numbers they stand for; `null_` ones those of the gene's mean in training, or of the
    field's mean where training saw no such gene. What is not defined is None.
    """
    label, said = _numbers(rows)
    there = (rows.gene >= 0) & np.isfinite(label) & np.isfinite(said)
    if not there.any():
        return []
    gene, label, said = rows.gene[there], label[there], said[there]
    means = np.array([rows.baseline.gene_means.get(name, np.nan) for name in rows.genes])
    known = means[np.isfinite(means)]
    overall = rows.baseline.mean if rows.baseline.mean is not None else (known.mean() if len(known) else np.nan)
    null = np.where(np.isfinite(means), means, overall)[gene]
    nonzero = label != 0
    zero_said = rows.says_zero[there] if rows.kind == "number" else said == 0

    def total(values: np.ndarray) -> np.ndarray:
        return np.bincount(gene, np.asarray(values, dtype=np.float64), minlength=len(rows.genes))

    n, n_nonzero = total(np.ones(len(gene))), total(nonzero)
    error, away = np.abs(said - label), np.abs(null - label)
    means_of = [divided(total(values), n, np.nan) for values in (label, said)]
    spreads = [
        np.sqrt(divided(total((values - centre[gene]) ** 2), n, np.nan))
        for values, centre in zip((label, said), means_of, strict=True)
    ]
    both, zeros = total(zero_said & ~nonzero), total(zero_said) + total(~nonzero)
    columns = {
        "mae": divided(total(error), n, np.nan),
        "mae_nonzero": divided(total(error * nonzero), n_nonzero, np.nan),
        "null_mae": divided(total(away), n, np.nan),
        "null_mae_nonzero": divided(total(away * nonzero), n_nonzero, np.nan),
        "mean_label": means_of[0],
        "sd_label": spreads[0],
        "mean_predicted": means_of[1],
        "sd_predicted": spreads[1],
        "zero_f1": np.where(n > n_nonzero, divided(2 * both, zeros, np.nan), np.nan),
        "training_mean": means,
    }
    found = []
    for index in np.lexsort((rows.genes, -n)):
        if not n[index]:
            continue
        values = {name: float(own[index]) if np.isfinite(own[index]) else None for name, own in columns.items()}
        counts = {"n": int(n[index]), "n_nonzero": int(n_nonzero[index])}
        found.append({"field": rows.name, "gene": rows.genes[index], **counts, **values})
    return found


def summary(rows: FieldRows, table: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What gene_errors found, in short: the share of genes that their own mean in training predicts better than the model, and the
    genes predicted best and worst beside it, of the tenth with the most positions (30 each, or half of those there are)."""
    compared = [entry for entry in table if entry["n"] >= LEAST and entry["null_mae"] is not None]
    found: dict[str, Any] = {"genes": len(table), "compared": len(compared), "least_positions": LEAST}
    if compared:
        worse = sum(entry["mae"] > entry["null_mae"] for entry in compared)
        found["worse_than_null"] = worse / len(compared)
        errors = [
            (entry["mae_nonzero"], entry["null_mae_nonzero"]) for entry in compared if entry["n_nonzero"] >= LEAST
        ]
        if errors:
            found["worse_than_null_nonzero"] = sum(own > null for own, null in errors) / len(errors)
        common = compared[: max(len(compared) // 10, 2 * LISTED)]
        ranked = sorted(common, key=lambda entry: (entry["mae"] - entry["null_mae"], entry["gene"]))
        size = min(LISTED, len(ranked) // 2)
        kept = ("gene", "n", "mae", "null_mae", "mean_label")
        short = [{name: entry[name] for name in kept} for entry in ranked]
        found |= {"best": short[:size], "worst": short[::-1][:size]}
    zero, sure = rows.label == 0, rows.zero_probability
    if rows.kind == "number" and zero.any() and not zero.all():
        said = rows.says_zero
        found["zero_f1"] = float(2 * (said & zero).sum() / (said.sum() + zero.sum()))
        if np.isfinite(sure).all():
            found["zero_auroc"] = float(Ranking(zero, sure).auroc(np.ones((1, len(zero))))[0])
    return found


def sentence(field: str, found: dict[str, Any]) -> str | None:
    """The share of genes that the model does not help, in words."""
    if "worse_than_null" not in found:
        return None
    return (
        f"{field}: of {found['compared']} genes with at least {found['least_positions']} predicted positions, "
        f"{100 * found['worse_than_null']:.0f} % are predicted worse than by their own mean in training (gene_errors.csv)"
    )


def write_gene_errors(path: Path, table: Sequence[dict[str, Any]]) -> None:
    """gene_errors.csv, one line per field and gene."""
    with open(path, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        writer.writeheader()
        writer.writerows(table)


def _numbers(rows: FieldRows) -> tuple[np.ndarray, np.ndarray]:
    """Labels and predictions as numbers, nan where there is none."""
    if rows.kind == "number":
        return rows.label, rows.prediction if rows.baseline.has_number else np.full(len(rows), np.nan)
    table = rows.baseline.token_values
    if table is None:
        return np.full(len(rows), np.nan), np.full(len(rows), np.nan)
    return tuple(_of_tokens(values.astype(np.int64), table) for values in (rows.label, rows.prediction))


def _of_tokens(tokens: np.ndarray, table: np.ndarray) -> np.ndarray:
    return np.where(tokens < len(table), table[np.minimum(tokens, len(table) - 1)], np.nan)
