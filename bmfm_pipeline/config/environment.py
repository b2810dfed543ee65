"""Environment variables in configs: taken over where they are set, kept as text where they are not, until a path is needed."""

import os
import re
from typing import Any

from bmfm_pipeline.config.catalogue import downloads_folder, list_entries
from bmfm_pipeline.errors import ConfigError
from bmfm_pipeline.storage import check_values

_VARIABLE = re.compile(r"\$\{oc\.env:([A-Za-z_]\w*)\}")


def unset_variable(text: Any) -> str | None:
    """The first environment variable in `text` that is not set, or is empty."""
    return next((name for name in _VARIABLE.findall(str(text)) if not os.environ.get(name)), None)


def keep_unset(node: Any) -> Any:
    """A plain config tree in which references to unset variables are escaped: resolving gives their text, not an error."""
    if isinstance(node, dict):
        return {key: keep_unset(entry) for key, entry in node.items()}
    if isinstance(node, list):
        return [keep_unset(entry) for entry in node]
    if isinstance(node, str):
        return _VARIABLE.sub(lambda found: found[0] if os.environ.get(found[1]) else "\\" + found[0], node)
    return node


def expand(text: str) -> str:
    """`text` with the variables that are set."""
    return _VARIABLE.sub(lambda found: os.environ.get(found[1]) or found[0], text)


def require_path(value: str, key: str) -> str:
    """`value` as a path or address, with variables as they are now; ConfigError when one of them is not set, or for a place
    outside $BMFM_ALLOWED_ROOTS.

    The variable of a dataset that `bmfm datasets download` has fetched need not be set.
    """
    value = _VARIABLE.sub(lambda found: os.environ.get(found[1]) or _downloaded(found[1]) or found[0], str(value))
    missing = unset_variable(value)
    if missing:
        raise ConfigError(
            f"{key} is {value}, but the environment variable {missing} is not set; "
            f"run `export {missing}=/path/to/data`, or set {key} to a path{_alternative(missing)}"
        )
    path = expand(str(value))
    check_values(path, key, also=(downloads_folder(),))
    return path


def _downloaded(variable: str) -> str | None:
    """The folder of a dataset that was downloaded to where downloads go."""
    for entry in list_entries():
        if entry.source.env == variable and (downloads_folder() / entry.name / entry.source.file).exists():
            return str(downloads_folder() / entry.name)
    return None


def _alternative(variable: str) -> str:
    for entry in list_entries():
        if entry.source.env == variable:
            where = f" ({variable} is the folder that holds {entry.source.file})"
            if entry.source.download:
                where += f". `bmfm datasets download {entry.name}` fetches it from the web"
            return where + (
                ". Without that data, `bmfm run zheng68k-mini` works at once" if entry.name == "zheng68k" else ""
            )
    return ""
