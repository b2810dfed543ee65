"""Several true/false columns of obs as one label column whose cells may have several classes: each column is a class."""

from collections.abc import Sequence

import numpy as np

from bmfm_pipeline.data.label_files import few
from bmfm_pipeline.data.label_values import is_missing
from bmfm_pipeline.data.splits.columns import nearest_column
from bmfm_pipeline.errors import DataError

TRUE, FALSE = ("true", "1", "1.0", "yes"), ("false", "0", "0.0", "no")


def with_gathered_columns(obs, label_columns, where: str):
    """`obs` (a pandas DataFrame) with a column of text for each of `label_columns` that has `from_columns`; `where` names the data.

    The text lists the classes of a cell; a cell without any has the separator alone, and one for which a column says nothing has no
    label. Raises DataError for a column that is not there or holds other values, and for a name that obs has already.
    """
    added = {}
    for column in label_columns:
        if column.from_columns is None:
            continue
        name = column.label_column_name
        if name in obs:
            raise DataError(
                f"{where}: obs has a column '{name}' already, and label_columns gathers {few(column.from_columns)} under that name; "
                "choose another label_column_name"
            )
        flags = [_flags(obs, flag, where) for flag in column.from_columns]
        added[name] = _texts(np.array(flags), column.from_columns, column.multilabel_str_sep)
    return obs.assign(**added) if added else obs


def _texts(flags: np.ndarray, names: Sequence[str], separator: str) -> np.ndarray:
    """object (cells,) of `flags` (columns, cells): 1, 0, or nan where a column says nothing."""
    texts = np.empty(flags.shape[1], dtype=object)
    unknown = np.isnan(flags).any(axis=0)
    for cell, own in enumerate((flags == 1).T):
        texts[cell] = np.nan if unknown[cell] else separator.join(np.array(names)[own]) or separator
    return texts


def _flags(obs, name: str, where: str) -> np.ndarray:
    if name not in obs:
        columns = [str(other) for other in obs.columns]
        raise DataError(
            f"{where}: obs has no column '{name}', which label_columns names under from_columns{nearest_column(name, columns)} "
            f"(columns: {few(columns, 30) or 'none'})"
        )
    known, wrong = {}, []
    for value in obs[name].astype(object).unique():
        text = str(value).strip().lower()
        if is_missing(value) or text in ("nan", "<na>"):
            known[text] = np.nan
        elif text in TRUE or text in FALSE:
            known[text] = float(text in TRUE)
        else:
            wrong.append(repr(value))
    if wrong:
        raise DataError(
            f"{where}: obs['{name}'] is to be a class of its own (from_columns), and holds {few(wrong)}; true or false, 1 or 0 is needed, "
            "or nothing where unknown"
        )
    return obs[name].astype(object).map(lambda value: known[str(value).strip().lower()]).to_numpy(dtype=np.float64)
