"""Predictions as csv or parquet: one row a cell, in blocks, so that memory does not grow with cells."""

from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bmfm_pipeline.stages.predicting.chunks import EMBEDDINGS, LOGITS
from bmfm_pipeline.stages.predicting.rows import Answers, LabelRows
from bmfm_pipeline.stages.predicting.unfinished import PredictedCells

BLOCK = 8192
Table = dict[str, Any]
_TO_QUOTE = '[",\n\r]'


def table_names(poolings: Collection[str]) -> list[str]:
    """Without their ending. Of several poolings each has a file of its own."""
    one = len(poolings) == 1
    return [
        "predictions",
        "probabilities",
        "logits",
        *(("embeddings",) if one else (f"embeddings_{name}" for name in poolings)),
    ]


def write_tables(
    folder: Path,
    kind: str,
    wanted: Collection[str],
    cells: PredictedCells,
    names: Callable[[int, int], Sequence[str]],
    answers: Answers,
    poolings: Collection[str],
) -> None:
    """Those of `table_names` that are `wanted`, into `folder`, as `kind`; `names(start, stop)` gives cell names."""
    makers: dict[str, Callable[[Sequence[str], slice], Table]] = {}
    classes = {name: known for name, known in answers.predictor.class_names.items()}
    for name in table_names(poolings):
        pooling = name.removeprefix("embeddings_") if name != "embeddings" else next(iter(poolings), "")
        makers[name] = {
            "predictions": lambda block, where: _predictions(block, where, cells, answers),
            "probabilities": lambda block, where: _probabilities(block, where, cells, answers),
            "logits": lambda block, where: _of_classes(
                block, {label: cells.rows(LOGITS + label)[where] for label, known in classes.items() if known}, classes
            ),
        }.get(name) or (lambda block, where, pooling=pooling: _embeddings(block, where, cells, pooling))
    writers = {
        name: TableWriter(folder / f"{name}.{kind}", header=not name.startswith("embeddings"))
        for name in makers
        if name in wanted
    }
    try:
        for where in blocks(cells.done):
            block = names(where.start, where.stop)
            for name, writer in writers.items():
                writer.write(makers[name](block, where))
    finally:
        for writer in writers.values():
            writer.close()


def write_table(path: Path, table: Table) -> None:
    """One table as csv or parquet, as the ending of `path` says."""
    writer = TableWriter(path, header=True)
    try:
        writer.write(table)
    finally:
        writer.close()


def blocks(rows: int, size: int = BLOCK) -> Iterator[slice]:
    """Consecutive row ranges; one empty one where there are no rows."""
    for start in range(0, max(rows, 1), size):
        yield slice(start, min(start + size, rows))


def of_labels(cells: PredictedCells, where: slice, answers: Answers) -> dict[str, LabelRows]:
    """What is said of the cells in `where`, by label column."""
    usable = cells.reason_codes()[where] == 0
    return {
        name: answers.of_label(name, cells.rows(LOGITS + name)[where], usable) for name in answers.predictor.class_names
    }


def count_unknown(cells: PredictedCells, answers: Answers) -> dict[str, dict[str, Any]]:
    """{label: {below, cells}} of the labels that have a threshold: how many cells are less sure than it."""
    found = {name: {"below": below, "cells": 0} for name, below in answers.thresholds.items()}
    for where in blocks(cells.done) if found else ():
        said = of_labels(cells, where, answers)
        for name, entry in found.items():
            entry["cells"] += int((said[name].confidence < entry["below"]).sum())
    return found


def reasons(cells: PredictedCells, where: slice) -> np.ndarray:
    return np.array(cells.reasons, dtype=object)[cells.reason_codes()[where]]


def _predictions(names: Sequence[str], where: slice, cells: PredictedCells, answers: Answers) -> Table:
    """cell, each label, reason, then how sure each label is."""
    found = of_labels(cells, where, answers)
    table: Table = {"cell": names}
    for name, rows in found.items():
        table[name] = rows.words if rows.words is not None else rows.values
    table["reason"] = reasons(cells, where)
    table |= {f"{name}_confidence": rows.confidence for name, rows in found.items() if rows.confidence is not None}
    return table


def _probabilities(names: Sequence[str], where: slice, cells: PredictedCells, answers: Answers) -> Table:
    found = of_labels(cells, where, answers)
    known = {name: rows.probabilities for name, rows in found.items() if rows.probabilities is not None}
    return _of_classes(names, known, answers.predictor.class_names)


def _of_classes(names: Sequence[str], by_label: dict[str, np.ndarray], classes: dict[str, list[str]]) -> Table:
    table: Table = {"cell": names}
    for label, numbers in by_label.items():
        table |= {f"{label}_{name}": numbers[:, place] for place, name in enumerate(classes[label])}
    return table


class Nan(np.ndarray):
    """Numbers whose nan is written as such, not as nothing."""


def _embeddings(names: Sequence[str], where: slice, cells: PredictedCells, pooling: str) -> Table:
    numbers = np.asarray(cells.rows(EMBEDDINGS + pooling)[where])
    return {"cell": names} | {str(place): numbers[:, place].view(Nan) for place in range(numbers.shape[1])}


class TableWriter:
    """A csv or parquet file that tables are added to. In csv, numbers have as many digits as float32 needs and nothing stands for nan."""

    def __init__(self, path: Path, header: bool):
        self.path, self._header = path, header
        self._parquet = path.suffix == ".parquet"
        self._stream = None

    def write(self, table: Table) -> None:
        import pyarrow as pa

        columns = {name: _arrow(values) for name, values in table.items()}
        if self._parquet:
            import pyarrow.parquet as pq

            made = pa.table(columns)
            self._stream = self._stream or pq.ParquetWriter(self.path, made.schema, compression="zstd")
            self._stream.write_table(made)
            return
        if self._stream is None:
            self._stream = open(self.path, "w", newline="")  # noqa: SIM115 - closed by close
            if self._header:
                self._stream.write(",".join(_quoted(name) for name in columns) + "\n")
        lines = _lines(list(columns.values()))
        if len(lines):
            self._stream.write("\n".join(lines.to_pylist()) + "\n")

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()


def _arrow(values):
    import pyarrow as pa

    if not isinstance(values, np.ndarray):
        return pa.array(values, pa.string())
    if values.dtype == object:
        return pa.array(values, pa.string())
    return pa.array(np.ascontiguousarray(values), from_pandas=not isinstance(values, Nan))


def _lines(columns: list):
    import pyarrow as pa
    import pyarrow.compute as pc

    texts = []
    for column in columns:
        if pa.types.is_string(column.type):
            if pc.any(pc.match_substring_regex(column, _TO_QUOTE)).as_py():
                column = pa.array([value if value is None else _quoted(value) for value in column.to_pylist()])
            texts.append(column)
        else:
            texts.append(pc.cast(column, pa.string()))
    return pc.binary_join_element_wise(*texts, ",", null_handling="replace", null_replacement="")


def _quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"' if any(sign in text for sign in '",\n\r') else text
