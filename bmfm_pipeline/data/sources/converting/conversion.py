"""From a file or folder of any known kind to an h5ad."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bmfm_pipeline.config.reading import PLACE, READS, Reading
from bmfm_pipeline.data.sources.formats import KINDS, format_of, kind_of_hdf5
from bmfm_pipeline.errors import ConfigError, DataError
from bmfm_pipeline.storage import disk_errors

HDF5 = ("h5", "h5mu", "loom", "h5ad")


def convert(path: Path, target: Path, reading: Reading | None = None) -> dict[str, Any]:
    """Write the cells of `path` to the h5ad `target`, atomically; returns {"format", "cells", "genes", "values", "notes"}.

    Memory does not grow with cells beyond names and columns of obs, but for RData, which is read whole. Raises DataError for a file
    that is no such thing, is damaged or cut short, or whose parts do not fit; ConfigError for keys of `reading` that its kind does
    not read. Nothing is left at `target` then.
    """
    reading = reading or Reading()
    kind = true_format(path)
    refuse_unread(reading, kind, path)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            found = _written(_writer(kind), path, part, reading)
            if reading.cell_table:
                from bmfm_pipeline.data.sources.converting.cell_tables import add_cell_table

                found["notes"] = [*found.get("notes", []), *add_cell_table(part, Path(reading.cell_table), path)]
            with open(part, "rb") as stream:
                os.fsync(stream.fileno())
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)
    return {"format": kind, "notes": [], **found}


def _writer(kind: str) -> Callable:
    """The function that reads one kind of file; what it needs is imported only now."""
    if kind == "tenx":
        from bmfm_pipeline.data.sources.converting.tenx_folder import write
    elif kind == "h5":
        from bmfm_pipeline.data.sources.converting.tenx_h5 import write
    elif kind == "loom":
        from bmfm_pipeline.data.sources.converting.loom import write
    elif kind == "h5mu":
        from bmfm_pipeline.data.sources.converting.mudata import write
    elif kind == "table":
        from bmfm_pipeline.data.sources.converting.text_table import write
    elif kind == "rdata":
        from bmfm_pipeline.data.sources.converting.rdata import write
    else:
        from bmfm_pipeline.data.sources.converting.soma import write
    return write


def _written(write: Callable, path: Path, part: Path, reading: Reading) -> dict[str, Any]:
    try:
        return write(path, part, reading)
    except (DataError, ConfigError):
        raise
    except (EOFError, UnicodeDecodeError, KeyError, IndexError, ValueError, NotImplementedError, TypeError) as error:
        raise DataError(
            f"{path}: could not be read ({type(error).__name__}: {error}); it is damaged or cut short: fetch or write it again"
        ) from None


def true_format(path: Path) -> str:
    """The kind of a local file: of HDF5 what lies in it, of others what the name says. DataError for no known kind."""
    if not path.exists():
        raise DataError(f"{path}: no such file")
    kind = format_of(path)
    if path.is_file() and kind in (*HDF5, None):
        with open(path, "rb") as stream:
            head = stream.read(8)
        if head == b"\x89HDF\r\n\x1a\n":
            return kind_of_hdf5(path)
        if kind is not None:
            raise DataError(f"{path}: is not a readable HDF5 file, or is cut short; fetch or write it again")
    if kind is None or (kind == "soma" and not path.is_dir()):
        raise DataError(f"{path}: is no file of cells by its name; known are {KINDS}")
    return kind


def refuse_unread(reading: Reading, kind: str, path: str | Path) -> None:
    """ConfigError for keys of `reading` that were set and would not be read."""
    unread = [name for name in reading.chosen() if name not in READS[kind]]
    if unread:
        words = f"reads {', '.join(READS[kind])}" if READS[kind] else "needs nothing said"
        raise ConfigError(f"{PLACE}.reading: {', '.join(unread)} is not read for {path} ({kind}), which {words}")
