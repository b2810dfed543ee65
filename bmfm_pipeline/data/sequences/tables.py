"""Tables of sequences: csv, tsv and parquet files, alone or as a folder with train, dev and test."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bmfm_pipeline.data.sequences.files import files_of, header, is_parquet, separator_of
from bmfm_pipeline.errors import DataError, did_you_mean

ID_COLUMNS = ("seq_id", "id", "name")
SPLIT_COLUMN = "split"
BLOCK_BYTES = 16 << 20


@dataclass
class SequenceSource:
    """Sequences of one or several tables, in the order train, dev, test. `obs` has an id for each as its index, and the other columns.

    A folder's table says of each row, in `split`, which file it comes from. Sequences themselves are read in blocks.
    """

    files: dict[str, Path]
    obs: Any  # pandas DataFrame
    column: str
    sizes: dict[str, int]

    @property
    def n_sequences(self) -> int:
        return len(self.obs)

    def blocks(self) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(first row, letters uint8, starts int64 (rows + 1,)) of consecutive rows, as the files have them; a missing one is empty."""
        row = 0
        for path in self.files.values():
            for batch in _batches(path, [self.column]):
                letters, starts = _letters(batch.column(0))
                yield row, letters, starts
                row += len(starts) - 1


def open_sequences(path: str | Path, column: str | None = None, labels: Sequence[str] | None = None) -> SequenceSource:
    """The sequences of a table, or of a folder with train, dev and test (val and validation mean dev).

    `column` names the one with the sequences; without it that is the first. `labels` are the columns to read beside it, None is all.
    Raises DataError for what cannot be read, columns that are not there or differ between files, and ids that are there twice.
    """
    import pandas as pd

    path = Path(path)
    files = files_of(path)
    names = {split: header(file) for split, file in files.items()}
    first_split, first = next(iter(names.items()))
    column = _sequence_column(column, first, files[first_split])
    wanted = [name for name in first if name != column] if labels is None else list(labels)
    tables, sizes = [], {}
    for split, file in files.items():
        if column not in names[split]:
            raise DataError(
                f"{file}: has no column '{column}', {files[first_split].name} has; it has {', '.join(names[split])}"
            )
        missing = [name for name in wanted if name not in names[split]]
        if missing:
            hint = did_you_mean(missing[0], names[split], before="; ")
            raise DataError(f"{file}: has no column '{missing[0]}'; it has {', '.join(names[split])}{hint}")
        taken = (column, *(labels or ()))
        known = next((name for name in ID_COLUMNS if name in names[split] and name not in taken), None)
        parts = [
            batch.to_pandas() for batch in _batches(file, [*dict.fromkeys([*wanted, *([known] if known else [])])])
        ]
        table = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=wanted)
        if not wanted and not known:
            table = pd.DataFrame(index=range(_count(file, column)))
        if not len(table):
            raise DataError(f"{file}: has a header and no rows")
        ids = table[known].astype(str) if known else pd.Series([str(row) for row in range(len(table))])
        prefix = f"{split}_" if split else "" if known else "seq_"
        table.index = pd.Index([f"{prefix}{name}" for name in ids], dtype=object)
        if split:
            table[SPLIT_COLUMN] = split
        sizes[split or file.name] = len(table)
        tables.append(table)
    obs = pd.concat(tables) if len(tables) > 1 else tables[0]
    twice = obs.index[obs.index.duplicated()]
    if len(twice):
        raise DataError(f"{path}: {len(twice)} ids are there twice, e.g. {twice[0]}; ids must tell sequences apart")
    return SequenceSource(files, obs, column, sizes)


def _sequence_column(asked: str | None, names: list[str], file: Path) -> str:
    if asked is None:
        return names[0]
    if asked not in names:
        hint = did_you_mean(asked, names, before="; ")
        raise DataError(f"{file}: has no column '{asked}' for sequences; it has {', '.join(names)}{hint}")
    return asked


def _batches(path: Path, columns: list[str]) -> Iterator[Any]:
    """Record batches of the columns, all as text from a csv; nothing when no column is asked for."""
    import pyarrow as pa

    if not columns:
        return
    if is_parquet(path):
        import pyarrow.parquet as pq

        yield from pq.ParquetFile(path).iter_batches(columns=columns)
        return
    from pyarrow import csv

    try:
        with csv.open_csv(
            path,
            read_options=csv.ReadOptions(block_size=BLOCK_BYTES),
            parse_options=csv.ParseOptions(delimiter=separator_of(path)),
            convert_options=csv.ConvertOptions(
                include_columns=columns, column_types=dict.fromkeys(columns, pa.string()), strings_can_be_null=True,
                null_values=["", "NA", "nan", "NaN"],
            ),
        ) as reader:  # fmt: skip
            yield from reader
    except pa.ArrowInvalid as error:
        raise DataError(
            f"{path}: {str(error).splitlines()[0]}; every row needs as many columns as the header"
        ) from None


def _count(path: Path, column: str) -> int:
    return sum(len(batch) for batch in _batches(path, [column]))


def _letters(array: Any) -> tuple[np.ndarray, np.ndarray]:
    """(letters uint8, starts int64) of an arrow array of texts."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if not pa.types.is_large_string(array.type):
        array = array.cast(pa.large_string())
    array = pc.fill_null(array, "")
    _, offsets, data = array.buffers()
    starts = np.frombuffer(offsets, dtype=np.int64)[array.offset : array.offset + len(array) + 1]
    letters = np.frombuffer(data, dtype=np.uint8) if data is not None else np.zeros(0, np.uint8)
    return letters[starts[0] : starts[-1]], starts - starts[0]
