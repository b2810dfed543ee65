"""Several files read in groups of neighbours: in this process, in others of this machine, or on machines that a flow spreads them over.

The groups are the same whoever reads them, and so is what comes of them. What a group writes lies in the run folder afterwards, or, from a
machine that does not see it, comes through the workspace.
"""

import functools
import shutil
import tempfile
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bmfm_pipeline.config.reading import Reading
from bmfm_pipeline.data.sources import CellSource, open_source
from bmfm_pipeline.data.sources.several import FilesPiece, SeveralFiles
from bmfm_pipeline.errors import StorageError
from bmfm_pipeline.stages.conversion import converted, must_be_seen
from bmfm_pipeline.stages.fanning import group_name, map_jobs
from bmfm_pipeline.stages.jobs import Job
from bmfm_pipeline.storage import Workspace, join_uri, localise
from bmfm_pipeline.storage.remote import remove, upload

PARTS = "parts"


@dataclass(frozen=True)
class Origins:
    """Where files come from, so that any machine can open them: their addresses and contents by name, and how they are read."""

    uris: Mapping[str, str]
    contents: Mapping[str, str]
    workspace: str
    reading: Mapping[str, Any]
    layer: str | None
    duplicate_genes: str

    def of(self, names: Sequence[str]) -> "Origins":
        """Those of some files alone."""
        uris, contents = ({name: table[name] for name in names} for table in (self.uris, self.contents))
        return replace(self, uris=uris, contents=contents)

    def open(self, name: str, path: str | Path, scratch: Path) -> CellSource:
        """The file that lies at `path` on one machine, on this one."""
        if not Path(path).exists():
            must_be_seen(self.uris[name])
            settings = Reading.model_validate(self.reading)
            path = converted(localise(self.uris[name]), self.contents[name], Workspace(self.workspace), settings)
        return open_source(path, self.layer, self.duplicate_genes, scratch if scratch.is_dir() else None)

    def here(self, name: str, source: CellSource, scratch: Path) -> CellSource:
        """A file that was opened on one machine, as this one can read it."""
        return source if source.path.exists() and scratch.is_dir() else self.open(name, source.path, scratch)


@dataclass(frozen=True)
class _Exchange:
    """A folder for what other processes write, seen by them or not: `token` lies in it; `remote` is the way around."""

    folder: Path
    token: str
    remote: str | None

    @classmethod
    def opened(cls, job: Job, what: str) -> "_Exchange":
        folder = job.run_dir / PARTS / what
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "token").write_text(token := uuid.uuid4().hex)
        shared = job.place.shared_run_uri(job.key)
        return cls(folder, token, shared and join_uri(shared, PARTS, what))

    def make(self, function: Callable[[Any, Path], Any], piece: tuple[str, Any]) -> Any:
        """function(item, path of what it writes), on any machine."""
        name, item = piece
        token = self.folder / "token"
        if token.exists() and token.read_text() == self.token:
            return function(item, self.folder / name)
        if self.remote is None:
            raise StorageError(
                f"{self.folder} is not seen by a machine of the cluster; put the workspace on a folder that all of them share, or on s3"
            )
        with tempfile.TemporaryDirectory(prefix="bmfm-parts-") as folder:
            found = function(item, Path(folder) / name)
            upload(Path(folder) / name, join_uri(self.remote, name))
        return found

    def path(self, name: str) -> Path:
        """What was written, on this machine."""
        if (self.folder / name).exists() or self.remote is None:
            return self.folder / name
        fetched = localise(join_uri(self.remote, name))
        remove(join_uri(self.remote, name))
        return fetched


def map_writing(
    job: Job,
    what: str,
    function: Callable[[Any, Path], Any],
    items: Sequence[Any],
    names: Sequence[str],
    workers: int,
    ending: str,
) -> list[tuple[Any, Path]]:
    """[(function(item, path), path)] of items that each write one file; wherever map_jobs has them done. `what` names the folder of the files."""
    exchange = _Exchange.opened(job, what)
    files = [f"{number:03d}{ending}" for number in range(len(items))]
    pieces = list(zip(files, items, strict=True))
    found = map_jobs(functools.partial(exchange.make, function), pieces, names=names, at_once=workers)
    return [(value, exchange.path(file)) for value, file in zip(found, files, strict=True)]


def remove_parts(job: Job) -> None:
    """Take away what groups of files have written."""
    shutil.rmtree(job.run_dir / PARTS, ignore_errors=True)


@dataclass(frozen=True)
class _Piece:
    """Some files, their origins, and which of their cells are looked at (None: all)."""

    files: FilesPiece
    origins: Origins
    scratch: Path
    rows: np.ndarray | None = None

    def opened(self) -> FilesPiece:
        """The files, as they can be read on this machine."""
        files = self.files
        files.sources = [
            self.origins.here(name, source, self.scratch)
            for name, source in zip(files.names, files.sources, strict=True)
        ]
        return files


def _look(function: Callable[[Any, Any], Any], piece: _Piece) -> Any:
    return function(piece.opened(), piece.rows)


def _write(function: Callable[[Any, Path], Any], piece: _Piece, path: Path) -> Any:
    return function(piece.opened(), path)


class FileParts:
    """The passes of a chain over several files, group by group (a Spread, see data.transforms.parts)."""

    def __init__(self, job: Job, cells: SeveralFiles, origins: Origins, workers: int):
        self._job, self._workers = job, workers
        self._pieces = [_Piece(files, origins.of(files.names), job.run_dir / "source") for files in cells.pieces()]
        self._names = [group_name(piece.files.names) for piece in self._pieces]

    def _called(self, doing: str) -> list[str]:
        return [f"{doing} {name}" for name in self._names]

    def each(self, function: Callable[[Any, Any], Any], rows: np.ndarray | None) -> list[Any]:
        """function(files, rows of theirs) of each group, in order."""
        pieces = self._pieces
        if rows is not None:
            ends = np.cumsum([piece.files.n_cells for piece in pieces])
            pieces = [replace(piece, rows=own) for piece, own in zip(pieces, np.split(rows, ends[:-1]), strict=True)]
        return map_jobs(functools.partial(_look, function), pieces, names=self._called("fit"), at_once=self._workers)

    def write(self, function: Callable[[Any, Path], Any]) -> list[tuple[Any, Path]]:
        """[(function(files, path), path)] of each group, in order."""
        made = functools.partial(_write, function)
        return map_writing(self._job, "cells", made, self._pieces, self._called("transform"), self._workers, ".rows")
