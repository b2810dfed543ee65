"""What is wrong with an input, said all at once and before anything is computed."""

from typing import Any

import numpy as np

from bmfm_pipeline.data.label_files import few
from bmfm_pipeline.data.label_values import is_missing, missing_mask, not_numbers
from bmfm_pipeline.data.sources.gene_names import looks_transposed
from bmfm_pipeline.data.sources.h5ad import CellSource, open_source
from bmfm_pipeline.data.splits.columns import nearest_column
from bmfm_pipeline.errors import DataError

SHOWN = 5
# Logarithms of normalised counts are smaller: log2 of a million is 20.
LARGEST_LOG = 20
# Stands between the name of an input and the list of what is wrong with it.
UNUSABLE = " cannot be used:"


def check_source(
    source: CellSource,
    labels: list[tuple[str, bool]] = (),
    *,
    need_counts: bool = True,
    log_normalised: bool = False,
    stratify: str | None = None,
    min_class_size: int = 3,
    duplicate_genes: str = "refuse",
    values: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Look at names, labels and every stored value of `source`.

    `labels` lists (obs column, is it a regression target); `values` is what is known of the values already, which then are not
    read. With `log_normalised` they must look like logarithms of normalised counts. Returns counts for the report, and `gene_totals`, float64 (genes,).
    Raises one DataError that lists every problem, each with its place and what would be right.
    """
    problems: list[str] = []
    if 0 in source.shape:
        what = "cells" if source.n_cells == 0 else "genes"
        raise DataError(
            f"{source.path}: {source.where} is empty: {source.n_cells} cells x {source.n_genes} genes, no {what}; "
            "check the step that wrote the file"
        )
    if len(source.obs) != source.n_cells or len(source.var_names) != source.n_genes:
        raise DataError(
            f"{source.path}: {source.where} is {source.n_cells} x {source.n_genes}, but obs has {len(source.obs)} rows and var {len(source.var_names)}; "
            "the file is damaged"
        )
    check_names(source, duplicate_genes, problems)
    if swapped := looks_transposed(source.obs_names, source.var_names):
        problems.append(swapped)
    report: dict[str, Any] = {
        "file": str(source.path),
        "matrix": source.where,
        "cells": source.n_cells,
        "genes": source.n_genes,
    }
    for column, is_regression in labels:
        report.setdefault("labels", {})[column] = _check_label(
            source, column, is_regression, column == stratify, min_class_size, problems
        )
    if stratify is not None and stratify not in [column for column, _ in labels]:
        _check_label(source, stratify, False, True, min_class_size, problems)
    report.update(_check_values(source, need_counts, log_normalised, problems) if values is None else values)
    if problems:
        raise DataError(f"{source.path}{UNUSABLE}\n" + "\n".join(f"- {problem}" for problem in problems))
    return report


def check_names(source: CellSource, duplicate_genes: str, problems: list[str]) -> None:
    import pandas as pd

    for what, names in (("cell names (obs)", source.obs_names), ("gene names (var)", source.var_names)):
        index = pd.Index(names)
        twice = [] if index.is_unique else list(dict.fromkeys(index[index.duplicated()].astype(str)))
        if not twice or (what.startswith("gene") and duplicate_genes != "refuse"):
            continue
        cure = (
            source.cell_names_cure
            if what.startswith("cell")
            else "merge them with data_module.transform_kwargs.duplicate_genes=sum (or first), or rename them"
        )
        problems.append(
            f"{len(twice)} duplicate {what}: {', '.join(twice[:SHOWN])}{' ...' if len(twice) > SHOWN else ''}; {cure}"
        )


def _check_label(
    source: CellSource, column: str, is_regression: bool, stratified: bool, min_class_size: int, problems: list[str]
) -> dict[str, Any]:
    if column not in source.obs:
        columns = [str(name) for name in source.obs.columns]
        hint = nearest_column(column, columns)
        problems.append(f"obs has no label column '{column}'{hint} (columns: {few(columns, 30) or 'none'})")
        return {}
    values = source.obs[column]
    missing = int(missing_mask(values).sum())
    if is_regression:
        if bad := not_numbers(values):
            problems.append(
                f"obs['{column}'] is a regression label, but holds {bad}; numbers are needed, or nothing where unknown"
            )
        if missing == len(values):
            problems.append(f"obs['{column}'] holds no numbers: every value is missing")
        return {"missing": missing}
    counts = {str(name): count for name, count in values.value_counts().items() if count and not is_missing(name)}
    if not counts:
        problems.append(f"obs['{column}'] holds no labels: every value is missing")
    small = [f"'{name}' ({count})" for name, count in counts.items() if count < min_class_size]
    if stratified and small:
        problems.append(
            f"obs['{column}']: classes with fewer than {min_class_size} cells cannot be stratified over train, dev and test: {few(small, SHOWN)}; "
            "keep them in training (data_module.transform_kwargs.split.rare_classes=train), remove those cells, merge the classes, or split "
            "at random (label_columns.0.is_stratification_label=false)"
        )
    return {"classes": len(counts), "missing": missing, "smallest": min(counts.values(), default=0)}


def _check_values(source: CellSource, need_counts: bool, log_normalised: bool, problems: list[str]) -> dict[str, Any]:
    negative = broken = fractional = empty = 0
    broken_cells: set[int] = set()
    empty_names: list[str] = []
    largest = 0.0
    example = None
    gene_totals = np.zeros(source.n_genes)
    for start, chunk in source.iter_chunks():
        values = chunk.data
        finite = np.isfinite(values)
        if not finite.all():
            rows = np.repeat(np.arange(chunk.shape[0]), np.diff(chunk.indptr))[~finite]
            broken += int((~finite).sum())
            broken_cells.update((start + np.unique(rows)).tolist())
            values = values[finite]
        if len(values):
            largest = max(largest, float(values.max()))
            negative += int((values < 0).sum()) if values.min() < 0 else 0
        whole = values == np.rint(values)
        if not whole.all():
            off = values[~whole]
            fractional += len(off)
            example = float(off[0]) if example is None else example
        gene_totals += chunk.T @ np.ones(chunk.shape[0])
        nothing = np.flatnonzero(np.diff(chunk.indptr) == 0)
        empty += len(nothing)
        empty_names += [str(source.obs.index[start + row]) for row in nothing[: SHOWN - len(empty_names)]]
    if broken:
        problems.append(
            f"{source.where}: {broken} values are NaN or infinite, in {len(broken_cells)} cells, "
            f"e.g. {', '.join(str(source.obs.index[row]) for row in sorted(broken_cells)[:SHOWN])}; set them to zero or remove those cells"
        )
    if negative:
        problems.append(
            f"{source.where}: {negative} values are negative; counts are needed (scaled data cannot be turned back){where_counts_lie(source)}"
        )
    elif need_counts and fractional:
        guess = "they look log-normalised" if largest < LARGEST_LOG else "they look normalised"
        problems.append(
            f"{source.where}: {fractional} values are not whole numbers, e.g. {example:.4g}; {guess}, and counts are needed{where_counts_lie(source)}"
        )
    elif log_normalised and not broken:
        problems += _no_logarithms(source, largest, fractional)
    if not broken and empty == source.n_cells:
        problems.append(f"{source.where}: no cell expresses any gene; every value is zero")
    return {
        "cells_without_counts": empty,
        "cells_without_counts_examples": empty_names,
        "whole_values": not fractional and not broken,
        "max": largest,
        "total": float(gene_totals.sum()),
        "gene_totals": gene_totals,
    }


def _no_logarithms(source: CellSource, largest: float, fractional: int) -> list[str]:
    """What is wrong with values that are said to be log-normalised."""
    if not fractional:
        return [
            f"{source.where}: all values are whole numbers, as counts are, and data_module.transform_kwargs.input_values says log_normalised; "
            "leave it out (counts)"
        ]
    if largest >= LARGEST_LOG:
        return [
            f"{source.where}: values reach {largest:.4g}, more than a logarithm of normalised counts does, and "
            "data_module.transform_kwargs.input_values says log_normalised; take the logarithm first (scanpy.pp.log1p), or set it to any"
        ]
    return []


def where_counts_lie(source: CellSource) -> str:
    """Where whole numbers lie in the same file, as advice."""
    candidates = [name for name in [*source.layers, *(["raw"] if source.has_raw else [])] if name != source.layer]
    for name in candidates:
        try:
            chunk = open_source(source.path, name).first_rows(200)
        except DataError:
            continue
        if (
            len(chunk.data)
            and np.isfinite(chunk.data).all()
            and (chunk.data == np.rint(chunk.data)).all()
            and (chunk.data >= 0).all()
        ):
            where = ".raw" if name == "raw" else f"layer '{name}'"
            return f"; {where} holds counts: set data_module.transform_kwargs.layer={name}"
    return (
        "; no layer of the file holds counts, nor .raw: give the file as it was before normalisation, or, where the logarithm of normalised "
        "counts was taken, set data_module.transform_kwargs.input_values=log_normalised: nothing is then normalised again, and controls read "
        "the values as they are"
    )
