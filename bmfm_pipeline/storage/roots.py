"""The places that runs may name: everywhere, or below the roots in $BMFM_ALLOWED_ROOTS, as workers that others start runs on should set."""

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from bmfm_pipeline.errors import ConfigError
from bmfm_pipeline.storage.uris import REMOTE_SCHEMES, is_pattern, local_path, strip_userinfo

VARIABLE = "BMFM_ALLOWED_ROOTS"
# Keys whose value is a place that may not exist yet; other relative texts are taken for paths where something lies there.
WRITTEN = ("processed_data_source", "label_dict_path", "default_root_dir", "data_dir")
_BETWEEN = re.compile(rf"{os.pathsep}(?!//)")  # the colon of s3:// separates nothing
_SCHEME = re.compile(rf"^(?:{'|'.join((*REMOTE_SCHEMES, 'file'))})://")


def allowed_roots() -> list[str]:
    """The roots as they are written, those that other BMFM_ variables of this process name among them; none: everything is allowed.

    Whoever sets the environment of a worker decides about its places; a run's parameters do not.
    """
    text = os.environ.get(VARIABLE, "")
    named = [part.strip() for part in _BETWEEN.split(text) if part.strip()]
    if text and not named:
        raise ConfigError(f"{VARIABLE} is '{text}': name folders or s3:// prefixes, separated by '{os.pathsep}'")
    for root in named:
        if not (_SCHEME.match(root) or local_path(root).is_absolute()) or root == "s3://":
            raise ConfigError(f"{VARIABLE}: {root} is neither a folder nor s3://bucket/prefix")
    if not named:
        return []
    others = [value for name, value in os.environ.items() if name.startswith("BMFM_") and name != VARIABLE]
    return named + [value for value in others if _SCHEME.match(value) or os.path.isabs(value)]


def check_allowed(uri: str | os.PathLike, what: str, also: Iterable[str | os.PathLike] = ()) -> None:
    """ConfigError where `uri`, with its symbolic links and `..` resolved, lies below none of the roots, nor of `also`. `what` names
    it in the message.

    A pattern is held to the folder before its first wildcard; the files that it stands for are to be checked when they are known.
    """
    roots = allowed_roots()
    if not roots or _is_below(str(uri), [*roots, *map(str, also)]):
        return
    real, shown = _resolved(str(uri)), strip_userinfo(str(uri))
    meant = f" (which is {strip_userinfo(real)})" if real != str(uri) else ""
    listed = [strip_userinfo(part.strip()) for part in _BETWEEN.split(os.environ[VARIABLE]) if part.strip()]
    raise ConfigError(
        f"{what}: {shown}{meant} lies outside the places that runs may use here ({VARIABLE}: {', '.join(listed)}); name one below them, or "
        "have whoever runs this worker add its place"
    )


def check_values(values: Any, what: str = "", also: Iterable[str | os.PathLike] = ()) -> None:
    """`check_allowed` on every text of nested dictionaries and lists that names a place."""
    if not os.environ.get(VARIABLE):
        return
    for name, text in _texts(values, what):
        if _names_a_place(name, text):
            check_allowed(text, name, also)


def _texts(values: Any, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(values, dict):
        for key, entry in values.items():
            yield from _texts(entry, f"{name}.{key}" if name else str(key))
    elif isinstance(values, list | tuple):
        for entry in values:
            yield from _texts(entry, name)
    elif isinstance(values, str) and values:
        yield name, values


def _names_a_place(name: str, text: str) -> bool:
    if _SCHEME.match(text) or text.startswith(("/", "~")) or ".." in text.split("/"):
        return True
    if "${" in text or "\n" in text or len(text) > 4096:
        return False
    if name.rsplit(".", 1)[-1] in WRITTEN:
        return True
    return ("/" in text or "." in text) and os.path.lexists(text)


def _is_below(uri: str, roots: list[str]) -> bool:
    real = _resolved(uri)
    if _SCHEME.match(real):
        return ".." not in real.split("/") and any(
            real == root or real.startswith(root.rstrip("/") + "/") for root in roots if _SCHEME.match(root)
        )
    own = Path(__file__).resolve().parents[1]  # what the package ships
    places = [Path(_resolved(root)) for root in roots if not _is_remote(root)]
    return any(Path(real).is_relative_to(place) for place in (own, *places))


def _is_remote(uri: str) -> bool:
    return bool(_SCHEME.match(uri)) and not uri.startswith("file://")


def _resolved(uri: str) -> str:
    if _is_remote(uri):
        return uri.rstrip("/")
    path = local_path(uri)
    if is_pattern(uri):
        fixed = []
        for part in path.parts:
            if is_pattern(part):
                break
            fixed.append(part)
        path = Path(*fixed)
    return str(path.resolve())
