"""Checkpoints of bmfm_targets, as published: their configuration, weights and classes in our words. Older layouts are told by their keys."""

import re
from dataclasses import dataclass, field
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bmfm_pipeline.errors import CheckpointError, ConfigError
from bmfm_pipeline.models.configuration import describe_label_dict
from bmfm_pipeline.models.loading import LoadReport, load_weights, refuse_misfits
from bmfm_pipeline.models.multitask import MultitaskModel
from bmfm_pipeline.models.registry import BackboneType, find_backbone
from bmfm_pipeline.models.schema import DECODE_MODES, module_name
from bmfm_pipeline.models.unpickling import CheckpointFile, StoredTensor, plain

# Numbers of the encoder that are peculiar to published weights are computed as these were trained.
AS_TRAINED = {"legacy_attention": True}
_LABEL_HEAD = "cls.label_predictions.predictions.label_decoders."
_FIELD_HEAD = "cls.predictions.predictions.decoder.field_decoders."
_TRANSFORM = "cls.predictions.predictions.transform."
_OLDER_LABEL_KEYS = {"output_size": "n_unique_values"}


@dataclass
class Published:
    """A checkpoint of bmfm_targets: `settings` and `fields`, `label_columns` as build_model takes them, weights by today's names."""

    model_type: str
    settings: dict[str, Any]
    fields: list[dict[str, Any]]
    label_columns: list[dict[str, Any]]
    label_dict: dict[str, dict[str, int]]
    trainer: dict[str, Any]
    state: dict[str, Tensor]
    notes: list[str] = field(default_factory=list)


def is_published(file: CheckpointFile) -> bool:
    """Whether a file is a Lightning checkpoint of bmfm_targets: it carries the configuration of its model as an object."""
    values = file.values
    settings = values.get("hyper_parameters") if isinstance(values, dict) else None
    return isinstance(settings, dict) and "model_config" in settings


def read_published(file: CheckpointFile) -> Published:
    """What a checkpoint of bmfm_targets holds. Raises CheckpointError for one that cannot be taken over exactly."""
    stored = plain(_without_tensors(file.values["hyper_parameters"]))
    config = stored.get("model_config")
    if not isinstance(config, dict) or "__class__" not in config:
        raise CheckpointError(f"{file.path}: its hyper_parameters hold no model configuration of bmfm_targets")
    backbone, model_type = _backbone_of(config["__class__"].rpartition(".")[2], file.path)
    found = Published(
        model_type,
        _settings(config, backbone),
        fields=[_entry(entry) for entry in config.get("fields") or []],
        label_columns=[_entry(entry, _OLDER_LABEL_KEYS) for entry in config.get("label_columns") or []],
        label_dict=_label_dict(stored.get("label_dict"), file.path),
        trainer={key: value for key, value in (stored.get("trainer_config") or {}).items() if key != "__class__"},
        state={},
    )
    if not found.fields:
        raise CheckpointError(f"{file.path}: its configuration names no fields, so nothing can be put into the model")
    prefix = backbone.model_class.base_model_prefix
    state = {name.removeprefix("model."): tensor for name, tensor in file.state_dict().items()}
    found.state = _todays_names(state, prefix, found, file.path)
    _settle_heads(found)
    return found


def _without_tensors(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: entry for key, entry in dict(value).items() if not isinstance(entry, StoredTensor)}
    raise CheckpointError("hyper_parameters are no dictionary")


def _backbone_of(class_name: str, path: Path) -> tuple[BackboneType, str]:
    from bmfm_pipeline.config.targets import MODEL_TARGETS

    kinds = {target.rpartition(".")[2]: kind for target, kind in MODEL_TARGETS.items()}
    if class_name not in kinds:
        raise CheckpointError(f"{path}: is a {class_name}, which cannot be built; there are {', '.join(sorted(kinds))}")
    return find_backbone(kinds[class_name]), kinds[class_name]


def _settings(config: dict[str, Any], backbone: BackboneType) -> dict[str, Any]:
    """The sizes that build_model takes, out of all attributes of a stored configuration."""
    from bmfm_pipeline.config.models import MODELS

    model_type = backbone.config_class.model_type
    known = {entry.name for entry in dataclass_fields(backbone.config_class)} - {
        "fields", "label_columns", "checkpoint", "model_type",
    }  # fmt: skip
    renamed = {MODELS[model_type].legacy.get(key, key): value for key, value in config.items()}
    settings = {key: value for key, value in renamed.items() if key in MODELS[model_type].model_fields and key in known}
    return settings | {key: value for key, value in AS_TRAINED.items() if key in known}


def _entry(stored: dict[str, Any], renamed: dict[str, str] | None = None) -> dict[str, Any]:
    entry = {key: value for key, value in stored.items() if key != "__class__"}
    for old, new in (renamed or {}).items():
        if old in entry:
            value = entry.pop(old)
            entry[new] = entry.get(new) or value
    return entry


def _label_dict(stored: Any, path: Path) -> dict[str, dict[str, int]]:
    if stored is None:
        return {}
    if not isinstance(stored, dict) or not all(isinstance(values, dict) for values in stored.values()):
        raise CheckpointError(f"{path}: its label_dict is no mapping of label columns to classes")
    return {name: {str(value): int(index) for value, index in values.items()} for name, values in stored.items()}


