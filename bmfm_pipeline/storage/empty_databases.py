"""Empty SQLite databases of other programs, kept for the next workspace: MLflow and Prefect make theirs by dozens of migrations, which take
seconds of every first run.

One lies in the user's cache folder for each version of a program. Where that folder cannot be read or written, nothing is kept and nothing is lost.
"""

import contextlib
import importlib.metadata
import os
import sqlite3
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

from bmfm_pipeline.storage.uris import local_path


def _kept(program: str) -> Path:
    folder = local_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "bmfm" / "empty-databases"
    return folder / f"{program}-{importlib.metadata.version(program)}.sqlite"


def begin_database(program: str, database: Path) -> bool:
    """Put the empty database of a `program` (its distribution) at `database`; False where one lies there, or none that is whole is kept."""
    if database.exists():
        return False
    try:
        kept = _kept(program)
        if not kept.exists():
            return False
        _copy(kept, database, put=os.link)  # not over one that another process is just making
    except (OSError, sqlite3.Error):
        return False
    return True


def keep_database(program: str, database: Path, clear: Sequence[str] = ()) -> None:
    """Keep a copy of a `database` that the program has just made, without the rows of the tables `clear`, which are of this one alone."""
    with contextlib.suppress(OSError, sqlite3.Error):
        _copy(database, _kept(program), clear)


def _copy(
    source: Path, target: Path, clear: Sequence[str] = (), put: Callable[[Path, Path], None] = os.replace
) -> None:
    """A whole copy, also of a database that is in use, `put` into its place; a damaged one raises sqlite3.Error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    made = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        there = f"{source.absolute().as_uri()}?mode=rw"  # or it would be made, empty
        with (
            contextlib.closing(sqlite3.connect(there, uri=True)) as rows,
            contextlib.closing(sqlite3.connect(made)) as copy,
        ):
            rows.backup(copy)
            if (
                copy.execute("PRAGMA quick_check").fetchone() != ("ok",)
                or not copy.execute("SELECT * FROM sqlite_master").fetchone()
            ):
                raise sqlite3.DatabaseError(f"{source} is damaged or empty")
            for table in clear:
                copy.execute(f'DELETE FROM "{table}"')
            copy.commit()
        put(made, target)
    finally:
        made.unlink(missing_ok=True)
