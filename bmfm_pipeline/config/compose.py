"""From a composed tree to a RunConfig: section kinds, the named dataset, the preset; everything checked."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from bmfm_pipeline.config.catalogue import (
    DatasetEntry,
    default_transforms,
    downloads_folder,
    list_entries,
    load_entry,
    perturbation_transforms,
)
from bmfm_pipeline.config.data_module import NORMALISING
from bmfm_pipeline.config.environment import expand, unset_variable
from bmfm_pipeline.config.models import settle_model
from bmfm_pipeline.config.presets import apply_preset
from bmfm_pipeline.config.run_config import RunConfig, guess_task
from bmfm_pipeline.config.secrets import refuse_secrets
from bmfm_pipeline.config.sequences import settle_sequences, written_sequences
from bmfm_pipeline.config.splits import SplitConfig
from bmfm_pipeline.config.strict import readable
from bmfm_pipeline.config.studies import add_post_transforms, settle_studies
from bmfm_pipeline.config.targets import DATA_MODULE_TARGETS, TASK_TARGETS, check_targets
from bmfm_pipeline.config.tree import Tree, compose_tree
from bmfm_pipeline.errors import ConfigError
from bmfm_pipeline.storage import check_allowed, check_values

GENERIC_TARGET = next(target for target, dataset in DATA_MODULE_TARGETS.items() if dataset is None)
# Keys of a split that go with one that exists, and so do not replace the dataset's own.
BESIDE_A_SPLIT = ("mapping", "dev_fraction", "train_fraction", "cells_per_class", "name")
# Those that go with a rule of the dataset by which a new split is made.
BESIDE_A_RULE = ("weights", "stratify", "rare_classes")
MAPPINGS = ("seed", "tokenizer", "data_module", "model", "trainer", "evaluation", "promotion")


def compose(config_name: str, overrides: Sequence[str] = (), config_dir: str | Path | None = None) -> RunConfig:
    """The run that config `config_name` and Hydra overrides describe.

    The name is looked up in `config_dir` (when that folder exists), then in the packaged tree; both offer config groups.
    Nothing is read but configs: environment variables that are not set stay as text until `require_path` needs them.

    Raises ConfigError for an unknown config, key, name or target, for contradictions between sections, and for a place outside
    $BMFM_ALLOWED_ROOTS.
    """
    if config_dir is not None:
        check_allowed(config_dir, "the folder of configs")
    tree = compose_tree(config_name, overrides, config_dir)
    check_targets(tree.values)
    values = _plain_sections({name: value for name, value in tree.values.items() if name not in tree.variables})
    _name_dataset(values, tree)
    _fill_from_catalogue(values, tree)
    values["model"], renamed = settle_model(values.get("model", {}), tree.wrote)
    apply_preset(values, tree.in_files | tree.in_overrides | renamed)
    refuse_secrets(values)
    try:
        run = RunConfig.model_validate(values)
    except ValidationError as error:
        raise readable(error) from None
    plain = {name: value for name, value in run.model_dump(mode="json").items() if name != "notes"}
    check_values(plain, also=(downloads_folder(),))
    return run


def _plain_sections(raw: dict[str, Any]) -> dict[str, Any]:
    """Section kinds read off `_target_` lines; nulls that mean 'the default' left out."""
    values = {name: value for name, value in raw.items() if value is not None or name not in RunConfig.model_fields}
    for name in MAPPINGS:
        if name in values:
            values[name] = _mapping(values[name], name)
    module = values["data_module"] = dict(values.get("data_module") or {})
    for name in ("transform_kwargs", "dataset_kwargs"):
        module[name] = dict(_mapping(module.get(name) or {}, f"data_module.{name}"))
    module["sequences"] = written_sequences(module.get("sequences"))
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
    place = "data_module.transform_kwargs"
    sequences = module.get("sequences") is not None or (entry is not None and entry.kind == "dna")
    if sequences:
        settle_sequences(values, entry, tree.wrote)
    studies = entry is not None and entry.files is not None
    if studies:
        settle_studies(values, entry, tree.wrote)
    if entry is not None and not tree.wrote(f"{place}.input_values"):
        transform["input_values"] = entry.input_values
    if transform.get("transforms") is None:
        values_are = transform.get("input_values") or "counts"
        usual = perturbation_transforms if module.get("perturbation") else default_transforms
        steps = [step.model_dump() for step in entry.transforms] if entry else usual(values_are)
        if entry and values_are == "log_normalised" != entry.input_values:
            steps = [step for step in steps if step["transform_name"] not in NORMALISING]
        transform["transforms"] = steps
    if studies:
        add_post_transforms(values)
    if entry is not None and entry.source.builder and module.get("data_dir"):
        values.setdefault("notes", []).append(f"data_module.data_dir is not used: {entry.name} is built, not read")
        module["data_dir"] = None
    if entry is None:
        return
    if not module.get("data_dir"):
        named = transform.get("source_h5ad_file_name")
        if entry.source.env and (not named or os.environ.get(entry.source.env)):
            module["data_dir"] = expand(f"${{oc.env:{entry.source.env}}}")
        elif entry.source.file and not named and not sequences:
            transform["source_h5ad_file_name"] = entry.source.file
    if entry.perturbation is not None and module.get("perturbation") is not None:
        own = {"perturbation": entry.perturbation.model_dump(exclude_unset=True)}
        module["perturbation"] = _beneath(own, module, tree, "data_module")["perturbation"]
    if entry.perturbation is None or module.get("perturbation") is not None:  # its split is for perturbations alone
        _fill_split(entry, transform, tree, place)
    if entry.gene_names is not None:
        own = entry.gene_names.model_dump(exclude_unset=True)
        written = transform.get("gene_names") or {}
        transform["gene_names"] = written | {
            name: value for name, value in own.items() if not tree.wrote(f"{place}.gene_names.{name}")
        }
    if entry.promotion is not None:
        own = {"promotion": entry.promotion.model_dump(exclude_unset=True)}
        values["promotion"] = _beneath(own, {"promotion": values.get("promotion") or {}}, tree)["promotion"]
    if entry.batch_column and not tree.wrote("evaluation.batch_column"):
        values["evaluation"] = {**values.get("evaluation", {}), "batch_column": entry.batch_column}


def _beneath(own: dict[str, Any], written: dict[str, Any], tree: Tree, place: str = "") -> dict[str, Any]:
    """`written` with the values of `own` where nobody wrote one."""
    merged = dict(written)
    for name, value in own.items():
        key = f"{place}.{name}" if place else name
        if isinstance(value, dict):
            merged[name] = _beneath(value, written.get(name) or {}, tree, key)
        elif not tree.wrote(key):
            merged[name] = value
    return merged


def _fill_split(entry: DatasetEntry, transform: dict[str, Any], tree: Tree, place: str) -> None:
    """The dataset's own way to split, unless a person chose one; shares and classes may be chosen beside a rule of the dataset."""
    written = {name: value for name, value in (transform.get("split") or {}).items() if value is not None}
    if any(tree.wrote(f"{part}.split_column_name") for part in (place, "data_module.dataset_kwargs")):
        return
    own = entry.split or SplitConfig(column=entry.split_column_name)
    beside = BESIDE_A_SPLIT if own.column or own.file else (*BESIDE_A_SPLIT, *BESIDE_A_RULE)
    if any(name not in beside for name in written):
        return
    if entry.split is None:
        if entry.split_column_name:
            transform["split_column_name"] = entry.split_column_name
        return
    rule = own.model_dump(exclude_none=True)
    kept = {
        name: value for name, value in rule.items() if f"{place}.split.{name}" not in tree.in_files | tree.in_overrides
    }
    transform["split"] = {**(transform.get("split") or {}), **kept, **written}


def _labels_of(dataset_kwargs: dict[str, Any]) -> list[dict[str, Any]]:
    """Label columns that are named only under dataset_kwargs, as older configs do."""
    labels = [{"label_column_name": name} for name in dataset_kwargs.get("label_columns") or []]
    labels += [
        {"label_column_name": name, "is_regression_label": True}
        for name in dataset_kwargs.get("regression_label_columns") or []
    ]
    return labels