def _todays_names(state: dict[str, Tensor], prefix: str, found: Published, path: Path) -> dict[str, Tensor]:
    """Weights by the names that models have today, whatever layout they were saved in."""
    if adapters := [name for name in state if "lora_" in name or ".base_layer." in name]:
        raise CheckpointError(
            f"{path}: holds adapters that are not merged into the weights ({adapters[0]}); merge them where it was trained "
            "(merge_and_unload) and save it again"
        )
    if any(name.startswith("cls.predictions.predictions.") for name in state):
        return dict(state)
    if any(name.startswith("classifiers.") for name in state):
        found.notes.append("saved in the layout of several classifiers beside the encoder, read by its keys")
        return {_of_several_classifiers(name, prefix): tensor for name, tensor in state.items()}
    if any(name.startswith("classifier.") for name in state):
        return _of_one_classifier(state, found, path)
    if any(name.startswith("cls.predictions.") for name in state):
        return _of_masked_language_model(state, prefix, found)
    raise CheckpointError(
        f"{path}: its weights are in no layout that is known; names begin with {', '.join(sorted({name.split('.')[0] for name in state})[:5])}"
    )


def _of_several_classifiers(name: str, prefix: str) -> str:
    if name.startswith("classifiers."):
        _, label, rest = name.split(".", 2)
        return f"{_LABEL_HEAD}{label}.decoder.{rest}"
    rest = name.removeprefix("base_model.")
    if rest == name:
        return name
    return f"{prefix}.{rest.removeprefix('model.').removeprefix(prefix + '.')}"


def _of_one_classifier(state: dict[str, Tensor], found: Published, path: Path) -> dict[str, Tensor]:
    names = [entry["label_column_name"] for entry in found.label_columns]
    if len(names) != 1:
        raise CheckpointError(
            f"{path}: holds one classifier, and its configuration names {len(names)} label columns ({', '.join(names) or 'none'}), so what "
            "it predicts is not known"
        )
    found.notes.append(f"saved in the layout of one classifier, which is the head of {names[0]}")
    head = f"{_LABEL_HEAD}{module_name(names[0])}.decoder."
    return {re.sub(r"^classifier\.", head, name): tensor for name, tensor in state.items()}


def _of_masked_language_model(state: dict[str, Tensor], prefix: str, found: Published) -> dict[str, Tensor]:
    moved = {
        re.sub(r"^cls\.predictions\.", "cls.predictions.predictions.", name): tensor for name, tensor in state.items()
    }
    found.notes.append("saved in the layout of a masked language model, read by its keys")
    if not any(name.startswith(f"{prefix}.pooler.") for name in moved):
        width = found.settings["hidden_size"]
        moved[f"{prefix}.pooler.dense.weight"] = torch.eye(width)
        moved[f"{prefix}.pooler.dense.bias"] = torch.zeros(width)
        found.notes.append("it has no pooler: the pooled vector is tanh of the first token's state")
    return moved


def _settle_heads(found: Published) -> None:
    """Leave the heads that there are weights for; what the configuration promises beyond them cannot be used, and is noted."""
    for entry in found.fields:
        name = entry["field_name"]
        modes = entry.get("decode_modes") or {}
        modes = dict(modes) if isinstance(modes, dict) else {mode: {} for mode in modes}
        stored = [mode for mode in DECODE_MODES if _has(found.state, f"{_FIELD_HEAD}{module_name(f'{name}_{mode}')}.")]
        if gone := [mode for mode in modes if mode not in stored]:
            found.notes.append(f"field {name}: no weights of its heads {', '.join(gone)}, which are left out")
        entry["decode_modes"] = {mode: dict(modes.get(mode) or {}) for mode in stored}
        if (table := entry.get("pretrained_embedding")) is not None:
            entry["pretrained_embedding"] = _table(name, table, found)
    kept = []
    for entry in found.label_columns:
        name = entry["label_column_name"]
        if not _has(found.state, f"{_LABEL_HEAD}{module_name(name)}."):
            found.notes.append(f"label column {name}: the checkpoint has no weights of its head, which is left out")
            continue
        if name in found.label_dict and not entry.get("is_regression_label"):
            entry.update(describe_label_dict(found.label_dict[name]))
        kept.append(entry)
    found.label_columns = kept
    if not any(entry["decode_modes"] for entry in found.fields) and _has(found.state, _TRANSFORM):
        found.state = {name: tensor for name, tensor in found.state.items() if not name.startswith(_TRANSFORM)}
        found.notes.append("the layer that heads of fields share is left out, for there are none")


def _has(state: dict[str, Tensor], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in state)


def _table(name: str, stored: dict[str, Any], found: Published) -> dict[str, Any]:
    """A pretrained input embedding: its vectors are among the weights, its file is not needed again."""
    place = next(key for key in found.state if key.endswith(f".{name}_embeddings.weight"))
    weight = found.state[place]
    frozen = stored.get("embedding_indices_to_freeze") or []
    mark = torch.zeros(len(weight), dtype=torch.bool)
    mark[torch.tensor(frozen, dtype=torch.int64)] = True
    found.state[place.removesuffix("weight") + "frozen_rows"] = mark
    return {
        "filename": Path(str(stored.get("filename") or "vectors")).name,
        "dimension": int(weight.shape[1]),
        "rows_used": len(weight),
        "rows_frozen": len(frozen),
        "rows_in_file": len(weight),
    }


def build_published(found: Published, source: str) -> tuple[MultitaskModel, LoadReport]:
    """The model of a checkpoint with all its weights, in evaluation mode, and the account of them.

    Raises CheckpointError.
    """
    backbone = find_backbone(found.model_type)
    try:
        config = backbone.config_class(**found.settings, fields=found.fields, label_columns=found.label_columns)
    except (ConfigError, TypeError, ValueError) as error:
        raise CheckpointError(f"{source}: its configuration cannot be built: {error}") from error
    refuse_misfits(config, found.state, source)
    torch.manual_seed(0)  # what the checkpoint lacks, such as random features, is drawn alike every time
    model = backbone.model_class(config)
    report = load_weights(model, found.state, source=source)
    report.notes += found.notes
    return model.eval(), report
