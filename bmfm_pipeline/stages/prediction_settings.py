"""How cells are prepared for a model from elsewhere: what it says itself, defaults, and what a person says instead."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from bmfm_pipeline.config import RunConfig
from bmfm_pipeline.config.catalogue import default_transforms, without_filters
from bmfm_pipeline.config.strict import readable
from bmfm_pipeline.errors import CheckpointError, ConfigError
from bmfm_pipeline.storage import read_json

PREFIX = "data_module."
# Keys of the data module that prediction reads.
READING = (
    "max_length",
    "test_max_length",
    "max_mfi_data_len",
    "pad_to_multiple_of",
    "truncation",
    "sequence_order",
    "gene_positions",
    "log_normalize_transform",
    "sqrt_normalize_transform",
    "median_normalization",
    "rda_transform",
    "limit_genes",
    "pad_zero_expression_strategy",
)


def read_settings(words: Sequence[str]) -> dict[str, Any]:
    """`data_module.KEY=VALUE` words as a nested mapping of keys of the data module. Raises ConfigError for another word."""
    import yaml

    settings: dict[str, Any] = {}
    for word in words:
        key, _, text = word.lstrip("+").partition("=")
        if not key.startswith(PREFIX) or word.startswith("~"):
            raise ConfigError(
                f"{word}: predict takes only data_module.KEY=VALUE, for a model that does not say it itself"
            )
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(f"{word}: the value is not readable; write it as in a YAML file") from None
        *parents, last = key.removeprefix(PREFIX).split(".")
        place = settings
        for name in parents:
            place = place.setdefault(name, {})
        place[last] = value
    return settings


def settings_of_config(run: RunConfig) -> dict[str, Any]:
    """What a composed config says about reading cells; its transforms only where they are not the packaged ones."""
    module = run.data_module.model_dump(mode="json")
    settings = {name: module[name] for name in READING}
    steps = module["transform_kwargs"]["transforms"] if run.data_module.transform_datasets else []
    if steps != default_transforms():
        settings["transform_kwargs"] = {"transforms": without_filters(steps)}
    return settings


def run_of_model(folder: Path, test: RunConfig, words: Sequence[str] = ()) -> RunConfig:
    """The run that prepares the cells that `test` names for the model in `folder`: its fields, labels, vocabularies and class ids.

    Cells are cut and ordered as the model's training cells were; for a model that does not say how, `words` (data_module.KEY=VALUE) may.
    Raises ConfigError and CheckpointError.
    """
    stored_file = folder / "run_config.json"
    if not stored_file.exists():
        raise CheckpointError(
            f"{folder}: holds no run_config.json, so what the model was trained for is not known; name the artefact of a training stage"
        )
    stored, settings, asked = read_json(stored_file), read_json(folder / "bmfm.json"), read_settings(words)
    if asked and settings.get("defaults") is None:
        raise ConfigError(f"{words[0]}: cannot be changed for a model that is trained already")
    own = merge_settings(settings["data_module"], asked)
    places = test.model_dump(mode="json")["data_module"]
    for name in ("data_dir", "transform_kwargs", "transform_datasets", "dataset_kwargs"):
        own[name] = (
            merge_settings(places[name], asked.get(name, {})) if isinstance(places[name], dict) else places[name]
        )
    own["train_fraction"] = asked.get("train_fraction")  # that of the model was a share of other cells
    own["dataset_kwargs"]["label_dict_path"] = str(folder / "label_dict.json")
    tokenizer = stored["tokenizer"] | {"identifier": str(folder / "tokenizers")}
    values = stored | {"data_module": own, "tokenizer": tokenizer, "dataset": test.dataset, "notes": []}
    keep_labels(values, [column.label_column_name for column in test.label_columns])
    try:
        run = RunConfig.model_validate(values)
    except ValidationError as error:
        raise readable(error) from None
    for line in left_to_defaults(settings.get("defaults") or [], asked):
        if "transforms" not in line:  # those are the dataset's
            run.note(f"the model does not say {line.split(':')[0]}; used: {line}")
    return run


def keep_labels(values: dict[str, Any], asked: list[str]) -> None:
    """Of the model's label columns those that are asked for, all where none is, in place. Raises ConfigError where it has none of them."""
    if not asked or not values["label_columns"]:
        return
    kept = [entry for entry in values["label_columns"] if entry["label_column_name"] in asked]
    if not kept:
        names = ", ".join(entry["label_column_name"] for entry in values["label_columns"])
        raise ConfigError(
            f"label_columns: the model predicts {names}, not {', '.join(asked)}; give label=COLUMN with one of those"
        )
    names = [entry["label_column_name"] for entry in kept]
    losses = [entry for entry in values["trainer"]["losses"] or [] if entry.get("label_column_name", names[0]) in names]
    values |= {"label_columns": kept, "trainer": values["trainer"] | {"losses": losses or None}}


def merge_settings(module: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """`module` with the keys of `settings`, which may be nested, in place of its own."""
    merged = dict(module)
    for name, value in settings.items():
        both = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = merge_settings(merged[name], value) if both else value
    return merged


def left_to_defaults(defaults: Sequence[str], settings: dict[str, Any]) -> list[str]:
    """Those of the `KEY: VALUE` lines whose key `settings` does not give."""

    def given(line: str) -> bool:
        place: Any = settings
        for name in line.split(":", 1)[0].removeprefix(PREFIX).split("."):
            if not isinstance(place, dict) or name not in place:
                return False
            place = place[name]
        return True

    return [line for line in defaults if not given(line)]
