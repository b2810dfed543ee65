"""Files that are no h5ad, converted once: each becomes an artefact of the workspace, named by its content; the file itself is only read."""

import functools
import logging
import platform
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bmfm_pipeline.config.reading import Reading
from bmfm_pipeline.data.sources.formats import ENDINGS, ending_of, format_of
from bmfm_pipeline.data.sources.several import MOST_PIECES, spans
from bmfm_pipeline.errors import DataError, StorageError
from bmfm_pipeline.stages.fanning import group_name, map_jobs
from bmfm_pipeline.storage import (
    Workspace,
    code_version,
    content_hash,
    find_artefact,
    hash_json,
    is_remote,
    local_path,
    localise,
    publish,
    strip_userinfo,
)

logger = logging.getLogger(__name__)
STAGE = "convert"
FILE = "cells.h5ad"
CODE = "bmfm_pipeline.data.sources.converting.conversion"
KEY_LENGTH = 32


def needs_conversion(path: str | Path) -> bool:
    """Whether a local file or folder is no h5ad: by its name, and where that may mean both (.h5) by what lies in it."""
    kind = format_of(path)
    if kind in (None, "h5ad"):
        return False
    if kind == "h5":
        from bmfm_pipeline.data.sources.converting.conversion import true_format

        return true_format(Path(path)) != "h5ad"
    return True


def converted(
    path: Path, content: str, workspace: Workspace, reading: Reading | None = None, level: int = logging.INFO
) -> Path:
    """The h5ad that the file `path`, whose content hash is `content`, becomes: made when the workspace does not have it.

    An h5ad is returned as it is. What was made is logged at `level`. Raises DataError or ConfigError, as `convert` does.
    """
    if not needs_conversion(path):
        from bmfm_pipeline.data.sources.converting.conversion import refuse_unread

        refuse_unread(reading or Reading(), "h5ad", path)
        return path
    reading = reading or Reading()
    options = reading.chosen()
    if table := options.pop("cell_table", None):
        options["cell_table"] = content_hash(table, workspace.memo) if Path(table).exists() else table
    code = code_version(CODE)
    key = hash_json({"content": content, "ending": _ending(path), "reading": options, "code": code})[:KEY_LENGTH]
    found = find_artefact(workspace, STAGE, key)
    if found is None:
        found = _convert(path, content, workspace, reading, options, key, code)
        logger.log(level, "%s: %s", path.name, _in_words(found.summary))
    return Path(found.local()) / FILE


def _in_words(about: Mapping[str, Any]) -> str:
    notes = "".join(f"; {note}" for note in about["notes"])
    return f"read as {about['format']}, {about['cells']:,} cells x {about['genes']:,} genes{notes}"


def readable(path: Path, workspace: Workspace, reading: Reading | None = None) -> Path:
    """The h5ad to read in place of a local file of cells of any kind: itself where it is one."""
    if not path.exists() or not needs_conversion(path):
        return path
    return converted(path, content_hash(path, workspace.memo), workspace, reading)


def _ending(path: Path) -> str:
    """The kind a name stands for: the same bytes under another ending are read in another way."""
    return ENDINGS.get((ending_of(path.name) or "").lower(), "folder")


def _convert(path, content, workspace: Workspace, reading: Reading, options: dict[str, Any], key: str, code: str):
    from bmfm_pipeline.data.sources.converting import convert

    base = workspace.run_dir(key).parent
    base.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=base, prefix=f"{STAGE}-"))
    try:
        about = convert(path, staging / FILE, reading)
        inputs = {"source": {"id": content, "uri": str(path)}}
        return publish(
            staging, workspace, STAGE, key, inputs=inputs, config=options, code_version=code, summary={"name": path.name, **about}
        )  # fmt: skip
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def convert_files(
    files: Mapping[str, str], contents: Mapping[str, str], workspace: Workspace, reading: Reading, workers: int = 0
) -> dict[str, Path | DataError]:
    """{name: local h5ad} of {name: address}, each converted where it must be; a file that cannot be is its DataError.

    In `workers` processes, or spread by the flow that runs this. What is there already costs a look.
    """
    items = [(name, uri, contents[name], workspace.uri, reading.model_dump()) for name, uri in files.items()]
    to_do = [item for item in items if is_remote(item[1]) or needs_conversion_by_name(item[1])]
    pieces = [to_do[start:stop] for start, stop in spans([1] * len(to_do), MOST_PIECES)]
    names = [f"convert {group_name([item[0] for item in piece])}" for piece in pieces]
    done: dict[str, Path | DataError] = {}
    for found in map_jobs(_convert_piece, pieces, names=names, at_once=workers):
        for name, (path, problem) in found.items():
            done[name] = DataError(problem) if path is None else Path(path)
    here = Workspace(workspace.uri)
    for name, uri, content, _, _ in items:
        if name not in done:
            done[name] = converted(local_path(uri), content, here, reading)
        elif isinstance(done[name], Path) and not done[name].exists():  # it lies in the cache of another machine
            done[name] = converted(localise(uri), content, here, reading, logging.DEBUG)
    return {name: done[name] for name in files}


def must_be_seen(uri: str) -> None:
    """Raise StorageError when a file of a run does not lie where this machine looks for it: that is no fault of the file."""
    if not is_remote(uri) and not local_path(uri).exists():
        raise StorageError(
            f"{uri}: is not there any more, or not seen by the machine {platform.node()}; all machines of a cluster must see the files under "
            "the same names, or the files must lie on s3"
        )


def needs_conversion_by_name(uri: str) -> bool:
    return format_of(uri) not in (None, "h5ad")


def _convert_piece(piece: Sequence[tuple[str, str, str, str, dict[str, Any]]]) -> dict[str, tuple[str | None, str]]:
    """{name: (path of the h5ad, "") or (None, what is wrong)} of some files; plain values, for other processes."""
    return {item[0]: _convert_item(item) for item in piece}


def _convert_item(item: tuple[str, str, str, str, dict[str, Any]]) -> tuple[str | None, str]:
    _, uri, content, workspace, reading = item
    must_be_seen(uri)
    try:
        settings = Reading.model_validate(reading)
        return str(converted(localise(uri), content, _workspace(workspace), settings, logging.DEBUG)), ""
    except DataError as error:
        return None, strip_userinfo(str(error))


@functools.lru_cache(maxsize=4)
def _workspace(uri: str) -> Workspace:
    return Workspace(uri)
