"""Fields, labels, tokenizer, seed, model and trainer: the sections that say what is learned."""

from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from bmfm_pipeline.config.strict import Absent, Section


class SeedConfig(Section):
    """One seed for everything random: splits, order, masks, dropout, resampling."""

    seed_value: int = 1234


class TokenizerConfig(Section):
    """`identifier`: 'data' builds the vocabulary from the training cells, else a folder with tokenizers/<field>/."""

    absent: ClassVar[dict[str, Absent]] = {"prepend_tokens": Absent((None, []))}

    identifier: str = "data"


class PreTrainedEmbeddingConfig(Section):
    """Rows of a gene2vec text file as an input embedding."""

    absent: ClassVar[dict[str, Absent]] = {
        "embedding_indices_to_freeze": Absent(instead="remove it: the rows found in the file are frozen"),
        "pre_trained_indices_to_use": Absent(instead="remove it: the rows found in the file are used"),
    }

    filename: str


class FieldInfo(Section):
    """One parallel stream of tokens or values, such as genes or expressions."""

    legacy: ClassVar[dict[str, str]] = {"continuous_value_encoder_kwargs": "encoder_kwargs"}
    absent: ClassVar[dict[str, Absent]] = {
        "vocab_update_strategy": Absent((None, "static")),
        "datastore_config": Absent(),
    }

    field_name: str
    vocab_size: int | None = None
    pretrained_embedding: PreTrainedEmbeddingConfig | None = None
    is_masked: bool = False
    is_input: bool = True
    decode_modes: dict[str, dict[str, Any]] | None = None
    tokenization_strategy: Literal["tokenize", "continuous_value_encoder"] = "tokenize"
    num_special_tokens: int = 0
    encoder_kwargs: dict[str, Any] | None = None

    @field_validator("decode_modes", mode="before")
    @classmethod
    def _list_of_modes(cls, value: Any) -> Any:
        return {mode: {} for mode in value} if isinstance(value, list) else value

    @model_validator(mode="after")
    def _masked_means_input(self) -> "FieldInfo":
        if self.is_masked and not self.is_input:
            raise ValueError(
                f"field '{self.field_name}' is_masked=true needs is_input=true: only what the model sees can be masked"
            )
        return self

    @property
    def continuous(self) -> bool:
        return self.tokenization_strategy == "continuous_value_encoder"


class LabelColumnInfo(Section):
    """A column of obs (or of a csv) to predict."""

    absent: ClassVar[dict[str, Absent]] = {
        "is_bio_context_for_datastore": Absent((None, False)),
        "label_ontology": Absent(),
    }

    label_column_name: str
    task_group: str | None = None
    is_stratification_label: bool = False
    is_regression_label: bool = False
    is_multilabel: bool = False
    multilabel_str_sep: str = "|"
    classifier_depth: Literal[1, 2] = 1
    gradient_reversal_coefficient: float | None = None
    n_unique_values: int | None = None
    silent_label_values: list[str] | None = None
    decode_from: int | None = None


class ModelConfig(Section):
    """Sizes of the network. `pad_token_id` follows the tokenizer whatever is written here."""

    model_type: Literal["scbert", "scmodernbert", "scperformer", "scnystromformer", "scllama"] = "scbert"
    hidden_size: int = Field(768, gt=0)
    num_hidden_layers: int = Field(12, gt=0)
    num_attention_heads: int = Field(12, gt=0)
    intermediate_size: int = Field(3072, gt=0)
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = Field(0.1, ge=0, lt=1)
    attention_probs_dropout_prob: float = Field(0.1, ge=0, lt=1)
    initializer_range: float = Field(0.02, gt=0)
    layer_norm_eps: float = Field(1e-12, gt=0)
    pad_token_id: int = 2
    use_cache: bool = True
    classifier_dropout: float | None = None
    classifier_pooling: Literal["cls", "mean"] | None = None
    position_embedding_type: Literal["absolute", "sinusoidal"] | None = None
    max_position_embeddings: int = Field(512, gt=0)
    attention: Literal["torch", "flex", "classic"] | None = "torch"
    attention_kwargs: dict[str, Any] | None = None
    checkpoint: str | None = None

    @model_validator(mode="after")
    def _heads_divide(self) -> "ModelConfig":
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        return self


class TrainerConfig(Section):
    """Losses, optimiser and schedule. `losses: null` means one loss per masked field and label column."""

    absent: ClassVar[dict[str, Absent]] = {
        "batch_size": Absent(instead="set data_module.batch_size"),
        "metrics": Absent((None, []), "name metrics in the entries of trainer.losses"),
        "batch_prediction_behavior": Absent((None, "track")),  # predictions are always kept
        "lora_config": Absent(),
        "enable_perturbation_metrics": Absent((None, False)),
    }

    losses: list[dict[str, Any]] | None = None
    learning_rate: float = Field(1e-4, gt=0)
    betas: tuple[float, float] = (0.9, 0.99)
    epsilon: float = Field(1e-8, gt=0)
    weight_decay: float | None = Field(None, ge=0)
    warmup_steps: int = Field(0, ge=0)
    lr_decay_steps: int | None = Field(None, ge=-1)
    pooling_method: Literal["first_token", "pooling_layer", "mean_pooling"] | int | list[str | int] = "first_token"


ControlName = Literal["majority", "logistic_l2", "logistic_l1", "pca50_logistic"]


class EvaluationConfig(Section):
    """What stands beside a test score. `controls`: 'default' is majority and L2 logistic regression; 'full' adds more."""

    controls: Literal["default", "full"] | list[ControlName] = "default"
    rare_class_floor: int = Field(10, ge=0)
    level: float = Field(0.95, gt=0, lt=1)
    resamples: int = Field(1000, ge=1)
