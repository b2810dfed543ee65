"""From a plan to the split of every cell."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bmfm_pipeline.config.splits import PLACE, SplitPlan
from bmfm_pipeline.data.label_files import few
from bmfm_pipeline.data.splits import drawing
from bmfm_pipeline.data.splits.columns import class_codes, column_of, group_codes
from bmfm_pipeline.data.splits.few_shot import reduce_training
from bmfm_pipeline.data.splits.given import from_column, from_earlier, from_table
from bmfm_pipeline.errors import DataError

SPLITS = ("train", "dev", "test")
# Unlabelled cells are a class of their own when there are enough of them for three splits.
FEWEST = 3


@dataclass
class Split:
    """`assigned`: train, dev, test or unused for each cell; `notes`: what was noticed on the way, for the record."""

    assigned: pd.Series
    notes: dict[str, Any] = field(default_factory=dict)


def make_split(
    obs: pd.DataFrame, *, weights: dict[str, float], stratify: str | None, seed: int, column: str | None = None
) -> pd.Series:
    """'train', 'dev' or 'test' for each row of `obs`.

    `weights` are the shares of the three, a mapping or the config's section. An existing `column` is taken as it is.
    Stratified: scikit-learn's StratifiedShuffleSplit, test first, then dev out of the rest; cells without a label are a
    class of their own, or stay in train when there are only one or two. Random: an independent draw per cell from
    numpy's default_rng(seed). Raises DataError naming classes that are too small.
    """
    if column is not None:
        return assign_split(obs, SplitPlan("column", seed, column=column)).assigned
    method = "random" if stratify is None else "stratified"
    return assign_split(obs, SplitPlan(method, seed, weights=_shares(weights), stratify=stratify)).assigned


def assign_split(obs: pd.DataFrame, plan: SplitPlan, given: Path | None = None) -> Split:
    """The split of every row of `obs` (cells, unique names).

    `given` is the csv file of a plan that names one (method file or reuse). Raises DataError when the cells cannot be
    divided as the plan wants, when a split that it wants would be empty, or when a group has cells in two splits.
    """
    if not len(obs):
        raise DataError("there are no cells to split")
    notes: dict[str, Any] = {}
    if plan.method == "column":
        assigned, notes = from_column(obs, plan.column, plan.mapping)
    elif plan.method == "file":
        assigned, notes = from_table(obs, given, plan.mapping)
    elif plan.method == "reuse":
        assigned, notes = from_earlier(obs, given, plan.reuse)
    elif plan.method == "random":
        shares = [plan.weights[name] for name in SPLITS]
        drawn = np.random.default_rng(plan.seed).choice(SPLITS, size=len(obs), p=shares)
        assigned = pd.Series(drawn, index=obs.index, dtype=object)
    else:
        assigned = _drawn(obs, plan, notes)
    if plan.method in ("column", "file") and plan.dev_fraction:
        assigned = _dev_out_of_train(obs, assigned, plan, notes)
    _refuse_empty(assigned, plan)
    if plan.group is not None:
        _refuse_divided_groups(obs, assigned, plan.group)
    assigned, reduced = reduce_training(obs, assigned, plan)
    return Split(assigned, notes | reduced)


def _shares(weights) -> dict[str, float]:
    """Weights given as a mapping or as the config's section."""
    shares = dict(weights)
    if set(shares) != set(SPLITS) or min(shares.values()) < 0 or abs(sum(shares.values()) - 1) > 1e-6:
        raise DataError(f"split_weights: train, dev and test must be given, none negative, with sum 1; found {shares}")
    return shares


def _drawn(obs: pd.DataFrame, plan: SplitPlan, notes: dict[str, Any]) -> pd.Series:
    """A test set (a share or a fold), then dev out of the rest."""
    weights = plan.weights or {}
    dev = plan.dev_fraction
    if dev is None:
        rest = weights["dev"] + weights["train"]
        dev = weights["dev"] / rest if rest else 0.0
    rounds = [("test", weights.get("test", 1.0)), ("dev", dev)]
    groups = classes = names = None
    if plan.group is not None:
        groups, group_names = group_codes(obs, plan.group)
        wanted = plan.n_folds or sum(share > 0 for _, share in rounds) + 1
        if len(group_names) < wanted:
            raise DataError(
                f"{PLACE}: obs['{plan.group}'] has {len(group_names)} groups ({few(group_names, 5)}), which stay whole, and {wanted} are needed"
                + (f" for n_folds={plan.n_folds}; use at most {len(group_names)} folds" if plan.n_folds else "")
                + (
                    ""
                    if plan.n_folds
                    else f" for {_listed(rounds)}; set the share of one of them to 0, or leave group out"
                )
            )
    if plan.stratify is not None:
        values = column_of(obs, plan.stratify, "stratifying label")
        classes, names = class_codes(values)
    left = np.arange(len(obs))
    if classes is not None and groups is None:
        left = _large_enough(left, values, classes, names, plan, [share for _, share in rounds if share > 0], notes)
    assigned = np.full(len(obs), "train", dtype=object)
    for name, share in rounds:
        if share <= 0:
            continue
        here = None if classes is None else classes[left], None if groups is None else groups[left]
        if name == "test" and plan.n_folds is not None:
            kept, taken = _both(_folds(len(left), *here, plan) == plan.fold)
        else:
            kept, taken = _draw(len(left), *here, share, name, plan)
        assigned[left[taken]] = name
        left = left[kept]
    return pd.Series(assigned, index=obs.index, dtype=object)


