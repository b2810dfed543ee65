"""Fewer training cells: a balanced part of them, each larger part containing the smaller ones."""

import hashlib
from collections.abc import Sequence

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
    sizes = np.bincount(codes, minlength=len(names))
    if plan.train_fraction is not None:
        kept = part_of_each_class(obs.index[rows], codes, plan.train_fraction, plan.seed)
    else:
        rank = _rank_in_class(obs.index[rows], codes, plan.seed)
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


def part_of_each_class(names: Sequence[str], codes: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """True for the cells of a `fraction` (0..1) of each class, at least one cell of each; bool (cells,).

    `codes` (cells,) are classes 0, 1, ...; the order in a class is fixed by (seed, cell name), so that a larger fraction contains the
    smaller ones.
    """
    sizes = np.bincount(codes)
    return _rank_in_class(names, codes, seed) < np.maximum(1, np.floor(fraction * sizes + 0.5))[codes]


def _rank_in_class(names: Sequence[str], codes: np.ndarray, seed: int) -> np.ndarray:
    place = np.array([_place(seed, name) for name in names], dtype=np.uint64)
    order = np.lexsort((place, codes))
    sizes = np.bincount(codes)
    rank = np.empty(len(codes), dtype=np.int64)
    rank[order] = np.arange(len(codes)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return rank


def _place(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest(), "little")
