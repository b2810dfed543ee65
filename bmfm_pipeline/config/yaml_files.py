"""A person's own YAML files as text: which keys they set, and keys that are written twice."""

import os
from collections.abc import Iterator
from pathlib import Path

import yaml

from bmfm_pipeline.errors import ConfigError


def _root(text: str, path: Path) -> yaml.Node | None:
    """The tree of a YAML text with the place of every node; nothing in it is built, whatever its tags say."""
    try:
        return yaml.compose(text, yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise not_yaml(error, path) from None


def not_yaml(error: Exception, path: Path | str) -> ConfigError:
    """A YAML error as one line that names file and line."""
    mark = getattr(error, "problem_mark", None)
    line = f", line {mark.line + 1}" if mark is not None else ""
    return ConfigError(
        f"{path}{line}: not valid YAML: {getattr(error, 'problem', None) or ' '.join(str(error).split())}"
    )


def without_repeats(path: Path) -> str | None:
    """The text of a file without keys that are written twice with one value; None when there are none. Two values are an error."""
    text = path.read_text()
    cuts = [_span(text, mapping, key, value) for mapping, key, value in _repeats(_root(text, path), path)]
    for start, end in sorted(cuts, reverse=True):
        text = text[:start] + text[end:]
    return text if cuts else None


def _repeats(node: yaml.Node | None, path: Path) -> Iterator[tuple[yaml.MappingNode, yaml.Node, yaml.Node]]:
    if isinstance(node, yaml.SequenceNode):
        for entry in node.value:
            yield from _repeats(entry, path)
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, yaml.Node] = {}
    for key, value in node.value:
        if key.value not in seen:
            seen[key.value] = value
            yield from _repeats(value, path)
        elif _plain(seen[key.value]) == _plain(value):
            yield node, key, value
        else:
            raise ConfigError(
                f"{path}, line {key.start_mark.line + 1}: '{key.value}' is given twice, first as {_shown(seen[key.value])} and "
                f"then as {_shown(value)}; keep one"
            )


def _plain(node: yaml.Node) -> tuple:
    """Tag and content, to compare two nodes by."""
    if isinstance(node, yaml.MappingNode):
        return node.tag, sorted((str(_plain(key)), _plain(value)) for key, value in node.value)
    if isinstance(node, yaml.SequenceNode):
        return node.tag, [_plain(entry) for entry in node.value]
    return node.tag, node.value


def _shown(node: yaml.Node) -> str:
    return (
        node.value or "nothing" if isinstance(node, yaml.ScalarNode) else f"a block at line {node.start_mark.line + 1}"
    )


def _span(text: str, mapping: yaml.MappingNode, key: yaml.Node, value: yaml.Node) -> tuple[int, int]:
    """Where the second writing of a key begins and ends: whole lines, or part of one inside braces."""
    start, end = key.start_mark.index, value.end_mark.index
    if mapping.flow_style:
        return start, end
    begin = text.rfind("\n", 0, start) + 1
    line_of_end = text.rfind("\n", 0, end) + 1
    if not text[line_of_end:end].strip():  # a block ends where the next key begins
        return begin, line_of_end
    after = text.find("\n", end)
    return begin, len(text) if after < 0 else after + 1


def keys_in(path: Path) -> set[str]:
    """Dotted names of all keys that a file sets; a list, or an empty section, is one key."""
    found: set[str] = set()

    def walk(node: yaml.Node, prefix: str) -> None:
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            if isinstance(value, yaml.MappingNode) and value.value:
                walk(value, f"{name}.")
            else:
                found.add(name)

    root = _root(path.read_text(), path)
    if isinstance(root, yaml.MappingNode):
        walk(root, "")
    return {name for name in found if name != "defaults"}


def groups_in(path: Path) -> dict[str, str]:
    """What the defaults list of a file chooses, by config group."""
    root = _root(path.read_text(), path)
    entries = root.value if isinstance(root, yaml.MappingNode) else []
    listed = next((value for key, value in entries if key.value == "defaults"), None)
    chosen: dict[str, str] = {}
    for entry in listed.value if isinstance(listed, yaml.SequenceNode) else []:
        if isinstance(entry, yaml.MappingNode):
            for key, value in entry.value:
                name = key.value.removeprefix("override ").removeprefix("optional ").strip("/")
                chosen[name.split("@")[0].replace("/", ".")] = value.value if isinstance(value, yaml.ScalarNode) else ""
    return chosen


def named_yaml(packaged: Path, variable: str, what: str) -> dict[str, Path]:
    """{name: YAML file} of a packaged folder, then of those that the environment variable names; ConfigError for a name given twice."""
    found = {path.stem: path for path in sorted(packaged.glob("*.yaml"))}
    for folder in filter(None, os.environ.get(variable, "").split(os.pathsep)):
        if not Path(folder).is_dir():
            raise ConfigError(f"{variable}: {folder} is no folder; name folders that hold {what} YAML files")
        for path in sorted(Path(folder).glob("*.yaml")):
            if path.stem in found:
                raise ConfigError(
                    f"{path}: a {what} '{path.stem}' is there already ({found[path.stem]}); choose another name"
                )
            found[path.stem] = path
    return found
