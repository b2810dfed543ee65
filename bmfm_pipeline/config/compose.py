"""Hydra composition: a config by name, from the user's folder or the packaged tree, resolved, filled and checked."""

import difflib
import os
import re
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from bmfm_pipeline.config.catalogue import default_transforms, list_entries, load_entry
from bmfm_pipeline.config.presets import apply_preset
from bmfm_pipeline.config.run_config import RunConfig
from bmfm_pipeline.config.strict import readable
from bmfm_pipeline.config.targets import DATA_MODULE_TARGETS, MODEL_TARGETS, TASK_TARGETS, check_targets
from bmfm_pipeline.config.tasks import TaskConfig, TrainingTaskConfig
from bmfm_pipeline.config.yaml_files import check_duplicates, written_keys
from bmfm_pipeline.errors import ConfigError

PACKAGED = Path(__file__).resolve().parents[1] / "run"
_HYDRA = threading.Lock()  # Hydra keeps its state in module globals
_UNSET_VARIABLE = re.compile(r"\$\{oc\.env:([A-Za-z_][A-Za-z0-9_]*)\}")


def compose(config_name: str, overrides: Sequence[str] = (), config_dir: str | Path | None = None) -> RunConfig:
    """The run that config `config_name` and Hydra overrides describe.

    The name is looked up in `config_dir` (when that folder exists), then in the packaged tree; both offer config groups.
    Nothing is read but configs: environment variables stay unresolved until `require_path` needs them.

    Raises ConfigError for an unknown config, key, name or target, and for contradictions between sections.
    """
    raw = compose_raw(config_name, overrides, config_dir)
    check_targets(raw)
    written = written_keys(_folder(config_dir), config_name) | {_override_key(word) for word in overrides}
    values = _plain_sections(raw)
    _fill_from_catalogue(values)
    apply_preset(values, written)
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise readable(error) from None


