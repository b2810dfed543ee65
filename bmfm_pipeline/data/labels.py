"""Label dictionaries: the class ids of every label column, kept in a JSON file that never goes stale unseen."""

from pathlib import Path

import numpy as np
import pandas as pd

from bmfm_pipeline.errors import DataError
from bmfm_pipeline.storage import read_json, write_json_atomic

LabelDict = dict[str, dict[str, int]]


def class_names(values: pd.Series, separator: str | None = None) -> list[str]:
    """Sorted distinct names of a label column; missing values are no class. With a separator each cell may carry several."""
    texts = values.dropna().astype(str)
    if separator is not None:
        texts = texts.str.split(separator, regex=False).explode()
    return sorted({text for text in texts if text not in ("nan", "")})


def build_label_dict(obs: pd.DataFrame, label_columns, path: str | Path | None = None) -> LabelDict:
    """{column: {class name: id}} for every column of `label_columns`, ids in alphabetical order; regression columns are {"0": 0}.

    A column that the file at `path` already has keeps its ids. A label of the data that the file does not know is a DataError
    that says how to extend it: silently renumbering would give trained heads another meaning.
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
            lines = ", ".join(f'"{value}": {highest + 1 + index}' for index, value in enumerate(unknown))
            raise DataError(
                f"{path}: label column '{name}' holds labels that the dictionary does not know: {', '.join(unknown[:10])}. "
                f"To keep the present ids and add these, append to its label_values: {lines}. To start anew, name another file"
            )
    return result


def labels_unseen_in_training(obs: pd.DataFrame, split: pd.Series, columns: list[str]) -> dict[str, dict[str, int]]:
    """{column: {class: cells}} of classes that dev or test cells have and no training cell has: no model can learn them."""
    in_train = np.asarray(split) == "train"
    found: dict[str, dict[str, int]] = {}
    for column in columns:
        values = obs[column]
        elsewhere = values[~in_train].dropna().astype(str).value_counts()
        learned = set(values[in_train].dropna().astype(str))
        if missing := {name: int(count) for name, count in elsewhere.items() if name not in learned and count}:
            found[column] = missing
    return found


def read_label_dict(path: str | Path) -> LabelDict:
    """Read `[{"label_name": ..., "label_values": {name: id}}, ...]`."""
    stored = read_json(path)
    try:
        return {
            entry["label_name"]: {str(name): int(index) for name, index in entry["label_values"].items()}
            for entry in stored
        }
    except (TypeError, KeyError, AttributeError):
        raise DataError(
            f'{path}: not a label dictionary; expected [{{"label_name": NAME, "label_values": {{CLASS: ID}}}}]'
        ) from None


def write_label_dict(path: str | Path, labels: LabelDict) -> None:
    entries = [{"label_name": name, "label_values": values} for name, values in labels.items()]
    write_json_atomic(Path(path), entries)
