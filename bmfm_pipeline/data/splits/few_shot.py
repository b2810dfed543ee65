"""Fewer training cells: a balanced part of them, each larger part containing the smaller ones."""

import hashlib

import numpy as np
import pandas as pd

from bmfm_pipeline.config.splits import PLACE, SplitPlan
from bmfm_pipeline.data.splits.columns import class_codes, column_of
from bmfm_pipeline.errors import DataError


def reduce_training(obs: pd.DataFrame, assigned: pd.Series, plan: SplitPlan) -> tuple[pd.Series, dict]:
    """`assigned` with part of its training cells marked unused; dev and test stay as they are.

    Cells of a class come in an order that (seed, cell name) fixes, and the first ones are kept: 10 % is a part of 25 %,
    and a cell's place does not depend on which other cells there are. `train_fraction` keeps at least one cell of each
    class, cells without a label being a class; `cells_per_class` keeps labelled cells only.
    """
    if plan.train_fraction is None and plan.cells_per_class is None:
        return assigned, {}
    rows = np.flatnonzero(assigned.to_numpy() == "train")
    if plan.classes is not None:
        values = column_of(obs, plan.classes, "label_columns").iloc[rows]
        codes, names = class_codes(values)
        unlabelled = values.isna().to_numpy()
    else:
        codes, names, unlabelled = (
            np.zeros(len(rows), dtype=np.int64),
            np.array(["all"]),
            np.zeros(len(rows), dtype=bool),
        )
    place = np.array([_place(plan.seed, name) for name in obs.index[rows]], dtype=np.uint64)
    order = np.lexsort((place, codes))
    sizes = np.bincount(codes, minlength=len(names))
    rank = np.empty(len(rows), dtype=np.int64)
    rank[order] = np.arange(len(rows)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    if plan.train_fraction is not None:
        kept = rank < np.maximum(1, np.floor(plan.train_fraction * sizes + 0.5))[codes]
    else:
        kept = (rank < plan.cells_per_class) & ~unlabelled
    if not kept.any():
        raise DataError(f"{PLACE}: no training cell has a label in obs['{plan.classes}'], so none can be kept")
    reduced = assigned.copy()
    reduced.iloc[rows[~kept]] = "unused"
    note = {"training_cells_before": len(rows), "training_cells_kept": int(kept.sum())}
    if plan.cells_per_class is not None:
        short = sizes < plan.cells_per_class
        short[np.unique(codes[unlabelled])] = False
        note["classes_with_fewer_cells"] = {str(names[code]): int(sizes[code]) for code in np.flatnonzero(short)}
    return reduced, note


def _place(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest(), "little")