def compose_raw(
    config_name: str, overrides: Sequence[str] = (), config_dir: str | Path | None = None
) -> dict[str, Any]:
    """The composed YAML tree as plain values, before it is checked; unset environment variables stay as text."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    name = config_name.removesuffix(".yaml")
    folder = _folder(config_dir)
    with tempfile.TemporaryDirectory() as scratch, _HYDRA:
        primary = PACKAGED if folder is None else check_duplicates(folder, Path(scratch))
        search = [] if folder is None else [f"hydra.searchpath=[file://{PACKAGED}]"]
        try:
            with initialize_config_dir(config_dir=str(primary), version_base="1.2"):
                tree = hydra_compose(name, [*search, *overrides])
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(_hydra_message(str(error), name, folder)) from None
        return _resolved(tree)


def _folder(config_dir: str | Path | None) -> Path | None:
    folder = Path(config_dir).expanduser().absolute() if config_dir else None
    return folder if folder is not None and folder.is_dir() else None


def _hydra_message(text: str, name: str, folder: Path | None) -> str:
    text = re.sub(r"\n?Search path in use.*|\nSet the environment variable HYDRA.*", "", text, flags=re.S).strip()
    if "Cannot find primary config" in text:
        places = [place for place in (folder, PACKAGED) if place]
        names = sorted({path.stem for place in places for path in place.glob("*.yaml")})
        return f"config '{name}' was not found in {' or '.join(map(str, places))}; configs there: {', '.join(names)}"
    found = re.search(r"Could not override '([^']+)'", text)
    if found:
        return f"{found[1]}: no such key{_suggestion(found[1])}; a key that the config leaves out is added with +{found[1]}=..."
    return text


def _suggestion(key: str) -> str:
    section, _, name = key.rpartition(".")
    model: Any = RunConfig
    for part in filter(None, section.split(".")):
        annotation = getattr(model, "model_fields", {}).get(part)
        model = annotation.annotation if annotation is not None else None
        if model is TaskConfig:
            model = TrainingTaskConfig
    close = difflib.get_close_matches(name, getattr(model, "model_fields", {}), 1)
    return f"; did you mean {section + '.' if section else ''}{close[0]}?" if close else ""


def _override_key(word: str) -> str:
    return re.split(r"[=@]", word.lstrip("+~"), maxsplit=1)[0].replace("/", ".")


def _resolved(node: Any) -> Any:
    """Plain values with interpolations resolved, except those of environment variables that are not set."""
    from omegaconf import DictConfig, ListConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(node, DictConfig | ListConfig):
        keys = list(node.keys()) if isinstance(node, DictConfig) else range(len(node))
        values = {}
        for key in keys:
            if OmegaConf.is_interpolation(node, key):
                try:
                    values[key] = _resolved(node[key])
                except OmegaConfBaseException as error:
                    text = str(OmegaConf.to_container(node, resolve=False)[key])
                    if not _UNSET_VARIABLE.search(text):
                        raise ConfigError(f"{node._get_full_key(key)}: {str(error).splitlines()[0]}") from None
                    values[key] = text
            elif OmegaConf.is_missing(node, key):
                raise ConfigError(f"{node._get_full_key(key)}: a value is required (it is ??? in the config)")
            else:
                values[key] = _resolved(node[key])
        return values if isinstance(node, DictConfig) else list(values.values())
    return node


def require_path(value: str, key: str) -> str:
    """`value` as a path or address; ConfigError when it names an environment variable that is not set."""
    found = _UNSET_VARIABLE.search(str(value))
    if found:
        raise ConfigError(
            f"{key} is {value}, but the environment variable {found[1]} is not set; "
            f"run `export {found[1]}=/path/to/data`, or set {key} to a path{_alternative(found[1])}"
        )
    return str(value)


def _alternative(variable: str) -> str:
    for entry in list_entries():
        if entry.source.env == variable:
            where = f" ({variable} is the folder that holds {entry.source.file})"
            return where + (
                ". Without that data, `bmfm run zheng68k-mini` works at once" if entry.name == "zheng68k" else ""
            )
    return ""


def _plain_sections(raw: dict[str, Any]) -> dict[str, Any]:
    """Section kinds read off `_target_` lines; nulls that mean 'the default' left out."""
    values = {name: value for name, value in raw.items() if value is not None or name in ("dataset", "track_clearml")}
    module = dict(values.get("data_module") or {})
    target = module.get("_target_")
    if target is not None and DATA_MODULE_TARGETS[target] is not None:
        values["dataset"] = DATA_MODULE_TARGETS[target]
    values["data_module"] = module
    model = values.get("model")
    if isinstance(model, dict) and "_target_" in model:
        values["model"] = {**model, "model_type": MODEL_TARGETS[model["_target_"]]}
    task = values.get("task")
    if isinstance(task, list):
        if len(task) != 1:
            raise ConfigError(
                "task: a list of several tasks; run them one by one (`bmfm run` chains training and testing)"
            )
        task = task[0]
    if isinstance(task, dict):
        task = dict(task)
        if "_target_" in task:
            task["kind"] = TASK_TARGETS[task.pop("_target_")]
        if _UNSET_VARIABLE.search(str(task.get("default_root_dir") or "")):
            task["default_root_dir"] = None  # training then happens in the workspace
        values["task"] = task
    return values


def _fill_from_catalogue(values: dict[str, Any]) -> None:
    """Unset values of the data module and labels come from the named dataset; what is written wins."""
    module = values["data_module"]
    transform = module["transform_kwargs"] = dict(module.get("transform_kwargs") or {})
    dataset_kwargs = module["dataset_kwargs"] = dict(module.get("dataset_kwargs") or {})
    name = values.get("dataset")
    known = {entry.name for entry in list_entries()}
    if name is not None and name not in known and name not in DATA_MODULE_TARGETS.values():
        load_entry(name)  # raises with a suggestion
    entry = load_entry(name) if name in known else None
    if "label_columns" not in values:
        values["label_columns"] = _labels_of(dataset_kwargs) or (
            [label.model_dump() for label in entry.label_columns] if entry is not None else []
        )
    if entry is None:
        if transform.get("transforms") is None:
            transform["transforms"] = default_transforms()
    else:
        if transform.get("transforms") is None:
            transform["transforms"] = [step.model_dump() for step in entry.transforms]
        if not module.get("data_dir") and entry.source.env and not transform.get("source_h5ad_file_name"):
            module["data_dir"] = f"${{oc.env:{entry.source.env}}}"
    if module.get("data_dir"):
        found = _UNSET_VARIABLE.search(str(module["data_dir"]))
        if found and os.environ.get(found[1]):
            module["data_dir"] = os.environ[found[1]]


def _labels_of(dataset_kwargs: dict[str, Any]) -> list[dict[str, Any]]:
    """Label columns that are named only under dataset_kwargs, as older configs do."""
    labels = [{"label_column_name": name} for name in dataset_kwargs.get("label_columns") or []]
    labels += [
        {"label_column_name": name, "is_regression_label": True}
        for name in dataset_kwargs.get("regression_label_columns") or []
    ]
    return labels


def packaged_configs() -> list[str]:
    return sorted(path.stem for path in PACKAGED.glob("*.yaml"))
