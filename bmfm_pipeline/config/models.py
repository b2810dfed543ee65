"""The model section: what all networks have in common, and what each type adds."""

from collections.abc import Callable
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from bmfm_pipeline.config.strict import Absent, Section
from bmfm_pipeline.config.targets import BUILDABLE_MODELS, MODEL_TARGETS
from bmfm_pipeline.errors import ConfigError

Attention = Literal["torch", "flex", "classic"] | None
# Keys that say what weights a model starts from and how its gradients are computed, not what it is.
WHERE_WEIGHTS_START = ("checkpoint", "load", "gradient_checkpointing", "gene_vectors")
# Of the heads, which are made for what is trained.
LINEAR_PATH = ("linear_path", "path_shares")
# An encoder that reads whole cells at once keeps nothing from token to token.
NO_CACHE = {"use_cache": Absent((None, True, False))}


class ModelConfig(Section):
    """Sizes of the network. `pad_token_id` follows the tokenizer whatever is written here.

    `gradient_checkpointing` computes the layers a second time in the backward pass instead of keeping what is between: less memory, more
    time, the same numbers. `load`: how the weights of `checkpoint` are taken over. strict: the model is the same. backbone: heads of the
    same name are taken over, others start fresh. encoder: all heads start fresh. null is strict, and backbone where a pretrained model of
    this pipeline is fine-tuned.
    `cell_summary`: position 0 is given the sum of the cell's gene vectors, each times its value. `linear_path`: a linear classifier of
    the same values is added to the scores of every label column. Both need a continuous field. `path_shares`: encoder and linear path count
    alike (equal), or as dev cells say after training (dev). `position_dropout`: the share of cells that training reads without positions.
    `perturbation_vectors`: every position is given the sum of the vectors of the perturbed genes, which start at zero; needs the field perturbations. `gene_vectors`: what the embedding of
    genes starts from without a checkpoint, random numbers or svd, the singular vectors of the training cells' expression.
    `convolution_layers`: convolutions over `convolution_width` (odd) neighbouring positions between the embeddings and the first layer,
    for sequences, whose positions have neighbours.
    """

    model_type: str
    hidden_size: int = Field(768, gt=0)
    num_hidden_layers: int = Field(12, gt=0)
    num_attention_heads: int = Field(12, gt=0)
    intermediate_size: int | None = Field(3072, gt=0)
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = Field(0.1, ge=0, lt=1)
    attention_probs_dropout_prob: float = Field(0.1, ge=0, lt=1)
    classifier_dropout: float | None = Field(None, ge=0, lt=1)
    classifier_pooling: Literal["cls", "mean", "max"] | None = None
    initializer_range: float | None = Field(0.02, gt=0)
    layer_norm_eps: float = Field(1e-12, gt=0)
    pad_token_id: int = 2
    position_embedding_type: Literal["absolute", "sinusoidal"] | None = None
    max_position_embeddings: int = Field(512, gt=0)
    position_dropout: float = Field(0.0, ge=0, lt=1)
    cell_summary: bool = False
    linear_path: bool = False
    path_shares: Literal["equal", "dev"] = "equal"
    perturbation_vectors: bool = False
    convolution_layers: int = Field(0, ge=0)
    convolution_width: int = Field(11, gt=0)
    gradient_checkpointing: bool = False
    gene_vectors: Literal["random", "svd"] = "random"
    checkpoint: str | None = None
    load: Literal["strict", "backbone", "encoder"] | None = None

    @model_validator(mode="after")
    def _sizes_fit(self) -> "ModelConfig":
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        for name in ("intermediate_size", "initializer_range"):
            if getattr(self, name) is None and type(self).model_fields[name].default is not None:
                raise ValueError(f"{name} is null, which only scllama can make something of; give a number")
        if self.convolution_width % 2 == 0:
            raise ValueError(f"convolution_width is {self.convolution_width}; it must be odd")
        return self


class SCBertModel(ModelConfig):
    """BERT. `attention`: torch (fused), flex (on a GPU), classic or null (the attention weights can be returned)."""

    model_type: Literal["scbert"] = "scbert"
    use_cache: bool = True
    attention: Attention = "torch"
    attention_kwargs: dict[str, Any] | None = None


