"""From a composed tree to a RunConfig: section kinds, the named dataset, the preset; everything checked."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from bmfm_pipeline.config.catalogue import default_transforms, list_entries, load_entry
from bmfm_pipeline.config.environment import expand, unset_variable
from bmfm_pipeline.config.models import settle_model
from bmfm_pipeline.config.presets import apply_preset
from bmfm_pipeline.config.run_config import RunConfig, guess_task
from bmfm_pipeline.config.strict import readable
from bmfm_pipeline.config.targets import DATA_MODULE_TARGETS, TASK_TARGETS, check_targets
from bmfm_pipeline.config.tree import Tree, compose_tree
from bmfm_pipeline.errors import ConfigError

GENERIC_TARGET = next(target for target, dataset in DATA_MODULE_TARGETS.items() if dataset is None)
# Keys of a split that go with one that exists, and so do not replace the dataset's own.
BESIDE_A_SPLIT = ("mapping", "dev_fraction", "train_fraction", "cells_per_class", "name")
MAPPINGS = ("seed", "tokenizer", "data_module", "model", "trainer", "evaluation")


def compose(config_name: str, overrides: Sequence[str] = (), config_dir: str | Path | None = None) -> RunConfig:
    """The run that config `config_name` and Hydra overrides describe.

    The name is looked up in `config_dir` (when that folder exists), then in the packaged tree; both offer config groups.
    Nothing is read but configs: environment variables that are not set stay as text until `require_path` needs them.

    Raises ConfigError for an unknown config, key, name or target, and for contradictions between sections.
    """
    tree = compose_tree(config_name, overrides, config_dir)
    check_targets(tree.values)
    values = _plain_sections({name: value for name, value in tree.values.items() if name not in tree.variables})
    _name_dataset(values, tree)
    _fill_from_catalogue(values, tree)
    values["model"], renamed = settle_model(values.get("model", {}), tree.wrote)
    apply_preset(values, tree.in_files | tree.in_overrides | renamed)
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise readable(error) from None


def _plain_sections(raw: dict[str, Any]) -> dict[str, Any]:
    """Section kinds read off `_target_` lines; nulls that mean 'the default' left out."""
    values = {name: value for name, value in raw.items() if value is not None or name not in RunConfig.model_fields}
    for name in MAPPINGS:
        if name in values:
            values[name] = _mapping(values[name], name)
    module = values["data_module"] = dict(values.get("data_module") or {})
    for name in ("transform_kwargs", "dataset_kwargs"):
        module[name] = dict(_mapping(module.get(name) or {}, f"data_module.{name}"))
    task = values.get("task", {})
    if isinstance(task, list):
        if len(task) != 1:
            raise ConfigError(
                "task: a list of several tasks; run them one by one (`bmfm run` chains training and testing)"
            )
        task = task[0]
    task = dict(_mapping(task, "task"))
    if "_target_" in task:
        task["kind"] = TASK_TARGETS[task.pop("_target_")]
    task.setdefault("kind", guess_task(task))
    if unset_variable(task.get("default_root_dir")):
        task["default_root_dir"] = None  # training then happens in the workspace
    values["task"] = task
    return values


def _mapping(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{name}: a mapping of keys is needed here, found {value!r}")
    return value


def _name_dataset(values: dict[str, Any], tree: Tree) -> None:
    """Settle which dataset of the catalogue a run is about, in place; none when it reads a file of its own.

    The dataset of a packaged config is an example: a `_target_` or a file that somebody wrote replaces it. An override wins over
    a `_target_`; two names in one config are a contradiction.
    """
    module = values["data_module"]
    target = module.get("_target_")
    stands_for = DATA_MODULE_TARGETS[target] if target else None
    named = values.get("dataset")
    if stands_for is not None:
        if not tree.wrote("dataset"):
            values["dataset"] = stands_for
            if stands_for not in _catalogue():
                raise ConfigError(
                    f"data_module._target_: {target} stands for dataset '{stands_for}', which is not in this version's catalogue "
                    f"({', '.join(_catalogue())}); save the cells as one h5ad file, and use `_target_: {GENERIC_TARGET}` with "
                    "data_module.transform_kwargs.source_h5ad_file_name"
                )
        elif "dataset" not in tree.in_overrides and named != stands_for:
            raise ConfigError(
                f"dataset is {named}, but data_module._target_ stands for {stands_for} ({target}); keep one of them"
            )
    elif not tree.wrote("dataset"):
        transform = module.get("transform_datasets", True)
        kwargs = (module["transform_kwargs"], module["dataset_kwargs"])
        has_file = (
            kwargs[0].get("source_h5ad_file_name") if transform else any(k.get("processed_data_source") for k in kwargs)
        )
        if target is not None or has_file:
            values.pop("dataset", None)


def _catalogue() -> list[str]:
    return [entry.name for entry in list_entries()]


def _fill_from_catalogue(values: dict[str, Any], tree: Tree) -> None:
    """Unset values of the data module and labels come from the named dataset; what is written wins."""
    module = values["data_module"]
    transform = module["transform_kwargs"]
    entry = load_entry(values["dataset"]) if values.get("dataset") is not None else None
    if "label_columns" not in values:
        values["label_columns"] = _labels_of(module["dataset_kwargs"]) or (
            [label.model_dump() for label in entry.label_columns] if entry is not None else []
        )
    if transform.get("transforms") is None:
        steps = default_transforms() if entry is None else [step.model_dump() for step in entry.transforms]
        transform["transforms"] = steps
    if entry is not None and entry.source.builder and module.get("data_dir"):
        values.setdefault("notes", []).append(f"data_module.data_dir is not used: {entry.name} is built, not read")
        module["data_dir"] = None
    if entry is None:
        return
    if not module.get("data_dir") and not transform.get("source_h5ad_file_name"):
        if entry.source.env:
            module["data_dir"] = expand(f"${{oc.env:{entry.source.env}}}")
        elif entry.source.file:
            transform["source_h5ad_file_name"] = entry.source.file
    place = "data_module.transform_kwargs"
    if not tree.wrote(f"{place}.input_values"):
        transform["input_values"] = entry.input_values
    chosen = [value for name, value in (transform.get("split") or {}).items() if name not in BESIDE_A_SPLIT]
    asked = any(tree.wrote(f"{part}.split_column_name") for part in (place, "data_module.dataset_kwargs"))
    if entry.split_column_name and not asked and not any(chosen):
        transform["split_column_name"] = entry.split_column_name


def _labels_of(dataset_kwargs: dict[str, Any]) -> list[dict[str, Any]]:
    """Label columns that are named only under dataset_kwargs, as older configs do."""
    labels = [{"label_column_name": name} for name in dataset_kwargs.get("label_columns") or []]
    labels += [
        {"label_column_name": name, "is_regression_label": True}
        for name in dataset_kwargs.get("regression_label_columns") or []
    ]
    return labels
