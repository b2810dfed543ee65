"""What an h5ad file holds, in words: before anyone decides what to run on it."""

from typing import Any

import numpy as np

from bmfm_pipeline.data.sources.checks import where_counts_lie
from bmfm_pipeline.data.sources.gene_names import looks_transposed

SHOWN_CLASSES, MOST_CLASSES = 6, 200


def describe_file(source) -> dict[str, Any]:
    """Shape, kind of values (from the first cells), gene names and obs columns of an opened source, with advice."""
    columns = [{"name": str(name), "what": _column(source.obs[name])} for name in source.obs.columns]
    labels = [entry["name"] for entry in columns if " classes" in entry["what"]]
    values, whole = _values(source)
    advice = []
    if swapped := looks_transposed(source.obs_names, source.var_names):
        advice.append(swapped)
    if not whole:
        advice.append(f"counts are needed{where_counts_lie(source)}")
    if len(set(source.var_names)) < source.n_genes:
        advice.append("gene names repeat: add data_module.transform_kwargs.duplicate_genes=sum (or first)")
    if labels and not advice:
        advice.append(f"run it: bmfm run {source.path} label={labels[0]}")
    return {
        "file": str(source.path),
        "cells": source.n_cells,
        "genes": source.n_genes,
        "matrix": source.where,
        "stored": source.encoding,
        "values": values,
        "gene_examples": [str(name) for name in source.var_names[:5]],
        "layers": [*source.layers, *(["raw"] if source.has_raw else [])],
        "obs": columns,
        "advice": advice,
    }


def _column(values) -> str:
    missing = int(values.isna().sum())
    also = f", {missing} missing" if missing else ""
    distinct = values.dropna().unique()
    if values.dtype.kind in "fiu" and len(distinct) > SHOWN_CLASSES:
        return f"numbers {values.min():.4g} to {values.max():.4g}{also}"
    if len(distinct) > MOST_CLASSES:
        return f"{len(distinct)} different values{also}"
    counts = values.dropna().astype(str).value_counts()
    shown = ", ".join(f"{name} ({count})" for name, count in counts[counts > 0].head(SHOWN_CLASSES).items())
    return f"{len(distinct)} classes: {shown}{', ...' if len(distinct) > SHOWN_CLASSES else ''}{also}"


def _values(source) -> tuple[str, bool]:
    """A sentence on the values of the first cells, and whether they are counts."""
    _, chunk = next(source.iter_chunks(2000), (0, None))
    if chunk is None or not chunk.nnz:
        return "no value above zero in the first cells", False
    data = chunk.data
    whole = bool(np.isfinite(data).all() and (data >= 0).all() and (data == np.rint(data)).all())
    kind = "whole numbers, as counts are" if whole else "not whole numbers: normalised or scaled"
    filled = data.size / (chunk.shape[0] * chunk.shape[1])
    per_cell = float(np.median(np.diff(chunk.indptr)))
    return f"{kind}; {data.min():.4g} to {data.max():.4g}, {per_cell:.0f} genes a cell, {filled:.1%} filled", whole
