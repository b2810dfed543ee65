"""A table with a row for each of many files: which of them are used, and what it says of each."""

import csv
import gzip
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bmfm_pipeline.config import require_path
from bmfm_pipeline.config.reading import PLACE, FileTable
from bmfm_pipeline.config.row_query import RowQuery
from bmfm_pipeline.errors import ConfigError, DataError
from bmfm_pipeline.storage import localise

logger = logging.getLogger(__name__)
MISSING = ("", "\\N", "NA", "N/A", "NaN", "nan", "None", "null")
# What a table of samples says of one that has no file.
NOT_USED = "notused"
SHOWN = 5


def choose_files(
    files: Mapping[str, str], table: FileTable, place: str
) -> tuple[dict[str, str], dict[str, dict[str, Any]], dict[str, Any]]:
    """(files of {name: address} whose row the query takes, {name: {column: value}} of them, what was counted).

    The counts: "rows", "not_used" (rows that say so), "outside_query", "without_file" and "without_row", with examples. `place` is what
    the files are called. Raises ConfigError for a column that is not there or a query that is none, DataError for a table that cannot
    be read, has two rows for a file, or chooses no file.
    """
    path = localise(require_path(table.table, f"{PLACE}.files.table"))
    columns, rows = read_rows(path)
    if absent := [name for name in table.columns if name not in columns]:
        raise ConfigError(
            f"{PLACE}.files.name: {path} has no column {', '.join(absent)}; its columns are {', '.join(columns)}"
        )
    query = RowQuery(table.query, columns, f"{PLACE}.files.query") if table.query else None
    known: dict[str, dict[str, Any]] = {}
    not_used, outside, without_file = 0, [], []
    for number, row in enumerate(rows, 2):
        if NOT_USED in (row[name] for name in table.columns):
            not_used += 1
            continue
        name = table.name_of(row)
        if name is None:
            raise DataError(f"{path}, line {number}: has no {' or '.join(table.columns)}; they name the file of a row")
        if name in known or name in outside:
            raise DataError(f"{path}, line {number}: there are two rows for {name}")
        if query is not None and not query(row):
            outside.append(name)
        elif name in files:
            known[name] = row
        else:
            known[name] = {}
            without_file.append(name)
    chosen = {name: address for name, address in files.items() if known.get(name)}
    without_row = [name for name in files if name not in known and name not in set(outside)]
    counts = {
        "table": str(path),
        "query": table.query,
        "rows": len(rows),
        "not_used": not_used,
        "outside_query": sum(name in files for name in outside),
        "outside_query_examples": [name for name in outside if name in files][:SHOWN],
        "without_file": len(without_file),
        "without_file_examples": without_file[:SHOWN],
        "without_row": len(without_row),
        "without_row_examples": without_row[:SHOWN],
        "chosen": len(chosen),
    }
    if not chosen:
        raise DataError(
            f"{place}: none of {len(files)} files is chosen by {path}: {len(outside)} rows are outside the query "
            f"({table.query}), {len(without_file)} rows have no file{_examples(without_file)}, {len(without_row)} files have no row"
            f"{_examples(without_row)}; check {PLACE}.files.query and .name ({table.name})"
        )
    return chosen, {name: known[name] for name in chosen}, counts


def selection_in_words(counts: Mapping[str, Any]) -> list[str]:
    """What a person should know of a selection."""
    lines = []
    if counts["outside_query"]:
        lines.append(
            f"{counts['outside_query']} files are outside the query {counts['query']}{_examples(counts['outside_query_examples'])}"
        )
    if counts["without_file"]:
        lines.append(
            f"{counts['without_file']} rows of the table have no file{_examples(counts['without_file_examples'])}"
        )
    if counts["without_row"]:
        lines.append(
            f"{counts['without_row']} files are left out because the table has no row for them{_examples(counts['without_row_examples'])}"
        )
    if counts["not_used"]:
        lines.append(f"{counts['not_used']} rows of the table are of samples that are not used")
    return lines


def _examples(names: list[str]) -> str:
    return f" (e.g. {', '.join(names[:SHOWN])})" if names else ""


def read_rows(path: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """(columns, rows) of a csv or tsv file; a column of numbers has numbers, and what is missing is None."""
    try:
        with (
            gzip.open(path, "rt", newline="")
            if path.suffix == ".gz"
            else open(path, newline="", encoding="utf-8-sig") as stream
        ):
            head = stream.readline()
            separator = "\t" if head.count("\t") > head.count(",") else ","
            columns = [name.strip() for name in next(csv.reader([head], delimiter=separator), [])]
            lines = [line for line in csv.reader(stream, delimiter=separator) if any(map(str.strip, line))]
    except FileNotFoundError:
        raise DataError(
            f"{path}: no such file; {PLACE}.files.table names a csv file with a row for each file"
        ) from None
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as a csv file ({error})") from None
    if not lines or not columns:
        raise DataError(f"{path}: has {len(lines)} rows; a csv file with a header and a row for each file is needed")
    if len(set(columns)) < len(columns):
        raise DataError(f"{path}: columns have the same name: {', '.join(columns)}")
    if wrong := [number for number, line in enumerate(lines, 2) if len(line) != len(columns)]:
        raise DataError(f"{path}, line {wrong[0]}: has {len(lines[wrong[0] - 2])} values, the header {len(columns)}")
    by_column = [_typed([line[at].strip() for line in lines]) for at in range(len(columns))]
    return columns, [dict(zip(columns, values, strict=True)) for values in zip(*by_column, strict=True)]


def _typed(values: list[str]) -> list[Any]:
    given = [None if value in MISSING else value for value in values]
    try:
        numbers = [None if value is None else float(value) for value in given]
    except ValueError:
        return given
    if all(value is None for value in numbers):
        return given
    whole = all(value is None or value.is_integer() for value in numbers)
    return [None if value is None else int(value) if whole else value for value in numbers]
