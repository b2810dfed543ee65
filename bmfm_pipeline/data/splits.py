"""Splits: every cell is train, dev or test before anything is fitted; seeded, hashed, stored."""

from pathlib import Path

import numpy as np
import pandas as pd

from bmfm_pipeline.errors import DataError
from bmfm_pipeline.storage import hash_bytes, read_json, write_json_atomic, write_text_atomic

SPLITS = ("train", "dev", "test")
# Cells a class needs so that train, dev and test can each have one.
FEWEST = 3


def split_column(stratify: str | None, column: str | None = None) -> str:
    """The obs column that names the split."""
    return column or (f"split_stratified_{stratify}" if stratify else "split_random")


def make_split(
    obs: pd.DataFrame, *, weights: dict[str, float], stratify: str | None, seed: int, column: str | None = None
) -> pd.Series:
    """'train', 'dev' or 'test' for each row of `obs`.

    `weights` are the shares of the three, a mapping or the config's section. An existing `column` is taken as it is. Stratified: scikit-learn's StratifiedShuffleSplit, test first, then dev out of the
    rest; cells without a label are a class of their own, or stay in train when there are only one or two. Random: an independent draw per cell from numpy's default_rng(seed). Raises DataError naming classes that are too small.
    """
    if column is not None:
        return _from_column(obs, column)
    weights = _shares(weights)
    if stratify is None:
        drawn = np.random.default_rng(seed).choice(SPLITS, size=len(obs), p=[weights[name] for name in SPLITS])
        return pd.Series(drawn, index=obs.index, dtype=object)
    return _stratified(obs, weights, stratify, seed)


def _from_column(obs: pd.DataFrame, column: str) -> pd.Series:
    if column not in obs:
        raise DataError(f"split_column_name: obs has no column '{column}'; columns: {', '.join(map(str, obs.columns))}")
    values = obs[column].astype(object)
    strange = sorted({str(value) for value in values if value not in SPLITS})
    if strange:
        raise DataError(f"obs['{column}'] must hold only train, dev and test; found also {', '.join(strange[:10])}")
    return values


def _stratified(obs: pd.DataFrame, weights: dict[str, float], label: str, seed: int) -> pd.Series:
    from sklearn.model_selection import StratifiedShuffleSplit

    if label not in obs:
        raise DataError(f"stratifying label: obs has no column '{label}'; columns: {', '.join(map(str, obs.columns))}")
    classes = obs[label].astype(str).to_numpy()
    assigned = np.full(len(obs), "train", dtype=object)
    rest = np.arange(len(obs))
    missing = obs[label].isna().to_numpy()
    if (
        0 < missing.sum() < FEWEST
    ):  # a handful of unlabelled cells cannot be spread over three splits: they stay in train
        rest = rest[~missing]
    _check_sizes(classes[rest], label, weights)
    for name, share in (("test", weights["test"]), ("dev", weights["dev"] / (weights["dev"] + weights["train"]))):
        if share <= 0:
            continue
        splitter = StratifiedShuffleSplit(n_splits=1, test_size=share, random_state=seed)
        try:
            keep, taken = next(splitter.split(rest, classes[rest]))
        except ValueError as error:
            raise DataError(
                f"obs['{label}']: cannot be split in {name} and rest ({error}); use split_weights or a random split"
            ) from None
        assigned[rest[taken]] = name
        rest = rest[keep]
    return pd.Series(assigned, index=obs.index, dtype=object)


def _shares(weights) -> dict[str, float]:
    """Weights given as a mapping or as the config's section."""
    shares = dict(weights)
    if set(shares) != set(SPLITS) or min(shares.values()) < 0 or abs(sum(shares.values()) - 1) > 1e-6:
        raise DataError(f"split_weights: train, dev and test must be given, none negative, with sum 1; found {shares}")
    return shares


def _check_sizes(classes: np.ndarray, label: str, weights: dict[str, float]) -> None:
    names, counts = np.unique(classes, return_counts=True)
    rounds = sum(weights[name] > 0 for name in ("test", "dev"))
    small = [f"{name} ({count})" for name, count in zip(names, counts, strict=True) if count < max(2, rounds + 1)]
    if rounds and small:
        raise DataError(
            f"obs['{label}']: too few cells to stratify by: {', '.join(small)}; a class needs {max(2, rounds + 1)} cells. Remove those cells "
            "or merge the classes, or split at random (label_columns.0.is_stratification_label=false)"
        )


def write_split(folder: Path, assigned: pd.Series, *, name: str = "split", **made_with) -> dict:
    """Write split.csv (cell, split) and split.json (hash, counts, how it was made); returns the latter."""
    text = "cell,split\n" + "".join(f"{_quoted(cell)},{split}\n" for cell, split in assigned.items())
    write_text_atomic(Path(folder) / "split.csv", text)
    counts = {split: int((assigned == split).sum()) for split in SPLITS}
    made_with = {
        key: dict(value) if key == "weights" and value is not None else value for key, value in made_with.items()
    }
    info = {"hash": hash_bytes(text.encode()), "column": name, "counts": counts, **made_with}
    write_json_atomic(Path(folder) / "split.json", info)
    return info


def _quoted(cell: str) -> str:
    return '"' + cell.replace('"', '""') + '"' if any(sign in cell for sign in ',"\r\n') else cell


def read_split(folder: Path) -> pd.Series:
    table = pd.read_csv(folder / "split.csv", dtype=str, keep_default_na=False)
    return pd.Series(table["split"].to_numpy(dtype=object), index=table["cell"].to_numpy(dtype=object))


def read_split_info(folder: Path) -> dict:
    return read_json(Path(folder) / "split.json")
