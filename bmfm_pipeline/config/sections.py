"""Fields, labels, tokenizer, seed, model and trainer: the sections that say what is learned."""

from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from bmfm_pipeline.config.adapters import LoraSettings, read_lora
from bmfm_pipeline.config.label_ontology import LabelOntology, read_ontology
from bmfm_pipeline.config.strict import Absent, Section


class SeedConfig(Section):
    """One seed for everything random: splits, order, masks, dropout, resampling."""

    seed_value: int = 1234


# Identifiers of vocabularies that preprocessing builds.
BUILT_VOCABULARIES = ("data", "hgnc", "hgnc_protein_coding")


class TokenizerConfig(Section):
    """Where token ids come from.

    `identifier`: 'data' builds the vocabulary from the training cells, 'hgnc' and 'hgnc_protein_coding' from the gene-name table that
    data_module.transform_kwargs.gene_names.table names, else a folder with tokenizers/<field>/. `prepend_tokens` stand before
    the genes of every cell in place of [CLS]; every vocabulary must have them.
    """

    identifier: str = "data"
    prepend_tokens: list[str] | None = None

    @field_validator("prepend_tokens")
    @classmethod
    def _each_once(cls, value: list[str] | None) -> list[str] | None:
        if value and (len(set(value)) < len(value) or not all(token.strip() for token in value)):
            raise ValueError(f"must name tokens, each once; found {', '.join(value)}")
        return value or None

    @property
    def is_folder(self) -> bool:
        """Whether `identifier` is the path of a tokenizer folder."""
        return self.identifier not in BUILT_VOCABULARIES


class PreTrainedEmbeddingConfig(Section):
    """Rows of a gene2vec text file as an input embedding.

    `pre_trained_indices_to_use`: rows of the file, counted from 0 after its first line (default: all whose token is in the
    vocabulary). `embedding_indices_to_freeze`: token ids whose rows are kept as the file has them (default: all that it gave).
    """

    filename: str
    embedding_indices_to_freeze: list[int] | None = None
    pre_trained_indices_to_use: list[int] | None = None


# Fields whose vocabulary can be completed from the training cells.
DYNAMIC_FIELDS = ("genes", "expressions", "label_expressions")


class FieldInfo(Section):
    """One parallel stream of tokens or values, such as genes or expressions."""

    legacy: ClassVar[dict[str, str]] = {"continuous_value_encoder_kwargs": "encoder_kwargs"}
    absent: ClassVar[dict[str, Absent]] = {
        "datastore_config": Absent(),
    }

    field_name: str
    vocab_size: int | None = None
    pretrained_embedding: PreTrainedEmbeddingConfig | None = None
    vocab_update_strategy: Literal["static", "dynamic"] = "static"
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

    @field_validator("vocab_update_strategy", mode="before")
    @classmethod
    def _none_is_static(cls, value: Any) -> Any:
        return "static" if value is None else value

    @model_validator(mode="after")
    def _masked_means_input(self) -> "FieldInfo":
        if self.vocab_update_strategy == "dynamic" and self.field_name not in DYNAMIC_FIELDS:
            raise ValueError(
                f"field '{self.field_name}': vocab_update_strategy dynamic is for {', '.join(DYNAMIC_FIELDS)}, whose tokens the data "
                "hold; use static"
            )
        if self.vocab_update_strategy == "dynamic" and self.continuous:
            raise ValueError(
                f"field '{self.field_name}': a continuous field has no vocabulary that could be dynamic; use static, or "
                "tokenization_strategy tokenize"
            )
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
    label_ontology: LabelOntology | None = None
    decode_from: int | None = None

    @field_validator("label_ontology", mode="before")
    @classmethod
    def _path_or_mapping(cls, value: Any) -> Any:
        return read_ontology(value)

    @model_validator(mode="after")
    def _one_kind(self) -> "LabelColumnInfo":
        name = self.label_column_name
        if self.is_regression_label and self.is_multilabel:
            raise ValueError(f"'{name}' cannot be both is_regression_label and is_multilabel; keep one")
        if self.label_ontology is not None and (self.is_regression_label or self.is_multilabel):
            kind = "numbers" if self.is_regression_label else "several classes a cell"
            raise ValueError(f"'{name}' holds {kind}; label_ontology is for a column of one class a cell, remove it")
        if self.is_multilabel and not self.multilabel_str_sep.strip():
            raise ValueError(f"'{name}': multilabel_str_sep is empty; name the sign between the classes, such as |")
        if self.is_stratification_label and (self.is_regression_label or self.is_multilabel):
            kind = "numbers" if self.is_regression_label else "several classes a cell"
            raise ValueError(
                f"'{name}' holds {kind}, so a split cannot be balanced over it; set is_stratification_label=false, and name another column "
                "with data_module.transform_kwargs.split.stratify"
            )
        return self