class SCPerformerModel(ModelConfig):
    """BERT with attention through random features, linear in the length.

    `kernel_type`: exp, cosh (softmax) or relu, elu (generalised). `feature_redraw_interval`: training passes between two draws, null for
    never. `feature_seed`: null takes one from the seed of the run. `legacy_attention` computes as the weights of bmfm_targets were trained.
    """

    absent: ClassVar[dict[str, Absent]] = {
        **NO_CACHE,
        "causal": Absent((None, False)),
        "use_recurrent_decoding": Absent((None, False)),
        "normalization_stabilizer": Absent((None, 1e-6)),
    }

    model_type: Literal["scperformer"] = "scperformer"
    kernel_type: Literal["exp", "cosh", "relu", "elu"] = "exp"
    kernel_epsilon: float = Field(1e-4, ge=0)
    num_random_features: int | None = Field(None, gt=0)
    normalize_output: bool = True
    feature_generation_algorithm: Literal["qr", "gaussian", "auto", "guassian"] = "qr"
    regularize_feature_norms: bool = True
    feature_redraw_interval: int | None = Field(None, gt=0)
    feature_seed: int | None = Field(None, ge=0)
    legacy_attention: bool = False


class SCNystromformerModel(ModelConfig):
    """BERT with Nystrom attention through `num_landmarks` landmarks, linear in the length.

    `legacy_attention` computes as the weights of bmfm_targets were trained.
    """

    absent: ClassVar[dict[str, Absent]] = {**NO_CACHE, "type_vocab_size": Absent((None, 2))}

    model_type: Literal["scnystromformer"] = "scnystromformer"
    hidden_act: str = "gelu_new"
    layer_norm_eps: float = Field(1e-5, gt=0)
    num_landmarks: int = Field(64, gt=0)
    conv_kernel_size: int = Field(65, gt=0)
    inverse_method: Literal["original", "newton", "chebyshev"] = "original"
    inverse_n_iter: int = Field(6, gt=0)
    legacy_attention: bool = False

    @model_validator(mode="after")
    def _window_has_a_middle(self) -> "SCNystromformerModel":
        if self.conv_kernel_size % 2 == 0:
            raise ValueError(f"conv_kernel_size is {self.conv_kernel_size}; it must be odd")
        return self


class SCModernBertModel(ModelConfig):
    """Pre-norm encoder with rotary positions; attention is local (`local_attention` positions wide) except in every third layer.

    `hidden_dropout_prob` is that of the embeddings. `legacy_attention` computes as the weights of bmfm_targets were trained.
    """

    legacy: ClassVar[dict[str, str]] = {
        "hidden_activation": "hidden_act",
        "norm_eps": "layer_norm_eps",
        "embedding_dropout": "hidden_dropout_prob",
        "attention_dropout": "attention_probs_dropout_prob",
    }
    absent: ClassVar[dict[str, Absent]] = {
        **NO_CACHE,
        "reference_compile": Absent((None, False)),
        "deterministic_flash_attn": Absent((None, False)),
        "sparse_prediction": Absent((None, False)),
        "repad_logits_with_grad": Absent((None, False)),
        "decoder_bias": Absent((None, True)),
        "classifier_bias": Absent((None, False)),
        "classifier_activation": Absent((None, "gelu")),
    }

    model_type: Literal["scmodernbert"] = "scmodernbert"
    num_hidden_layers: int = Field(22, gt=0)
    intermediate_size: int | None = Field(1152, gt=0)
    hidden_dropout_prob: float = Field(0.0, ge=0, lt=1)
    attention_probs_dropout_prob: float = Field(0.0, ge=0, lt=1)
    mlp_dropout: float = Field(0.0, ge=0, lt=1)
    classifier_dropout: float | None = Field(0.0, ge=0, lt=1)
    layer_norm_eps: float = Field(1e-5, gt=0)
    max_position_embeddings: int = Field(8192, gt=0)
    attention: Attention = "torch"
    local_attention: int = Field(128, gt=0)
    global_attn_every_n_layers: int = Field(3, gt=0)
    global_rope_theta: float = Field(160000.0, gt=0)
    local_rope_theta: float = Field(10000.0, gt=0)
    legacy_attention: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    norm_bias: bool = False
    initializer_cutoff_factor: float = Field(2.0, gt=0)

    @model_validator(mode="after")
    def _heads_are_even(self) -> "SCModernBertModel":
        if self.hidden_size // self.num_attention_heads % 2:
            raise ValueError(
                f"hidden_size {self.hidden_size} / num_attention_heads {self.num_attention_heads} is odd; rotary positions turn pairs"
            )
        return self


