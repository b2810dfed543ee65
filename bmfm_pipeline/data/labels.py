"""Label dictionaries: the class ids of every label column, kept in a JSON file that never goes stale unseen."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bmfm_pipeline.data.label_files import LabelDict, few, read_label_dict
from bmfm_pipeline.data.label_values import is_missing, members, missing_mask
from bmfm_pipeline.errors import DataError


def class_names(values: pd.Series, separator: str | None = None) -> list[str]:
    """Sorted distinct names of a label column; missing values are no class. With a separator each cell may carry several."""
    texts = [str(value) for value in values.dropna().unique() if not is_missing(value)]
    if separator is not None:
        texts = [name for text in texts for name in members(text, separator)]
    return sorted(set(texts))


def build_label_dict(obs: pd.DataFrame, label_columns, path: str | Path | None = None) -> LabelDict:
    """{column: {class name: id}} for all `label_columns`, ids in alphabetical order; regression columns are {"0": 0}.

    A column that the file at `path` already has keeps its ids, and columns of the file that are not asked for stay. A
    label of the data that the file does not know is a DataError that says how to extend it: silently renumbering would
    give trained heads another meaning.
    """
    stored = read_label_dict(path) if path and Path(path).exists() else {}
    result: LabelDict = dict(stored)
    for column in label_columns:
        name = column.label_column_name
        if column.is_regression_label:
            result[name] = {"0": 0}
            continue
        names = class_names(obs[name], column.multilabel_str_sep if column.is_multilabel else None)
        if name not in stored:
            result[name] = {value: index for index, value in enumerate(names)}
            continue
        silent = set(column.silent_label_values or [])
        if unknown := [value for value in names if value not in stored[name] and value not in silent]:
            highest = max(stored[name].values(), default=-1)
            lines = few(f'"{value}": {highest + 1 + index}' for index, value in enumerate(unknown))
            raise DataError(
                f"{path}: label column '{name}' holds labels that the dictionary does not know: {few(unknown)}. "
                f"To keep the present ids and add these, append to its label_values: {lines}. To start anew, name another file"
            )
    return result


def count_labels(obs: pd.DataFrame, label_columns, labels: LabelDict) -> dict[str, dict[str, Any]]:
    """For the report, by column: cells without a label, cells with a silent one, classes, and classes that no cell has."""
    found = {}
    for column in label_columns:
        values = obs[column.label_column_name]
        counts: dict[str, Any] = {"missing": int(missing_mask(values).sum())}
        if column.silent_label_values:
            counts["silent"] = int(values.astype(str).isin([str(value) for value in column.silent_label_values]).sum())
        if not column.is_regression_label:
            known = labels[column.label_column_name]
            present = set(class_names(values, column.multilabel_str_sep if column.is_multilabel else None))
            counts["classes"] = len(known)
            counts["classes_without_cells"] = sorted(known.keys() - present)
        found[column.label_column_name] = counts
    return found


def empty_or_none(obs: pd.DataFrame, label_columns) -> list[str]:
    """A sentence for each column of several classes where an empty value, which means unknown, may have been meant as none of them."""
    said = []
    for column in label_columns:
        if not column.is_multilabel:
            continue
        values, separator = obs[column.label_column_name], column.multilabel_str_sep
        missing = missing_mask(values)
        if missing.any() and all(members(str(value), separator) for value in values[~missing].unique()):
            said.append(
                f"{column.label_column_name}: {int(missing.sum()):,} of {len(values):,} rows are empty, so their classes count as unknown: they are "
                f"neither learned nor scored. Of a row that has none of the classes write the separator alone, {separator!r}"
            )
    return said


def labels_unseen_in_training(
    obs: pd.DataFrame, split: pd.Series, columns: list[str], separators: dict[str, str] | None = None
) -> dict[str, dict[str, int]]:
    """{column: {class: cells}} of classes that dev or test cells have and no training cell: no model can learn them.

    `separators` names the columns whose cells may carry several classes.
    """
    splits = np.asarray(split)
    in_train, scored = splits == "train", np.isin(splits, ("dev", "test"))
    found: dict[str, dict[str, int]] = {}
    for column in columns:
        separator = (separators or {}).get(column)
        learned = set(class_names(obs[column][in_train], separator))
        unseen: dict[str, int] = {}
        for value, count in obs[column][scored].value_counts().items():
            if is_missing(value) or not count:
                continue
            for name in [str(value)] if separator is None else members(str(value), separator):
                if name not in learned:
                    unseen[name] = unseen.get(name, 0) + int(count)
        if unseen:
            found[column] = unseen
    return found
