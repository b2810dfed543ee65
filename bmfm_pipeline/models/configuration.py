"""Configurations of the models: sizes, fields and label columns, stored whole as config.json."""

import hashlib
import json
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from transformers import PretrainedConfig

from bmfm_pipeline.errors import ConfigError
from bmfm_pipeline.models.schema import ModelField, ModelLabel, read_fields, read_labels


class MultitaskConfig(PretrainedConfig):
    """Shared by all backbones: the fields that go in, the heads that come out.

    `fields` and `label_columns` are lists of plain dictionaries in the spelling of the run configuration. `pad_token_id` is the
    tokenizer's. `classifier_pooling` is `cls` (position 0) or `mean` (over all unpadded positions).
    """

    model_type = "bmfm_multitask"

    fields: list | None = None
    label_columns: list | None = None
    checkpoint: str | None = None
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None
    classifier_pooling: str | None = "cls"
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 2
    position_embedding_type: str | None = None
    max_position_embeddings: int = 512

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        # There is no weight tying anywhere: the output heads have their own matrices.
        self.tie_word_embeddings = False
        self.classifier_pooling = self.classifier_pooling or "cls"
        self.check()

    def check(self) -> None:
        """Raise ConfigError for sizes that cannot be built."""
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"model.hidden_size {self.hidden_size} is not divisible by model.num_attention_heads {self.num_attention_heads}"
            )
        if self.position_embedding_type not in (None, "absolute", "sinusoidal"):
            raise ConfigError(
                f"model.position_embedding_type is {self.position_embedding_type!r}; there are null, 'absolute' and 'sinusoidal'"
            )
        if self.classifier_pooling not in ("cls", "mean"):
            raise ConfigError(f"model.classifier_pooling is {self.classifier_pooling!r}; there are 'cls' and 'mean'")

    @cached_property
    def model_fields(self) -> list[ModelField]:
        return read_fields(self.fields)

    @cached_property
    def model_labels(self) -> list[ModelLabel]:
        return read_labels(self.label_columns, self.model_fields)

    @property
    def input_fields(self) -> list[ModelField]:
        """The fields stacked in `input_ids`, in this order."""
        return [f for f in self.model_fields if f.is_input]

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        for derived in ("model_fields", "model_labels"):
            output.pop(derived, None)
        return output

    def to_diff_dict(self) -> dict[str, Any]:
        # Everything is written: a default that changes later must not change a saved model.
        return self.to_dict()


class SCBertConfig(MultitaskConfig):
    """Post-norm BERT encoder. `attention` is `torch` (fused scaled_dot_product_attention) or None (classic, can return attentions)."""

    model_type = "scbert"

    attention: str | None = "torch"
    attention_kwargs: dict | None = None
    use_cache: bool = True

    def check(self) -> None:
        super().check()
        if self.attention == "classic":
            self.attention = None
        if self.attention not in (None, "torch"):
            raise ConfigError(
                f"model.attention is {self.attention!r}; for scbert there are 'torch' and null or 'classic'"
            )


def describe_label_dict(values: Mapping[str, int]) -> dict[str, Any]:
    """`{n_unique_values, class_names, label_dict_hash}` of one label column's dictionary of value to class id.

    The hash goes into the model's configuration, so that a head cannot later be taken over with another meaning of its classes.
    """
    names = [name for name, _ in sorted(values.items(), key=lambda item: item[1])]
    ids = sorted(values.values())
    if ids != list(range(len(ids))):
        raise ConfigError(f"label dictionary: class ids are {ids[:10]}...; they must be 0..{len(ids) - 1}, each once")
    digest = hashlib.sha256(json.dumps(names, ensure_ascii=True).encode()).hexdigest()
    return {"n_unique_values": len(names), "class_names": [str(name) for name in names], "label_dict_hash": digest}
