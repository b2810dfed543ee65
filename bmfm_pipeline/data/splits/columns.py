"""Columns of obs as integer codes."""

import numpy as np
import pandas as pd

from bmfm_pipeline.config.splits import PLACE
from bmfm_pipeline.data.label_files import few
from bmfm_pipeline.errors import DataError, closest


def nearest_column(column: str, columns: list[str]) -> str:
    """The advice that belongs behind the name of a column that is not there; empty where none is like it."""
    close = closest(column, columns, 0.5)
    return f"; did you mean '{close}'?" if close else ""


def column_of(obs: pd.DataFrame, column: str, key: str) -> pd.Series:
    """obs[column]; DataError with the nearest name when there is none."""
    if column in obs:
        return obs[column]
    columns = [str(name) for name in obs.columns]
    raise DataError(
        f"{key}: obs has no column '{column}'{nearest_column(column, columns)}; columns: {few(columns, 30) or 'none'}"
    )


def class_codes(values: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    """(code of each cell, names) with names sorted as text; missing values are a class of their own, "nan"."""
    codes, names = pd.factorize(values.astype(str).to_numpy(dtype=object), sort=True)
    return codes, np.asarray(names, dtype=object)


def group_codes(obs: pd.DataFrame, column: str) -> tuple[np.ndarray, np.ndarray]:
    """As class_codes for groups that must stay whole: every cell needs one, and there must be at least two."""
    values = column_of(obs, column, f"{PLACE}.group")
    missing = values.isna().to_numpy() | (values.astype(str) == "").to_numpy()
    if missing.any():
        raise DataError(
            f"{PLACE}.group: {missing.sum()} of {len(obs)} cells have no value in obs['{column}'], e.g. {few(obs.index[missing], 5)}; "
            "give them one (a group 'unknown' of their own is one), or remove those cells"
        )
    codes, names = class_codes(values)
    if len(names) < 2:
        raise DataError(
            f"{PLACE}.group: all {len(obs)} cells have the same value in obs['{column}'], '{names[0]}'; whole groups cannot be divided "
            "when there is one. Name another column, or leave group out"
        )
    return codes, names
