"""Several files as the data of a run: what a folder, a pattern or a list stands for, and what each file is called."""

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from bmfm_pipeline.data.sources.formats import KINDS, OF_FOLDERS, ending_of, folder_format, format_of, name_of_file
from bmfm_pipeline.errors import ConfigError, DataError
from bmfm_pipeline.storage import is_pattern, is_remote, local_path, strip_userinfo

SHOWN = 5


def holds_cells(folder: str | Path) -> bool:
    """Whether a folder is a dataset by itself (10x, SOMA) or holds files of cells."""
    path = Path(folder)
    return path.is_dir() and (folder_format(path) is not None or bool(_in_folder(path)))


def names_cells(address: str) -> bool:
    """Whether a word is the name of a file of cells, by its ending."""
    return ending_of(address) is not None


def stands_for_several(address: str) -> bool:
    """Whether an address is a local folder of files, or a pattern and not the name of a file."""
    if is_remote(address):
        return is_pattern(address)
    path = local_path(address)
    if path.is_dir():
        return folder_format(path) is None
    return is_pattern(address) and not path.exists()


def expand_address(address: str, hint: str = "") -> list[str]:
    """The files that an address stands for: itself, the files of cells of a local folder, or those that fit a pattern (`**`: at any depth).

    Of a folder with files of several kinds the h5ad files are taken, else the first kind of OF_FOLDERS, else its 10x folders. Raises
    DataError when there is none, or when a pattern fits a file that holds no cells by its name; ConfigError for a remote pattern.
    """
    more = f"; {hint}" if hint else ""
    if is_remote(address):
        if is_pattern(address):
            raise ConfigError(
                f"{strip_userinfo(address)}: folders and patterns stand for local files; name remote files one by one, in a list"
            )
        return [address]
    path = local_path(address)
    if path.is_dir():
        if folder_format(path) is not None:
            return [str(path)]
        if not (found := _in_folder(path)):
            there = sorted(entry.name for entry in path.iterdir())[:SHOWN]
            raise DataError(
                f"{path}: is a folder that holds no h5ad file (*.h5ad), nor files of another kind that is read ({KINDS}); it holds "
                f"{', '.join(there) or 'nothing'}{more}"
            )
        return found
    if path.exists() or not is_pattern(address):
        return [str(path)]
    if not (found := sorted(name for name in glob.glob(str(path), recursive=True) if _is_dataset(name))):
        raise DataError(f"{path}: no file fits this pattern{more}")
    _refuse_others(found, "narrow the pattern, e.g. to *.h5ad")
    return found


def _in_folder(folder: Path) -> list[str]:
    kinds: dict[str, list[str]] = {}
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        kind = format_of(entry.path)
        if kind is not None and (entry.is_file() or folder_format(Path(entry.path)) is not None):
            kinds.setdefault("tenx folder" if entry.is_dir() and kind == "tenx" else kind, []).append(entry.path)
    return next((kinds[kind] for kind in (*OF_FOLDERS, "tenx folder") if kind in kinds), [])


def _is_dataset(name: str) -> bool:
    return os.path.isfile(name) or folder_format(Path(name)) is not None


def _refuse_others(files: Sequence[str], cure: str) -> None:
    kinds = [format_of(name) for name in files]
    # A text among files of cells is a note or a table about them.
    strange = (None, "table") if set(kinds) - {None, "table"} else (None,)
    others = [name for name, kind in zip(files, kinds, strict=True) if kind in strange]
    if others:
        raise DataError(
            f"{strip_userinfo(others[0])}: is no h5ad file by its name ({len(others)} of {len(files)}), nor one of the kinds that are read with others; {cure}"
        )


def named_files(files: Sequence[str]) -> dict[str, str]:
    """{name: address} in the order of the names: the file's without its ending, with folders where that alone is not unique.

    Raises DataError for a file that is there twice, or is no h5ad by its name.
    """
    _refuse_others(files, "take it out of the list")
    twice = [name for place, name in enumerate(files) if name in files[:place]]
    if twice:
        raise DataError(f"{strip_userinfo(twice[0])}: is named twice; its cells would count twice")
    above = len(f"{common_folder(files)}/".lstrip("/")) + files[0].startswith("/")
    below = [name[above:] for name in files]
    for names in ([name_of_file(name) for name in files], [_without_ending(name) for name in below], below):
        if len(set(names)) == len(names):
            break
    return dict(sorted(zip(names, files, strict=True)))


def _without_ending(address: str) -> str:
    return address[: len(address) - len(ending_of(address) or "")]


def common_folder(files: Sequence[str]) -> str:
    """The folder that all `files` lie in or below, without a slash at its end."""
    parts = [name.split("/")[:-1] for name in files]
    shared = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return "/".join(shared)


def name_of_data(named: str | Sequence[str] | None) -> str:
    """What data are called by the address, or the list of them, that a config gives."""
    if not named:
        return "data"
    if not isinstance(named, str):
        if len(named) == 1:
            return name_of_data(named[0])
        return common_folder(named).rsplit("/", 1)[-1] or "data"
    if not stands_for_several(named):
        return name_of_file(named)
    path = Path(named)
    while is_pattern(path.name):
        path = path.parent
    return path.name or "data"