def _large_enough(
    left, values, classes, names, plan: SplitPlan, shares: list[float], notes: dict[str, Any]
) -> np.ndarray:
    """The rows that a stratified split divides; the others stay in train."""
    missing = values.isna().to_numpy()
    if 0 < missing.sum() < FEWEST:
        left = left[~missing]
        notes["unlabelled_kept_in_train"] = int(missing.sum())
    if not shares:
        return left
    present, codes = np.unique(classes[left], return_inverse=True)
    rounds = len(shares) if plan.n_folds is None else sum(share > 0 for share in shares[1:])
    fewest = drawing.smallest_class(plan.n_folds, rounds)
    if plan.n_folds is not None:
        shares = [1 / plan.n_folds, *shares[1:]]
    small = drawing.too_small(codes, names[present], fewest, plan.stratify, plan.rare_classes, shares)
    if small.any():
        sizes = np.bincount(codes)
        notes["rare_classes_kept_in_train"] = {
            str(names[present[code]]): int(sizes[code]) for code in np.flatnonzero(small)
        }
    return left[~small[codes]]


def _folds(n: int, classes: np.ndarray | None, groups: np.ndarray | None, plan: SplitPlan) -> np.ndarray:
    if n < plan.n_folds:
        raise DataError(f"{PLACE}: n_folds={plan.n_folds} for {n} cells; use fewer folds")
    if groups is not None:
        if classes is not None:
            return drawing.stratified_group_folds(groups, classes, plan.n_folds, plan.seed)
        return drawing.group_folds(groups, plan.n_folds, plan.seed)
    if classes is not None:
        return drawing.stratified_folds(classes, plan.n_folds, plan.seed)
    return drawing.cell_folds(n, plan.n_folds, plan.seed)


def _both(taken: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.flatnonzero(~taken), np.flatnonzero(taken)


def _draw(n: int, classes, groups, share: float, name: str, plan: SplitPlan) -> tuple[np.ndarray, np.ndarray]:
    """(left, drawn): row numbers of `n` cells, those drawn become `name`."""
    if groups is not None:
        if len(np.unique(groups)) < 2:
            raise DataError(
                f"{PLACE}: {name} needs a group of obs['{plan.group}'] of its own, and train only has one left; set the share of {name} to 0"
            )
        return _both(drawing.draw_groups(groups, share, plan.seed, classes))
    if classes is None:
        return _both(drawing.draw_cells(n, share, plan.seed))
    try:
        return drawing.draw_stratified(classes, share, plan.seed)
    except ValueError as error:
        raise DataError(
            f"obs['{plan.stratify}']: cannot be split in {name} and rest ({error}); use a larger share ({PLACE}.weights), keep small classes "
            f"in training with {PLACE}.rare_classes=train, or take a random split ({PLACE}.method=random)"
        ) from None


def _dev_out_of_train(obs: pd.DataFrame, assigned: pd.Series, plan: SplitPlan, notes: dict[str, Any]) -> pd.Series:
    """Dev cells for a given split that has none, drawn from its training cells."""
    if (assigned == "dev").any():
        raise DataError(
            f"{PLACE}.dev_fraction: the split has {(assigned == 'dev').sum()} dev cells already; leave dev_fraction out"
        )
    rows = np.flatnonzero(assigned.to_numpy() == "train")
    part = obs.iloc[rows]
    weights = {"train": 1 - plan.dev_fraction, "dev": plan.dev_fraction, "test": 0.0}
    inner = SplitPlan("", plan.seed, weights=weights, stratify=plan.stratify, group=plan.group, rare_classes="train")
    drawn = _drawn(part, inner, notes)
    changed = assigned.copy()
    changed.iloc[rows] = drawn.to_numpy()
    return changed


def _refuse_empty(assigned: pd.Series, plan: SplitPlan) -> None:
    counts = assigned.value_counts()
    wanted = {"train": 1.0} | {name: share for name, share in (plan.weights or {}).items() if share > 0}
    if plan.method == "kfold":
        wanted |= {"test": 1 / plan.n_folds} | ({"dev": plan.dev_fraction} if plan.dev_fraction else {})
    empty = [name for name in wanted if not counts.get(name, 0)]
    if empty and plan.weights is not None and not plan.weights["train"]:
        raise DataError(f"{PLACE}.weights: train is 0, so no cell could be learned from; give it a share above 0")
    if empty:
        shares = ", ".join(f"{name} {share:g}" for name, share in (plan.weights or {}).items())
        raise DataError(
            f"{PLACE}: {' and '.join(empty)} would be empty ({len(assigned)} cells"
            + (f", shares {shares}" if shares else "")
            + "); give more cells or another share, or 0 for a split that is not wanted"
        )


def _refuse_divided_groups(obs: pd.DataFrame, assigned: pd.Series, group: str) -> None:
    codes, names = group_codes(obs, group)
    pairs = np.unique(np.stack([codes, pd.factorize(assigned)[0]])[:, (assigned != "unused").to_numpy()], axis=1)
    divided = np.flatnonzero(np.bincount(pairs[0], minlength=len(names)) > 1)
    if len(divided):
        raise DataError(
            f"{PLACE}: {len(divided)} of {len(names)} groups in obs['{group}'] have cells in more than one of train, dev and test, e.g. "
            f"{few(names[divided], 5)}; correct the split, or leave group out to use it as it is"
        )


def _listed(rounds: list[tuple[str, float]]) -> str:
    return ", ".join(["train", *(name for name, share in rounds if share > 0)])
