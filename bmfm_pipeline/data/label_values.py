"""Values of label columns as the arrays that training reads: class ids, several classes a cell, numbers."""

import math
from collections.abc import Sequence

import numpy as np

from bmfm_pipeline.config.losses import IGNORED_LABEL
from bmfm_pipeline.data.label_files import few
from bmfm_pipeline.errors import DataError


def is_missing(value) -> bool:
    """None, NaN, an empty text or the text 'nan'."""
    return value is None or (isinstance(value, float) and math.isnan(value)) or value in ("nan", "")


def missing_mask(values: Sequence) -> np.ndarray:
    """bool (cells,): where a value says nothing."""
    codes, distinct = _distinct(values)
    return np.array([is_missing(value) for value in distinct], dtype=bool)[codes]


def members(text: str, separator: str) -> list[str]:
    """The classes in a text such as 'A|B'; spaces around them and empty places do not count."""
    return [part for part in (piece.strip() for piece in text.split(separator)) if part]


def encode_classes(values: Sequence, known: dict[str, int], silent: Sequence[str] | None, where: str) -> np.ndarray:
    """int64 (cells,): class ids, -100 where missing or silent. DataError for a label that `known` does not have."""
    quiet = set(silent or [])
    codes, distinct = _distinct(values)
    texts = [None if is_missing(value) else str(value) for value in distinct]
    _refuse_unknown([text for text in texts if text is not None and text not in known and text not in quiet], where)
    ids = [IGNORED_LABEL if text is None or text in quiet else known[text] for text in texts]
    return np.array(ids, dtype=np.int64)[codes]


def encode_members(
    values: Sequence, known: dict[str, int], silent: Sequence[str] | None, separator: str, where: str
) -> np.ndarray:
    """float32 (cells, classes): 1 for each class of a cell, else 0; -100 throughout for a cell without a value.

    A text without any class, such as a lone separator, is a cell of no class: zeros. The column of a silent class is
    -100, so that it is neither learned nor scored; a cell whose whole text is silent counts as missing.
    """
    quiet = set(silent or [])
    codes, distinct = _distinct(values)
    table = np.zeros((len(distinct), max(known.values(), default=-1) + 1), dtype=np.float32)
    unknown: dict[str, None] = {}
    for row, value in enumerate(distinct):
        if is_missing(value) or str(value) in quiet:
            table[row] = IGNORED_LABEL
            continue
        for name in members(str(value), separator):
            if name in known:
                table[row, known[name]] = 1
            elif name not in quiet:
                unknown[name] = None
    _refuse_unknown(list(unknown), where)
    for name in quiet & known.keys():
        table[:, known[name]] = IGNORED_LABEL
    return table[codes]


def encode_numbers(values: Sequence, silent: Sequence[str] | None, where: str) -> np.ndarray:
    """float32 (cells,): nan where missing or silent. DataError for text and for infinite values."""
    if bad := not_numbers(values):
        raise DataError(f"{where} is a regression label, but holds {bad}; numbers are needed, or nothing where unknown")
    codes, distinct = _distinct(values)
    quiet = {str(value) for value in silent or []}
    numbers = [math.nan if is_missing(value) or str(value) in quiet else float(value) for value in distinct]
    return np.array(numbers, dtype=np.float32)[codes]


def not_numbers(values: Sequence) -> str:
    """What a column of numbers holds beside numbers, in words; empty when nothing."""
    codes, distinct = _distinct(values)
    bad = [row for row, value in enumerate(distinct) if not is_missing(value) and not _is_number(value)]
    if not bad:
        return ""
    cells = int(np.bincount(codes, minlength=len(distinct))[bad].sum())
    return f"text or infinite values in {cells} cells, e.g. {few(repr(distinct[row]) for row in bad)}"


def _is_number(value) -> bool:
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def _distinct(values: Sequence) -> tuple[np.ndarray, list]:
    """(number of each cell's value, the distinct values): work is done once per distinct value."""
    import pandas as pd

    plain = pd.Series(values).astype(object)
    codes, distinct = pd.factorize(plain.where(plain.notna(), None), use_na_sentinel=False)
    return codes, list(distinct)


def _refuse_unknown(unknown: list[str], where: str) -> None:
    if unknown:
        raise DataError(
            f"{where} holds labels that the label dictionary does not know: {few(sorted(unknown))}; extend label_dict.json by appending "
            "them with the next free ids, or rebuild it by preprocessing anew"
        )
