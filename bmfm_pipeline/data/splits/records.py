"""The record of a split: split.csv by cell, split.json with how it was made and what it holds."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bmfm_pipeline.config.splits import SplitPlan
from bmfm_pipeline.data.splits.columns import class_codes
from bmfm_pipeline.storage import hash_bytes, read_json, write_json_atomic, write_text_atomic

SPLITS = ("train", "dev", "test")
UNUSED = "unused"
# Columns that often tell whose cells these are.
_PERSONS = re.compile(
    r"(donor|patient|individual|indiv|subject|participant|mouse)(_?(id|name|no|number))?$", re.IGNORECASE
)


def split_column(plan: SplitPlan) -> str:
    """The obs column of the processed cells that names the split."""
    if plan.method == "column":
        changed = plan.mapping or plan.dev_fraction or plan.train_fraction or plan.cells_per_class
        return f"split_{plan.column}" if changed else plan.column
    if plan.method == "perturbation":
        return f"split_perturbation_{plan.perturbations}"
    if plan.method in ("file", "reuse"):
        return f"split_{'file' if plan.method == 'file' else 'reused'}"
    parts = [f"fold_{plan.fold}_of_{plan.n_folds}"] if plan.n_folds else []
    parts += [f"group_{plan.group}"] if plan.group else []
    parts += [f"stratified_{plan.stratify}"] if plan.stratify else []
    return "_".join(["split", *(parts or ["random"])])


def split_sentence(info: dict[str, Any]) -> str:
    """How a split was made, in a line for a report."""
    method, group, stratify = info.get("method"), info.get("group"), info.get("stratify")
    if method == "reuse":
        text = f"the split {info.get('reuse')}, used again"
    elif method in ("column", "file"):
        place = f"the column {info['from_column']}" if method == "column" else f"the file {info.get('file')}"
        text = f"given by {place}"
    elif method == "perturbation":
        held = info.get("notes", {}).get("perturbations", {})
        text = f"whole perturbations ({info.get('perturbations')}), seed {info.get('seed')}: "
        text += ", ".join(f"{split} {len(held.get(split, ()))}" for split in SPLITS)
    else:
        text = f"fold {info['fold']} of {info['n_folds']}, " if method == "kfold" else ""
        text += f"whole groups of {group}" if group else "by cell"
        text += f", balanced over {stratify}" if stratify else ", at random"
        text += f", seed {info.get('seed')}"
    if info.get("train_fraction"):
        text += f"; {info['train_fraction']:.3g} of the training cells"
    if info.get("cells_per_class"):
        text += f"; at most {info['cells_per_class']} training cells a class"
    for name, entry in info.get("groups", {}).items():
        if name == group:
            text += f"; values of {name}: " + ", ".join(f"{split} {entry[split]}" for split in SPLITS)
        elif entry["in_train_and_test"]:
            text += f"; {entry['in_train_and_test']} values of {name} have cells in both train and test"
    return text


def write_split(folder: Path, assigned: pd.Series, column: str = "split", **made_with) -> dict:
    """Write split.csv (cell, split) and split.json (hash, counts, how it was made); returns the latter.

    `column` is the obs column of the processed cells that will name the split.

    The hash is of cell names and splits in the order of names: two files that hold the same cells in another order
    agree.
    """
    lines = [f"{_quoted(cell)},{split}\n" for cell, split in assigned.items()]
    write_text_atomic(Path(folder) / "split.csv", "cell,split\n" + "".join(lines))
    counts = {split: int((assigned == split).sum()) for split in SPLITS}
    if unused := int((assigned == UNUSED).sum()):
        counts[UNUSED] = unused
    info = {"hash": hash_bytes("".join(sorted(lines)).encode()), "column": column, "counts": counts, **made_with}
    write_json_atomic(Path(folder) / "split.json", info)
    return info


def describe_split(obs: pd.DataFrame, assigned: pd.Series, classes: list[str], group: str | None) -> dict[str, Any]:
    """What a split holds: cells by class and split for the columns `classes` and for `group`; groups, and who is on two sides.

    `groups` {column: {split: groups, "in_train_and_test": groups}} is for `group`, and for columns whose names say that
    they hold donors, since a split by cell leaves cells of one donor on both sides.
    """
    splits = np.array([*SPLITS, UNUSED], dtype=object)
    numbers = pd.Categorical(assigned, categories=splits).codes
    counts_by: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    persons = [str(column) for column in obs.columns if _PERSONS.search(str(column)) and column not in classes]
    for column in dict.fromkeys([*classes, *([group] if group else []), *persons]):
        if column not in obs:
            continue
        codes, names = class_codes(obs[column])
        table = np.bincount(codes * len(splits) + numbers, minlength=len(names) * len(splits)).reshape(-1, len(splits))
        if column in classes or column == group:
            counts_by[column] = {
                str(name): {str(split): int(count) for split, count in zip(splits, row, strict=True) if count}
                for name, row in zip(names, table, strict=True)
            }
        if column == group or (column in persons and 1 < len(names) <= len(obs) // 2):
            present = table > 0
            groups[column] = {split: int(present[:, place].sum()) for place, split in enumerate(SPLITS)}
            groups[column]["in_train_and_test"] = int((present[:, 0] & present[:, 2]).sum())
            groups[column]["on_two_sides"] = int((present[:, :3].sum(axis=1) > 1).sum())
    return {"counts_by": counts_by, "groups": groups}


def _quoted(cell: str) -> str:
    return '"' + cell.replace('"', '""') + '"' if any(sign in cell for sign in ',"\r\n') else cell


def read_split(folder: Path) -> pd.Series:
    """The split of every cell, by name, in the order of the data."""
    table = pd.read_csv(Path(folder) / "split.csv", dtype=str, keep_default_na=False)
    return pd.Series(table["split"].to_numpy(dtype=object), index=table["cell"].to_numpy(dtype=object))


def read_split_info(folder: Path) -> dict:
    return read_json(Path(folder) / "split.json")