class TrainerConfig(Section):
    """Losses, optimiser and schedule. `losses: null` means one loss per masked field and label column.

    `lr_schedule`: how the rate falls after the warm-up over `lr_decay_steps` (null or -1: to the end of training), down to
    `min_lr_ratio` of it; null is linear where lr_decay_steps is given, else constant. `layerwise_lr_decay`: each layer below the
    heads learns at this share of the rate of the one above it. `ema_decay`: validate and export a moving average of the weights.
    `lora_config`: train low-rank adapters in place of the encoder; a preset's name, or a mapping.
    """

    absent: ClassVar[dict[str, Absent]] = {
        "batch_size": Absent(instead="set data_module.batch_size"),
        "metrics": Absent((None, []), "name metrics in the entries of trainer.losses"),
        "batch_prediction_behavior": Absent((None, "track")),  # predictions are always kept
        "enable_perturbation_metrics": Absent((None, False)),
    }

    losses: list[dict[str, Any]] | None = None
    learning_rate: float = Field(1e-4, gt=0)
    betas: tuple[float, float] = (0.9, 0.99)
    epsilon: float = Field(1e-8, gt=0)
    weight_decay: float | None = Field(None, ge=0)
    warmup_steps: int = Field(0, ge=0)
    lr_decay_steps: int | None = Field(None, ge=-1)
    lr_schedule: Literal["linear", "cosine", "constant"] | None = None
    min_lr_ratio: float = Field(0.0, ge=0, le=1)
    layerwise_lr_decay: float | None = Field(None, gt=0, le=1)
    ema_decay: float | None = Field(None, gt=0, lt=1)
    pooling_method: Literal["first_token", "pooling_layer", "mean_pooling"] | int | list[str | int] = "first_token"
    lora_config: LoraSettings | None = None

    @field_validator("lora_config", mode="before")
    @classmethod
    def _preset_or_mapping(cls, value: Any) -> Any:
        return read_lora(value)

    @model_validator(mode="after")
    def _one_schedule(self) -> "TrainerConfig":
        if self.lr_schedule == "constant" and self.lr_decay_steps is not None:
            raise ValueError(
                f"lr_schedule is constant, but lr_decay_steps is {self.lr_decay_steps}; set lr_decay_steps=null, or lr_schedule to "
                "linear or cosine"
            )
        if self.schedule == "constant" and self.min_lr_ratio:
            raise ValueError(
                f"min_lr_ratio is {self.min_lr_ratio}, but the rate is constant; set lr_schedule to linear or cosine"
            )
        return self

    @property
    def schedule(self) -> str:
        """How the rate falls after the warm-up: linear, cosine or constant."""
        return self.lr_schedule or ("constant" if self.lr_decay_steps is None else "linear")


ControlName = Literal["majority", "logistic_l2", "logistic_l1", "pca50_logistic"]


class EvaluationConfig(Section):
    """What stands beside a test score. `controls`: 'default' is majority and L2 logistic regression; 'full' adds more."""

    controls: Literal["default", "full"] | list[ControlName] = "default"
    rare_class_floor: int = Field(10, ge=0)
    level: float = Field(0.95, gt=0, lt=1)
    resamples: int = Field(1000, ge=1)
