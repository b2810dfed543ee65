"""Files that say which class of a model each label of other data is: read, and written to be filled in."""

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bmfm_pipeline.errors import DataError
from bmfm_pipeline.storage import write_text_atomic

HEADER = ("from", "to", "side")
SIDES = ("data", "model")
TO_FILL = "?"


@dataclass
class LabelMapping:
    """`data` {label of the data: class of the model, or the name of merged ones; None leaves its cells out}, `model` {class of the model:
    the name under which it is merged with others}."""

    data: dict[str, str | None] = field(default_factory=dict)
    model: dict[str, str] = field(default_factory=dict)
    source: str = ""

    @classmethod
    def read(cls, path: str | Path, source: str | None = None) -> "LabelMapping":
        """A csv or tsv file with the columns from, to and, where classes of the model are merged, side (data or model); or json: {from: to}, or
        {"data": {from: to}, "model": {from: to}}.

        `source` is what messages call it. Raises DataError for what is none, contradicts itself, or is not filled in.
        """
        path, source = Path(path), source or str(path)
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{source}: cannot be read as a label mapping ({error})") from None
        rows = _json_rows(text, source) if path.suffix == ".json" else _table_rows(text, path.suffix, source)
        found = cls(source=source)
        for side, label, meant in rows:
            known = found.data if side == "data" else found.model
            if label in known and known[label] != meant:
                raise DataError(f"{source}: '{label}' is mapped twice, to '{known[label]}' and to '{meant}'; keep one")
            known[label] = meant
        unfilled = [label for label, meant in found.data.items() if meant == TO_FILL]
        if unfilled:
            raise DataError(
                f"{source}: {len(unfilled)} labels still have '{TO_FILL}' in the column to: {', '.join(unfilled[:10])}; put a class of the "
                "model there, or nothing to leave their cells out"
            )
        if empty := [label for label, meant in found.model.items() if not meant]:
            raise DataError(
                f"{source}: a class of the model cannot be left out ({', '.join(empty[:10])}): cells that it is predicted for would have no "
                "answer. Give it the name of the classes it is merged with, or remove the row"
            )
        return found


def _json_rows(text: str, source: str) -> list[tuple[str, str, str | None]]:
    try:
        stored = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{source}: is no json ({error})") from None
    if not isinstance(stored, dict):
        raise DataError(f"{source}: expected an object {{label: class of the model}}, found a {type(stored).__name__}")
    sides = stored if stored and all(isinstance(value, dict) for value in stored.values()) else {"data": stored}
    if strangers := sorted(set(sides) - set(SIDES)):
        raise DataError(f"{source}: sides are {' and '.join(SIDES)}, found {', '.join(strangers)}")
    return [(side, str(label), _meant(to)) for side, pairs in sides.items() for label, to in pairs.items()]


def _table_rows(text: str, suffix: str, source: str) -> list[tuple[str, str, str | None]]:
    lines = [line for line in text.splitlines(keepends=True)]
    while lines and (lines[0].startswith("#") or not lines[0].strip()):
        lines.pop(0)
    table = csv.DictReader(lines, delimiter="\t" if suffix in (".tsv", ".txt") else ",")
    columns = [name.strip() for name in table.fieldnames or []]
    table.fieldnames = columns
    if not {"from", "to"} <= set(columns) or set(columns) - set(HEADER):
        raise DataError(
            f"{source}: the first line must name the columns from,to (and side, where classes of the model are merged); found "
            f"{','.join(columns) or 'nothing'}"
        )
    rows = []
    for number, row in enumerate(table, start=1):
        if None in row:
            raise DataError(
                f"{source}: row {number} ({row['from']}) has more values than the first line has columns; put names that hold a comma into "
                "double quotes"
            )
        label, side = (row["from"] or "").strip(), (row.get("side") or "").strip().lower() or "data"
        if not label:
            continue
        if side not in SIDES:
            raise DataError(f"{source}: row {number} ({label}): side must be data or model, found '{side}'")
        rows.append((side, label, _meant(row["to"])))
    return rows


def _meant(value: Any) -> str | None:
    return (str(value).strip() or None) if value is not None else None


def plain(name: str) -> str:
    """A name without case, spaces and signs, to find one that is only spelled otherwise."""
    return re.sub(r"[^a-z0-9+]", "", name.casefold())


def mapping_template(labels: Mapping[str, int], model_classes: Sequence[str], known: Mapping[str, str | None]) -> str:
    """The text of a csv file to fill in: a row per label, with its class where `known` says it or a class is only spelled otherwise."""
    spelled = {plain(name): name for name in model_classes}
    out = io.StringIO()
    out.write(f"# Put a class of the model in place of {TO_FILL}, or nothing to leave the cells of a label out.\n")
    out.write("# Classes of the model:\n")
    for name in model_classes:
        out.write(f"#   {name}\n")
    table = csv.writer(out, lineterminator="\n")
    table.writerow(HEADER[:2])
    for label in labels:
        table.writerow([label, known[label] or "" if label in known else spelled.get(plain(label), TO_FILL)])
    return out.getvalue()


def write_template(
    path: str | Path, labels: Mapping[str, int], model_classes: Sequence[str], known: Mapping[str, str | None]
) -> int:
    """Write mapping_template to a new file; returns how many labels are left to fill in. DataError where there is a file."""
    path = Path(path).expanduser()
    if path.exists():
        raise DataError(f"{path}: is there already, and may hold what somebody filled in; name another file")
    text = mapping_template(labels, model_classes, known)
    write_text_atomic(path, text)
    return sum(line.endswith(f",{TO_FILL}") for line in text.splitlines())
