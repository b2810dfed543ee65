"""A user's YAML files as they wrote them: which keys they set, and keys written twice."""

import shutil
from pathlib import Path
from typing import Any

import yaml

from bmfm_pipeline.errors import ConfigError


class _Twice(dict):
    """A mapping that remembers keys written more than once."""

    repeated = False


class _Loader(yaml.SafeLoader):
    pass


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict:
    loader.flatten_mapping(node)
    found = _Twice()
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        value = loader.construct_object(value_node, deep=True)
        if key in found:
            if found[key] != value:
                mark = key_node.start_mark
                raise ConfigError(
                    f"{mark.name}, line {mark.line + 1}: '{key}' is given twice, as {found[key]!r} and as {value!r}; keep one"
                )
            loader.repeated = True
        found[key] = value
    return found


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def _load(path: Path) -> tuple[Any, bool]:
    with open(path) as stream:
        loader = _Loader(stream)
        loader.repeated = False
        try:
            return loader.get_single_data(), loader.repeated
        except yaml.YAMLError as error:
            raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
        finally:
            loader.dispose()


def check_duplicates(folder: Path, scratch: Path) -> Path:
    """`folder`, or a copy of it in which keys that were written twice with one value stand once. Two values are an error."""
    copied = folder
    for path in sorted(folder.rglob("*.yaml")):
        value, repeated = _load(path)
        if repeated:
            if copied is folder:
                copied = Path(shutil.copytree(folder, scratch / "configs"))
            (copied / path.relative_to(folder)).write_text(
                _header(path) + yaml.safe_dump(_plain(value), sort_keys=False)
            )
    return copied


def _header(path: Path) -> str:
    """Package directives are comments to YAML and must survive the copy."""
    return "".join(line + "\n" for line in path.read_text().splitlines() if line.startswith("# @package"))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list) else value


def written_keys(folder: Path | None, config_name: str) -> set[str]:
    """Dotted names of all keys that the user's own file of this name sets, sections included."""
    path = folder / f"{config_name.removesuffix('.yaml')}.yaml" if folder else None
    if path is None or not path.is_file():
        return set()
    value, _ = _load(path)
    keys: set[str] = set()

    def walk(entry: Any, prefix: str) -> None:
        if isinstance(entry, dict):
            for name, child in entry.items():
                key = f"{prefix}{name}"
                if not isinstance(child, dict):
                    keys.add(key)
                walk(child, key + ".")

    walk({name: entry for name, entry in (value or {}).items() if name != "defaults"}, "")
    for entry in (value or {}).get("defaults") or []:  # a group the user chose counts as written
        keys |= {str(name).removeprefix("override ").strip("/") for name in entry} if isinstance(entry, dict) else set()
    return keys
