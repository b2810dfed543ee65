"""Splits that exist already: a column of obs, a csv file, or the split of an earlier run."""

import re
from pathlib import Path

import numpy as np
import pandas as pd

from bmfm_pipeline.config.splits import PLACE
from bmfm_pipeline.data.label_files import few
from bmfm_pipeline.data.splits.columns import column_of
from bmfm_pipeline.errors import DataError

MEANINGS = ("train", "dev", "test", "unused")
_CELL_COLUMNS = ("cell", "cell_name", "cell_id", "barcode", "obs_name", "obs_names", "index", "unnamed: 0", "")
_GUESSES = (
    (r"tr(ai?n)?(ing)?", "train"),
    (r"val(id(ation)?)?|dev(el(opment)?)?", "dev"),
    (r"te?st(ing)?|held_?out|hold_?out|eval(uation)?", "test"),
    (r"unused|exclu(de|ded)|none|ignore[d]?", "unused"),
)


def from_column(obs: pd.DataFrame, column: str, mapping: dict[str, str] | None) -> tuple[pd.Series, dict]:
    """The values of obs[column] as splits."""
    return _meaning(column_of(obs, column, "split_column_name"), f"obs['{column}']", mapping)


def _meaning(values: pd.Series, where: str, mapping: dict[str, str] | None) -> tuple[pd.Series, dict]:
    """Splits behind `values`: through the mapping, and as they are where they are splits already."""
    codes, names = pd.factorize(values.astype(object).where(values.notna(), "nan").astype(str).to_numpy(dtype=object))
    known = {name: name for name in MEANINGS} | (mapping or {})
    strange = [str(name) for name in names if name not in known]
    if strange:
        counts = np.bincount(codes, minlength=len(names))
        found = few(
            f"{'no value' if name == 'nan' else name} ({count})"
            for name, count in zip(names, counts, strict=True)
            if name not in known
        )
        if not any(_guess(name) for name in map(str, names)):
            raise DataError(
                f"{where} must hold train, dev and test (or unused), but holds no such word: {found}. Name another column, or say what its "
                f"values mean with {PLACE}.mapping={{VALUE: train, ...}}"
            )
        guesses = ", ".join(f"{name}: {_guess(name) or '...'}" for name in strange[:10])
        raise DataError(
            f"{where} must hold only train, dev and test (or unused); found also {found}. Say what they mean, for instance "
            f"'{PLACE}.mapping={{{guesses}}}'"
        )
    notes = {}
    if absent := [name for name in mapping or {} if name not in set(names)]:
        notes["mapping_without_cells"] = absent
    meanings = np.array([known[name] for name in names], dtype=object)
    return pd.Series(meanings[codes], index=values.index, dtype=object), notes


def _guess(value: str) -> str | None:
    word = re.sub(r"[\W\d_]+$", "", value.strip().lower())
    return next((meaning for pattern, meaning in _GUESSES if re.fullmatch(pattern, word)), None)


def read_table(path: str | Path) -> pd.Series:
    """The `split` column of a csv (or tsv) file by cell name, as text. Raises DataError for a file without such columns."""
    path = Path(path)
    try:
        table = pd.read_csv(
            path, sep="\t" if path.suffix in (".tsv", ".txt") else ",", dtype=str, keep_default_na=False
        )
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; {PLACE} needs a csv file with the columns cell and split") from None
    except (ValueError, pd.errors.ParserError) as error:
        raise DataError(f"{path}: is not a csv file ({error}); the columns cell and split are needed") from None
    by_name = {str(name).strip().lower(): name for name in table.columns}
    cells = next((by_name[name] for name in _CELL_COLUMNS if name in by_name), None)
    if "split" not in by_name or cells is None:
        raise DataError(
            f"{path}: needs a header line with the columns cell and split; found {few(table.columns)}. Cells are named as in the h5ad "
            "file (adata.obs_names)"
        )
    series = pd.Series(table[by_name["split"]].to_numpy(dtype=object), index=table[cells].to_numpy(dtype=object))
    twice = series.index[series.index.duplicated()].unique()
    if len(twice):
        raise DataError(f"{path}: {len(twice)} cells are named more than once, e.g. {few(twice, 5)}; name each once")
    return series


def from_table(obs: pd.DataFrame, path: str | Path, mapping: dict[str, str] | None) -> tuple[pd.Series, dict]:
    """Splits by cell name out of a file that names every cell; names that the data do not have are counted."""
    table = read_table(path)
    _all_covered(obs, table, str(path), f"'{obs.index[0]}'" if len(obs) else "")
    splits, notes = _meaning(table.reindex(obs.index), str(path), mapping)
    if beyond := len(table) - len(obs):
        notes["names_not_in_data"] = beyond
    return splits, notes


def from_earlier(obs: pd.DataFrame, path: str | Path, name: str) -> tuple[pd.Series, dict]:
    """The split of an earlier run: it must be of exactly these cells, in whatever order."""
    table = read_table(path)
    what = f"split {name}"
    _all_covered(obs, table, what, f"'{obs.index[0]}'" if len(obs) else "")
    beyond = table.index.difference(obs.index)
    if len(beyond):
        raise DataError(
            f"{what}: names {len(beyond)} cells that these data do not have, e.g. {few(beyond, 5)}; it is of {len(table)} cells, the data "
            f"have {len(obs)}, so scores would not be comparable. Use the data it was made for, or assign these cells all the same with "
            f"{PLACE}.file={path}"
        )
    return _meaning(table.reindex(obs.index), what, None)


def _all_covered(obs: pd.DataFrame, table: pd.Series, where: str, example: str) -> None:
    missing = obs.index[~obs.index.isin(table.index)]
    if not len(missing):
        return
    hint = ""
    if len(missing) == len(obs) and len(table):
        hint = f" Not one name agrees: it has '{table.index[0]}', the data have {example}."
    raise DataError(
        f"{where}: {len(missing)} of the {len(obs)} cells are not in it, e.g. {few(missing, 5)}; every cell needs a split (train, dev, test "
        f"or unused).{hint} Cells are named as in the h5ad file (adata.obs_names)"
    )
