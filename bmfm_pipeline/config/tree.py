"""Hydra composition: a config by name from a person's folder or the packaged tree, and which of its keys that person wrote."""

import os
import re
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bmfm_pipeline.config.environment import keep_unset
from bmfm_pipeline.config.models import MODELS, ModelConfig
from bmfm_pipeline.config.run_config import TASKS, RunConfig
from bmfm_pipeline.config.strict import Section
from bmfm_pipeline.config.tasks import TaskConfig
from bmfm_pipeline.config.yaml_files import groups_in, keys_in, not_yaml, without_repeats
from bmfm_pipeline.errors import ConfigError, closest, did_you_mean

PACKAGED = Path(__file__).resolve().parents[1] / "run"
_HYDRA = threading.Lock()  # Hydra keeps its state in module globals
_REFERENCE = re.compile(r"\$\{\.*([A-Za-z_]\w*)(?=[.}\[])")


@dataclass(frozen=True)
class Tree:
    """A composed config as plain values. Dotted keys tell what a person wrote: `in_files` of their own, or `in_overrides`.

    `variables` are keys at the top that are no section, but are there for others to refer to.
    """

    values: dict[str, Any]
    variables: frozenset[str]
    in_files: frozenset[str]
    in_overrides: frozenset[str]

    def wrote(self, key: str) -> bool:
        return is_written(key, self.in_files | self.in_overrides)


def is_written(key: str, written: set[str] | frozenset[str]) -> bool:
    """Whether `key`, or a section that holds it, was written whole."""
    parts = key.split(".")
    return any(".".join(parts[:count]) in written for count in range(1, len(parts) + 1))


def compose_tree(config_name: str, overrides: Sequence[str] = (), config_dir: str | Path | None = None) -> Tree:
    """Compose config `config_name`; references to environment variables that are not set stay as text.

    Raises ConfigError for a config, group or key that is not there, and for YAML that cannot be read.
    """
    name = config_name.removesuffix(".yaml")
    folder = _folder(config_dir)
    with tempfile.TemporaryDirectory() as scratch, _HYDRA:
        node, own_files = _composed(name, overrides, folder, Path(scratch), config_dir)
        values, variables = _resolved(node)
    in_files: set[str] = set()
    for file, package in own_files:
        prefix = f"{package}." if package else ""
        in_files |= {prefix + key for key in keys_in(file)}
        in_files |= {
            group for group, choice in groups_in(file).items() if not _is_packaged_model(group, choice, folder)
        }
    in_overrides = {key for key, value in map(_override_parts, overrides) if not _is_packaged_model(key, value, folder)}
    return Tree(values, variables, frozenset(in_files), frozenset(in_overrides))


def compose_raw(
    config_name: str, overrides: Sequence[str] = (), config_dir: str | Path | None = None
) -> dict[str, Any]:
    """The composed tree as plain values, before anything in it is checked."""
    return compose_tree(config_name, overrides, config_dir).values


def _folder(config_dir: str | Path | None) -> Path | None:
    folder = Path(config_dir).expanduser().absolute() if config_dir else None
    return folder if folder is not None and folder.is_dir() else None


def _override_parts(word: str) -> tuple[str, str]:
    """The dotted key and the value of an override."""
    key, _, value = word.lstrip("+~").partition("=")
    return key.split("@")[0].replace("/", "."), value


def _is_packaged_model(group: str, choice: str, folder: Path | None) -> bool:
    """Whether this chooses one of the packaged models: that says which network a person wants, and nothing about its size."""
    shadowed = folder is not None and (folder / "model" / f"{choice}.yaml").is_file()
    return group == "model" and not shadowed and (PACKAGED / "model" / f"{choice}.yaml").is_file()


@contextmanager
def _hydra_over(folders: Sequence[Path]) -> Iterator[Any]:
    """Hydra with several folders of configs, the first of which wins; a Hydra that runs already is put back afterwards.

    Its own entry points take one folder: with hydra.searchpath, a top config is still looked for in that one only.
    """
    from hydra import version
    from hydra._internal.hydra import Hydra
    from hydra._internal.utils import create_config_search_path
    from hydra.core.config_search_path import SearchPathQuery
    from hydra.core.global_hydra import GlobalHydra

    path = create_config_search_path(str(folders[0]))
    before = "main"
    for number, folder in enumerate(folders[1:]):
        path.append(f"more-{number}", f"file://{folder}", SearchPathQuery(provider=before, path=None))
        before = f"more-{number}"
    running, base = GlobalHydra.instance(), version.VersionBase.instance()
    theirs = running.hydra, base.version_base
    running.clear()
    try:
        version.setbase("1.2")
        Hydra.create_main_hydra2(task_name="bmfm", config_search_path=path)
        yield running
    finally:
        running.hydra, base.version_base = theirs


