"""Cleaned letters kept between the steps of preprocessing, and labels of tables as names of classes."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from bmfm_pipeline.data.label_values import missing_mask
from bmfm_pipeline.data.sequences.letters import Cleaned
from bmfm_pipeline.storage import check_room


class CleanedFiles:
    """Letters of all rows of the tables, one after the other, in two files of a scratch folder."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    @contextmanager
    def writing(self, rows: int) -> Iterator["_Writer"]:
        """Fill the files anew; blocks are added in the order of the rows."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "letters", "wb") as file:
            writer = _Writer(file, self.folder, np.zeros(rows, dtype=np.int64))
            yield writer
        np.save(self.folder / "lengths.npy", writer.lengths)

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 (rows,): letters of each sequence."""
        return np.load(self.folder / "lengths.npy")

    @cached_property
    def starts(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64)

    @cached_property
    def letters(self) -> np.ndarray:
        if not self.lengths.sum():
            return np.zeros(0, dtype=np.uint8)
        return np.memmap(self.folder / "letters", dtype=np.uint8, mode="r")

    def of_rows(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(letters, starts) of chosen rows, ascending."""
        lengths = self.lengths[rows]
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        if len(rows) and rows[-1] - rows[0] + 1 == len(rows):
            return np.asarray(self.letters[self.starts[rows[0]] : self.starts[rows[-1] + 1]]), starts
        places = np.arange(starts[-1], dtype=np.int64) + np.repeat(self.starts[rows] - starts[:-1], lengths)
        return np.asarray(self.letters[places]), starts

    def texts(self, rows: np.ndarray, block: int = 20_000) -> Iterator[str]:
        """The letters of chosen rows as texts, one by one."""
        for first in range(0, len(rows), block):
            yield from Cleaned(*self.of_rows(rows[first : first + block])).texts()


class _Writer:
    def __init__(self, file, folder: Path, lengths: np.ndarray):
        self._file, self._folder, self.lengths = file, folder, lengths

    def add(self, first: int, part: Cleaned) -> None:
        check_room(self._folder, len(part.letters))
        self._file.write(part.letters.tobytes())
        self.lengths[first : first + len(part.lengths)] = part.lengths


def class_texts(values: Any) -> Any:
    """A column of classes as texts; whole numbers that a table has as 0.0 and 1.0 are 0 and 1. Missing ones stay missing."""
    missing = missing_mask(values)
    texts = values.astype(object).where(~missing, None)
    known = [str(value) for value in texts[~missing].unique()]
    try:
        numbers = {text: float(text) for text in known}
        whole = all(value.is_integer() for value in numbers.values())
    except ValueError:
        whole = False
    names = {text: str(int(numbers[text])) if whole else text for text in known}
    return texts.map(lambda value: None if value is None else names[str(value)])