class SCLlamaModel(ModelConfig):
    """Pre-norm encoder in the style of Llama: RMSNorm, SwiGLU, no biases, attention in both directions.

    `intermediate_size: null` is two thirds of 4 x hidden_size rounded up to a multiple of 256; `initializer_range: null` draws weights as
    torch does.
    """

    absent: ClassVar[dict[str, Absent]] = {
        **NO_CACHE,
        "flex_attention": Absent((None, True, False), "use attention: flex"),
    }

    model_type: Literal["scllama"] = "scllama"
    intermediate_size: int | None = Field(None, gt=0)
    hidden_dropout_prob: float = Field(0.0, ge=0, lt=1)
    attention_probs_dropout_prob: float = Field(0.0, ge=0, lt=1)
    classifier_dropout: float | None = Field(0.0, ge=0, lt=1)
    initializer_range: float | None = Field(None, gt=0)
    rms_norm_eps: float = Field(1e-5, gt=0)
    attention: Attention = "torch"
    num_memory_tokens: int = Field(0, ge=0)


MODELS: dict[str, type[ModelConfig]] = {
    kind.model_fields["model_type"].default: kind
    for kind in (SCBertModel, SCModernBertModel, SCPerformerModel, SCNystromformerModel, SCLlamaModel)
}
# Types whose attention is never formed pair by pair.
WITHOUT_PAIRS = ("scperformer", "scnystromformer")


def read_model(value: Any) -> ModelConfig:
    """The model section of the type that `model_type` names, scbert when it names none. Raises ValueError."""
    if isinstance(value, ModelConfig):
        return value
    if not isinstance(value, dict):
        raise ValueError("a mapping of keys is needed")
    name = value.get("model_type") or "scbert"
    if name not in MODELS:
        raise ValueError(f"model_type must be one of {', '.join(BUILDABLE_MODELS)} (found {name!r})")
    kind = MODELS[name]
    for key in value:
        if key in (*kind.model_fields, *kind.legacy, *kind.absent):
            continue
        owners = [other for other, model in MODELS.items() if key in (*model.model_fields, *model.legacy)]
        if owners:
            raise ValueError(f"{name} has no key '{key}', {' and '.join(owners)} has; remove it, or set model_type")
    return kind.model_validate({**value, "model_type": name})


def settle_model(model: dict[str, Any], wrote: Callable[[str], bool]) -> tuple[dict[str, Any], set[str]]:
    """The model section with its type settled, and the keys that a person wrote in it under an older spelling, in today's.

    Who says the type, in a `_target_` or as `model_type`, gets the defaults of that type for what they leave open, not those of the
    packaged group they build on. `wrote` tells whether a person wrote a dotted key.
    """
    target = MODEL_TARGETS.get(str(model.get("_target_")))
    named = model.get("model_type")
    said = {key for key in ("model_type", "_target_") if wrote(f"model.{key}")}
    if named and target and named != target and "_target_" in said:
        raise ConfigError(f"model.model_type is {named}, but model._target_ stands for {target}; keep one of them")
    name = named or target
    if name not in MODELS or not said:
        return (model if name is None else {**model, "model_type": name}), set()
    settled: dict[str, Any] = {"model_type": name}
    renamed: set[str] = set()
    for key, value in model.items():
        if key == "_target_" or not wrote(f"model.{key}"):
            continue
        today = MODELS[name].legacy.get(key, key)
        if today in settled and settled[today] != value:
            raise ConfigError(f"model.{today}: given in two spellings with different values; keep one")
        settled[today] = value
        if today != key:
            renamed.add(f"model.{today}")
    return settled, renamed
