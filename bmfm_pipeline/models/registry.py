"""Which model types there are, and how one is built from plain dictionaries."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from transformers import AutoConfig, AutoModel, PreTrainedModel

from bmfm_pipeline.errors import ConfigError, did_you_mean
from bmfm_pipeline.models.configuration import (
    MultitaskConfig,
    SCBertConfig,
    SCLlamaConfig,
    SCModernBertConfig,
    SCNystromformerConfig,
    SCPerformerConfig,
    describe_label_dict,
)
from bmfm_pipeline.models.gene2vec import PartlyFrozenEmbedding, PretrainedRows, read_pretrained
from bmfm_pipeline.models.multitask import MultitaskModel
from bmfm_pipeline.models.scbert import SCBertForMultitask
from bmfm_pipeline.models.schema import module_name
from bmfm_pipeline.models.scllama import SCLlamaForMultitask
from bmfm_pipeline.models.scmodernbert import SCModernBertForMultitask
from bmfm_pipeline.models.scnystromformer import SCNystromformerForMultitask
from bmfm_pipeline.models.scperformer import SCPerformerForMultitask


@dataclass(frozen=True)
class BackboneType:
    """A model type that can be built."""

    config_class: type[MultitaskConfig]
    model_class: type[MultitaskModel]


BACKBONES: dict[str, BackboneType] = {
    "scbert": BackboneType(SCBertConfig, SCBertForMultitask),
    "scmodernbert": BackboneType(SCModernBertConfig, SCModernBertForMultitask),
    "scperformer": BackboneType(SCPerformerConfig, SCPerformerForMultitask),
    "scnystromformer": BackboneType(SCNystromformerConfig, SCNystromformerForMultitask),
    "scllama": BackboneType(SCLlamaConfig, SCLlamaForMultitask),
}


def register_auto_classes() -> None:
    """Make AutoConfig and AutoModel know every backbone."""
    for name, backbone in BACKBONES.items():
        AutoConfig.register(name, backbone.config_class, exist_ok=True)
        AutoModel.register(backbone.config_class, backbone.model_class, exist_ok=True)


def find_backbone(model_type: str) -> BackboneType:
    """The backbone of a model type. Raises ConfigError for an unknown name."""
    if model_type not in BACKBONES:
        raise ConfigError(f"model_type {model_type!r} is unknown; available: {', '.join(BACKBONES)}")
    return BACKBONES[model_type]


def build_model(
    config_dict: Mapping[str, Any],
    fields: Sequence[Mapping[str, Any]],
    label_columns: Sequence[Mapping[str, Any]] = (),
    *,
    pad_token_id: int = 2,
    label_dict: Mapping[str, Mapping[str, int]] | None = None,
    vocabularies: Mapping[str, Sequence[str]] | None = None,
) -> PreTrainedModel:
    """A model with fresh weights (drawn from torch's global generator).

    Parameters
    ----------
    config_dict : sizes as in the run configuration, with `model_type`; keys the type does not have are errors.
    fields, label_columns : plain dictionaries; `vocab_size` and `num_special_tokens` of the fields must be filled.
    pad_token_id : the tokenizer's; it overrides the one in `config_dict`.
    label_dict : {column: {value: class id}}; gives n_unique_values and keeps the class names with the model.
    vocabularies : {field: tokens by id}, needed by fields with a pretrained_embedding.

    Raises ConfigError for an unknown type, key or impossible size, DataError for an unreadable embedding file.
    """
    options = {key: value for key, value in dict(config_dict).items() if not key.startswith("_")}
    backbone = find_backbone(options.pop("model_type", "scbert"))
    _refuse_unknown(options, backbone)
    columns = [_with_label_dict(dict(entry), label_dict) for entry in label_columns]
    tables: dict[str, PretrainedRows] = {}
    entries = []
    for entry in fields:
        entry = dict(entry)
        if entry.get("pretrained_embedding"):
            entry["pretrained_embedding"], tables[entry["field_name"]] = _pretrained_table(entry, vocabularies)
        entries.append(entry)
    config = backbone.config_class(
        **{**options, "fields": entries, "label_columns": columns, "pad_token_id": pad_token_id}
    )
    model = backbone.model_class(config)
    for name, found in tables.items():
        embedding = model.backbone.embeddings.get_submodule(module_name(f"{name}_embeddings"))
        assert isinstance(embedding, PartlyFrozenEmbedding)
        embedding.fill(found.ids, found.vectors, found.frozen)
    return model


def _refuse_unknown(options: dict[str, Any], backbone: BackboneType) -> None:
    known = {f.name for f in fields(backbone.config_class)} - {"fields", "label_columns"}
    for key in options:
        if key not in known:
            hint = did_you_mean(key, known, before="; ")
            raise ConfigError(f"model.{key}: {backbone.config_class.model_type} has no such setting{hint}")


def _with_label_dict(entry: dict[str, Any], label_dict: Mapping[str, Mapping[str, int]] | None) -> dict[str, Any]:
    values = (label_dict or {}).get(entry.get("label_column_name"))
    if values is None or entry.get("is_regression_label"):
        return entry
    described = describe_label_dict(values)
    if entry.get("n_unique_values") not in (None, described["n_unique_values"]):
        raise ConfigError(
            f"label_columns.{entry['label_column_name']}: n_unique_values is {entry['n_unique_values']} but the label dictionary has "
            f"{described['n_unique_values']} classes"
        )
    return entry | described


def _pretrained_table(entry: dict[str, Any], vocabularies: Mapping[str, Sequence[str]] | None):
    name, settings = entry["field_name"], dict(entry["pretrained_embedding"])
    vocabulary = (vocabularies or {}).get(name)
    if vocabulary is None:
        raise ConfigError(
            f"fields.{name}.pretrained_embedding: the tokens of the field's vocabulary are needed to place its rows"
        )
    found = read_pretrained(name, settings, vocabulary)
    settings |= {
        "dimension": int(found.vectors.shape[1]),
        "rows_used": len(found.ids),
        "rows_frozen": len(found.frozen),
        "rows_in_file": found.rows_in_file,
    }
    return settings, found
