"""Configurations of the models: sizes, fields and label columns, stored whole as config.json."""

import hashlib
import json
import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from transformers import PretrainedConfig

from bmfm_pipeline.errors import ConfigError
from bmfm_pipeline.models.schema import ModelField, ModelLabel, read_fields, read_labels


class MultitaskConfig(PretrainedConfig):
    """Shared by all backbones: the fields that go in, the heads that come out.

    `fields` and `label_columns` are lists of plain dictionaries in the spelling of the run configuration. `pad_token_id` is the
    tokenizer's. `classifier_pooling` is `cls` (position 0), `mean` or `max` (over all unpadded positions). `cell_summary`: position 0 is
    given the sum of the cell's gene vectors, weighted by their values. `linear_path`: a linear classifier of the same values is added to
    the scores of every label column. `perturbation_vectors`: every position is given the sum of vectors of the perturbed genes.
    `position_dropout`: the share of sequences that training reads without their position embeddings. `convolution_layers`: convolutions
    over `convolution_width` neighbouring positions between the embeddings and the first layer.
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
    position_dropout: float = 0.0
    cell_summary: bool = False
    linear_path: bool = False
    perturbation_vectors: bool = False
    convolution_layers: int = 0
    convolution_width: int = 11

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
        if not 0 <= self.position_dropout < 1:
            raise ConfigError(f"model.position_dropout is {self.position_dropout}; it is 0 or more and less than 1")
        _one_of("classifier_pooling", self.classifier_pooling, ("cls", "mean", "max"))
        if self.convolution_layers < 0:
            raise ConfigError(f"model.convolution_layers is {self.convolution_layers}; it is 0 or more")
        _has_a_middle("convolution_width", self.convolution_width)

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
    """Post-norm BERT encoder.

    `attention` is `torch` (fused scaled_dot_product_attention), `flex` (on a GPU; elsewhere computed as `torch`) or None or `classic`
    (the attention matrix is formed, and can be returned). `use_cache` and `attention_kwargs` are names of existing configurations
    that an encoder has no use for.
    """

    model_type = "scbert"

    attention: str | None = "torch"
    attention_kwargs: dict | None = None
    use_cache: bool = True

    def check(self) -> None:
        super().check()
        self.attention = _attention(self.attention)


class SCPerformerConfig(MultitaskConfig):
    """BERT encoder whose attention is computed through random features (FAVOR+), linear in the length.

    `kernel_type`: `exp` or `cosh` (positive features of softmax), `relu` or `elu` (generalised attention). `kernel_epsilon` is added
    to every feature. `num_random_features`: per head, default int(d ln d) for heads of width d. `feature_generation_algorithm`: `qr`
    (orthogonal) or `gaussian`; `regularize_feature_norms` gives every feature the norm sqrt(d). `feature_redraw_interval`: number of
    training passes after which features are drawn anew, default never. `feature_seed`: what they are drawn from, with layer and number of
    the draw; None takes a number from torch's global generator and keeps it here. `normalize_output: false` leaves queries and keys
    unscaled. `legacy_attention: true` computes as published weights were trained: padding counts in the normaliser, and the norms of
    unscaled queries and keys enter the features.
    """

    model_type = "scperformer"

    kernel_type: str = "exp"
    kernel_epsilon: float = 1e-4
    num_random_features: int | None = None
    normalize_output: bool = True
    feature_generation_algorithm: str = "qr"
    regularize_feature_norms: bool = True
    feature_redraw_interval: int | None = None
    feature_seed: int | None = None
    legacy_attention: bool = False

    def check(self) -> None:
        super().check()
        if self.feature_generation_algorithm in ("auto", "guassian"):  # spellings of existing configurations
            self.feature_generation_algorithm = {"auto": "qr", "guassian": "gaussian"}[
                self.feature_generation_algorithm
            ]
        _one_of("kernel_type", self.kernel_type, ("exp", "cosh", "relu", "elu"))
        _one_of("feature_generation_algorithm", self.feature_generation_algorithm, ("qr", "gaussian"))
        for name in ("num_random_features", "feature_redraw_interval"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"model.{name} is {getattr(self, name)}; it is 1 or more, or null")

    @property
    def features(self) -> int:
        """Random features per head."""
        width = self.hidden_size // self.num_attention_heads
        return self.num_random_features or max(1, int(width * math.log(width)))


class SCNystromformerConfig(MultitaskConfig):
    """BERT encoder with Nystrom attention: `num_landmarks` averages of queries and keys stand for all of them.

    `inverse_method` (`original`, `newton`, `chebyshev`) and `inverse_n_iter`: how the pseudo-inverse is approximated.
    `conv_kernel_size`: width of the depthwise convolution over values that is added. `legacy_attention: true` computes as published
    weights were trained: padding counts in the landmarks, whose number must divide the length, and the pseudo-inverse starts from a
    scale shared by the batch.
    """

    model_type = "scnystromformer"

    hidden_act: str = "gelu_new"
    layer_norm_eps: float = 1e-5
    num_landmarks: int = 64
    conv_kernel_size: int = 65
    inverse_method: str = "original"
    inverse_n_iter: int = 6
    legacy_attention: bool = False

    def check(self) -> None:
        super().check()
        _one_of("inverse_method", self.inverse_method, ("original", "newton", "chebyshev"))
        for name in ("num_landmarks", "inverse_n_iter"):
            if getattr(self, name) < 1:
                raise ConfigError(f"model.{name} is {getattr(self, name)}; it is 1 or more")
        _has_a_middle("conv_kernel_size", self.conv_kernel_size)


class SCModernBertConfig(MultitaskConfig):
    """Pre-norm encoder with rotary positions, gated feed-forward and, in two layers of three, attention in a window.

    Layer i attends globally when i is a multiple of `global_attn_every_n_layers`, else to keys at most `local_attention` / 2 away.
    `hidden_dropout_prob` is that of the embeddings. `legacy_attention: true` computes as published weights were trained: every layer
    turns by `global_rope_theta`, and padding that sees no key averages all values. `initializer_cutoff_factor`: where the normal distribution of first weights is cut, in standard deviations.
    """

    model_type = "scmodernbert"

    num_hidden_layers: int = 22
    intermediate_size: int = 1152
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    mlp_dropout: float = 0.0
    classifier_dropout: float | None = 0.0
    layer_norm_eps: float = 1e-5
    max_position_embeddings: int = 8192
    attention: str | None = "torch"
    local_attention: int = 128
    global_attn_every_n_layers: int = 3
    global_rope_theta: float = 160000.0
    local_rope_theta: float = 10000.0
    legacy_attention: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    norm_bias: bool = False
    initializer_cutoff_factor: float = 2.0

    def check(self) -> None:
        super().check()
        self.attention = _attention(self.attention)
        if self.hidden_size // self.num_attention_heads % 2:
            raise ConfigError(
                f"model.hidden_size {self.hidden_size} / model.num_attention_heads {self.num_attention_heads} is odd; rotary positions "
                "turn pairs of numbers"
            )
        for name in ("local_attention", "global_attn_every_n_layers"):
            if getattr(self, name) < 1:
                raise ConfigError(f"model.{name} is {getattr(self, name)}; it is 1 or more")


class SCLlamaConfig(MultitaskConfig):
    """Pre-norm encoder in the style of Llama: RMSNorm, SwiGLU, no biases, attention in both directions, no positions by default.

    `intermediate_size: null` is two thirds of 4 H, rounded up to a multiple of 256. `num_memory_tokens` learned tokens stand behind
    every cell inside the encoder. `initializer_range: null` draws Linear weights as torch does. `hidden_act` is that of the heads.
    """

    model_type = "scllama"

    intermediate_size: int | None = None
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    classifier_dropout: float | None = 0.0
    initializer_range: float | None = None
    rms_norm_eps: float = 1e-5
    attention: str | None = "torch"
    num_memory_tokens: int = 0

    def check(self) -> None:
        super().check()
        self.attention = _attention(self.attention)
        if self.num_memory_tokens < 0:
            raise ConfigError(f"model.num_memory_tokens is {self.num_memory_tokens}; it is 0 or more")

    @property
    def feed_forward_size(self) -> int:
        """Width of the feed-forward layer."""
        return self.intermediate_size or 256 * math.ceil(int(2 * 4 * self.hidden_size / 3) / 256)


def _attention(name: str | None) -> str | None:
    _one_of("attention", name, ("torch", "flex", "classic", None))
    return None if name == "classic" else name


def _one_of(key: str, value: Any, known: tuple) -> None:
    if value not in known:
        listed = ", ".join("null" if one is None else repr(one) for one in known)
        raise ConfigError(f"model.{key} is {value!r}; there are {listed}")


def _has_a_middle(key: str, width: int) -> None:
    if width < 1 or width % 2 == 0:
        raise ConfigError(f"model.{key} is {width}; it is odd and 1 or more, so that a window has a middle")


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
