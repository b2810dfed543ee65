"""Several files as the data of a run: what a folder, a pattern or a list stands for, and what each file is called."""

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from bmfm_pipeline.errors import ConfigError, DataError
from bmfm_pipeline.storage import is_pattern, is_remote, local_path, strip_userinfo

ENDINGS = (".h5ad", ".h5")
SHOWN = 5


def holds_h5ad(folder: str | Path) -> bool:
    return bool(_in_folder(Path(folder)))


def stands_for_several(address: str) -> bool:
    """Whether an address is a local folder, or a pattern and not the name of a file."""
    if is_remote(address):
        return is_pattern(address)
    path = local_path(address)
    return path.is_dir() or (is_pattern(address) and not path.exists())


def expand_address(address: str, hint: str = "") -> list[str]:
    """The files that an address stands for: itself, the h5ad files of a local folder, or those that fit a pattern (`**`: at any depth).

    Raises DataError when there is none, or when a pattern fits a file that is no h5ad by its name; ConfigError for a remote pattern.
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
        if not (found := _in_folder(path)):
            there = sorted(entry.name for entry in path.iterdir())[:SHOWN]
            raise DataError(
                f"{path}: is a folder that holds no h5ad file (*.h5ad); it holds {', '.join(there) or 'nothing'}{more}"
            )
        return found
    if path.exists() or not is_pattern(address):
        return [str(path)]
    if not (found := sorted(name for name in glob.glob(str(path), recursive=True) if os.path.isfile(name))):
        raise DataError(f"{path}: no file fits this pattern{more}")
    _refuse_others(found, "narrow the pattern, e.g. to *.h5ad")
    return found


def _in_folder(folder: Path) -> list[str]:
    names = glob.glob(str(Path(glob.escape(str(folder))) / "*.h5ad"))
    return sorted(name for name in names if os.path.isfile(name))


def _refuse_others(files: Sequence[str], cure: str) -> None:
    others = [name for name in files if not str(name).endswith(ENDINGS)]
    if others:
        raise DataError(
            f"{strip_userinfo(others[0])}: is no h5ad file by its name ({len(others)} of {len(files)}); {cure}"
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
    for names in ([_stem(name) for name in files], [name.rsplit(".", 1)[0] for name in below], below):
        if len(set(names)) == len(names):
            break
    return dict(sorted(zip(names, files, strict=True)))


def _stem(address: str) -> str:
    return str(address).rsplit("/", 1)[-1].rsplit(".", 1)[0]


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
        return Path(named).stem
    path = Path(named)
    while is_pattern(path.name):
        path = path.parent
    return path.name or "data"
