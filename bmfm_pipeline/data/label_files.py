"""The file of a label dictionary: read, written whole, extended by one process at a time. Light to import: planning reads it."""

import json
from pathlib import Path

from bmfm_pipeline.errors import DataError
from bmfm_pipeline.storage import exclusive_file, read_json, write_text_atomic

LabelDict = dict[str, dict[str, int]]
SHOWN = 10


def few(names, shown: int = SHOWN) -> str:
    """The first names of a list that may be long, and how many more there are."""
    names = [str(name) for name in names]
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def read_label_dict(path: str | Path) -> LabelDict:
    """Read `[{"label_name": ..., "label_values": {name: id}}, ...]`."""
    stored = read_json(path)
    try:
        return {
            entry["label_name"]: {str(name): int(index) for name, index in entry["label_values"].items()}
            for entry in stored
        }
    except (TypeError, KeyError, AttributeError):
        raise DataError(
            f'{path}: not a label dictionary; expected [{{"label_name": NAME, "label_values": {{CLASS: ID}}}}]'
        ) from None


def write_label_dict(path: str | Path, labels: LabelDict) -> None:
    """Write the whole file at once; readers see the former content or the new one."""
    entries = [{"label_name": name, "label_values": values} for name, values in labels.items()]
    write_text_atomic(Path(path), json.dumps(entries, indent=4, ensure_ascii=False) + "\n")


def extend_label_dict(path: str | Path, labels: LabelDict) -> list[str]:
    """Append the columns that the file does not have yet; returns their names. The file is made when it is not there.

    Other processes may do the same at once: each waits for its turn and reads what the others wrote. Columns that are
    there are left as they are; DataError when they have other ids than `labels`.
    """
    path = Path(path)
    with exclusive_file(path):
        stored = read_label_dict(path) if path.exists() else {}
        for name, values in labels.items():
            if name in stored and stored[name] != values:
                changed = [
                    value for value in {**stored[name], **values} if stored[name].get(value) != values.get(value)
                ]
                raise DataError(
                    f"{path}: exists with other content: label column '{name}' has other ids for {few(changed)}, and is not overwritten. "
                    "Move the file away, name another one, or run again to use its ids"
                )
        added = [name for name in labels if name not in stored]
        if added:
            write_label_dict(path, stored | {name: labels[name] for name in added})
    return added