def _composed(
    name: str, overrides: Sequence[str], folder: Path | None, scratch: Path, asked: str | Path | None
) -> tuple[Any, list[tuple[Path, str]]]:
    """The composed node, and the files of the person's folder that are part of it with the package of each."""
    from hydra import compose as hydra_compose
    from hydra.errors import HydraException, OverrideParseException
    from hydra.types import RunMode
    from omegaconf.errors import OmegaConfBaseException

    folders = [scratch, *([folder] if folder else []), PACKAGED]
    while True:
        try:
            with _hydra_over(folders) as hydra:
                node = hydra_compose(name, list(overrides))
                if folder is None:
                    return node, []
                parts = hydra.config_loader().compute_defaults_list(name, list(overrides), RunMode.RUN).defaults
            break
        except yaml.YAMLError as error:
            _mend(error, folder, scratch)
        except OverrideParseException as error:
            raise ConfigError(
                f"'{error.override}' is not an override; write key=value, +key=value, ++key=value or ~key, and put quotes around "
                "a value with spaces or special characters"
            ) from None
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(_hydra_message(str(error), name, folder, asked)) from None
        except (OSError, UnicodeDecodeError) as error:  # a file that cannot be opened, or holds no mapping
            raise ConfigError(f"config '{name}': {error}") from None
    own = [(folder / f"{part.config_path}.yaml", part.package or "") for part in parts if part.config_path]
    return node, [(file, package) for file, package in own if file.is_file()]


def _mend(error: yaml.YAMLError, folder: Path | None, scratch: Path) -> None:
    """Put a copy without repeated keys before the file that Hydra refused for them; any other trouble is an error."""
    mark = getattr(error, "context_mark", None) or getattr(error, "problem_mark", None)
    path = Path(mark.name) if mark is not None else Path()
    text = without_repeats(path) if "duplicate" in str(getattr(error, "problem", "")) and path.is_file() else None
    if text is None or folder is None or not path.is_relative_to(folder):
        raise not_yaml(error, path)
    copy = scratch / path.relative_to(folder)
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_text(text)


def _hydra_message(text: str, name: str, folder: Path | None, asked: str | Path | None) -> str:
    text = re.sub(
        r"\n?(Search path in use|Config search path:).*|\nSet the environment variable HYDRA.*", "", text, flags=re.S
    )
    text = " ".join(text.split())
    if "Cannot find primary config" in text:
        places = [place for place in (folder, PACKAGED) if place]
        names = sorted({path.stem for place in places for path in place.glob("*.yaml")})
        absent = f" ({asked} is not a folder)" if asked and folder is None else ""
        hint = did_you_mean(name, names)
        return (
            f"config '{name}' was not found in {' or '.join(map(str, places))}{absent}; {hint}{' ' if hint else ''}configs there: "
            f"{', '.join(names)}"
        )
    found = re.search(r"Could not override '([^']+)'", text)
    if found and "No match in the defaults list" not in text:
        return _no_such_key(found[1])
    return text


def _no_such_key(key: str) -> str:
    names = _keys_of(key.rpartition(".")[0])
    section, dot, name = key.rpartition(".")
    if name in names:
        return f"{key}: this config leaves that key out, so it is added with a plus: +{key}=..."
    if close := closest(name, names):
        return f"{key}: no such key; did you mean '{section}{dot}{close}'?"
    return f"{key}: no such key" + (f"; keys of {section}: {', '.join(sorted(names))}" if names else "")


def _keys_of(section: str) -> list[str]:
    """Names of the keys that may stand in a section given by its dotted name."""
    model: Any = RunConfig
    for part in filter(None, section.split(".")):
        field = model.model_fields.get(part)
        model = getattr(field, "annotation", None)
        if not (isinstance(model, type) and issubclass(model, Section)):
            return []
    kinds = TASKS.values() if model is TaskConfig else MODELS.values() if model is ModelConfig else [model]
    return list(dict.fromkeys(name for kind in kinds for name in kind.model_fields))


def usable_cores() -> int:
    """Cores that this process may use: what `${num_cores_auto:}` stands for in configs of bmfm_targets."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _resolved(node: Any) -> tuple[dict[str, Any], frozenset[str]]:
    """Plain values without interpolations, and the keys at the top that are only there to be referred to."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    OmegaConf.register_new_resolver("num_cores_auto", lambda *_: usable_cores(), replace=True)
    plain = OmegaConf.to_container(node, resolve=False)
    referred = frozenset(_REFERENCE.findall(str(plain))) - set(RunConfig.model_fields)
    try:
        values = OmegaConf.to_container(OmegaConf.create(keep_unset(plain)), resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        if missing := re.search(r"Missing mandatory value: (\S+)", str(error)):
            where = missing[1] if "interpolation" in str(error) else error.full_key
            raise ConfigError(f"{where}: a value is required (it is ??? in the config)") from None
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}") from None
    return values, referred & values.keys()
