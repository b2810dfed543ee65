"""Which test cells belong together, such as those of one donor: they are no independent observations, so they are drawn together."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bmfm_pipeline.data.label_values import missing_mask
from bmfm_pipeline.errors import ConfigError
from bmfm_pipeline.storage import read_json, write_json_atomic

FILE = "groups.json"
FEW_GROUPS = 20


def check_group_column(store, column: str | None) -> None:
    """ConfigError where the data have no such obs column."""
    if column is not None and column not in store.obs_columns:
        raise ConfigError(
            f"evaluation.group_column: the processed data have no obs column '{column}'; there are "
            f"{', '.join(sorted(store.obs_columns)) or 'none'}. Name one of them, or leave it out for that of the split, if any"
        )


def groups_of_cells(store, column: str | None, cells: Sequence[str]) -> tuple[np.ndarray | None, list[str]]:
    """(the group of each test cell, what to say about it); None where cells count one by one.

    A cell whose column says nothing is a group of its own.
    """
    if column is None:
        return None, []
    position = {name: row for row, name in enumerate(store.obs_names)}
    values = store.column(column)[[position[cell] for cell in cells]]
    missing = missing_mask(values)
    groups = np.array([str(value) for value in values], dtype=object)
    groups[missing] = [f"{column} of {cell} is missing" for cell, gone in zip(cells, missing, strict=True) if gone]
    count = len(set(groups[~missing]))
    notes = []
    if missing.any():
        notes.append(
            f"intervals: {int(missing.sum())} of {len(cells)} test cells have no {column} and count one by one"
        )
    if len(set(groups)) < 2:
        return None, [f"intervals: all test cells have the same {column}, so they say nothing about other values of it"]
    few = "; with so few, they are rough and tend to be too narrow" if count < FEW_GROUPS else ""
    return groups, [*notes, f"intervals resample whole values of {column}, of which the test cells have {count}{few}"]


def donors_not_respected(split: dict[str, Any], column: str | None) -> list[str]:
    """What to say where obs has a column of donors, by its name, that neither the split nor evaluation.group_column takes up."""
    if column is not None:
        return []
    return [
        f"intervals take test cells as independent, but they are of {entry['test']} values of {name}: those are about other cells of the "
        f"same {name}; evaluation.group_column={name} resamples whole ones"
        for name, entry in split.get("groups", {}).items()
        if entry.get("test", 0) > 1
    ]


def write_groups(folder: Path, column: str | None, groups: np.ndarray | None) -> None:
    """groups.json: the group of each cell of predictions.parquet, in its order; column null where cells count one by one."""
    if groups is None:
        write_json_atomic(folder / FILE, {"column": None})
        return
    names, codes = np.unique(groups.astype(str), return_inverse=True)
    write_json_atomic(folder / FILE, {"column": column, "names": names.tolist(), "codes": codes.tolist()})


def read_groups(folder: Path) -> tuple[str | None, np.ndarray | None]:
    """(column, groups (n,)) as write_groups wrote them; (None, None) where cells count one by one, or nothing was written."""
    found = read_json(folder / FILE) if (folder / FILE).exists() else {"column": None}
    if found["column"] is None:
        return None, None
    return found["column"], np.array(found["names"], dtype=object)[found["codes"]]
