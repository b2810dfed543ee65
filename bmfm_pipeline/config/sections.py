"""Fields, labels, tokenizer, seed, model and trainer: the sections that say what is learned."""

from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field, field_validator, model_validator

from bmfm_pipeline.config.adapters import LoraSettings, read_lora
from bmfm_pipeline.config.label_ontology import LabelOntology, read_ontology
from bmfm_pipeline.config.strict import Absent, Section
from bmfm_pipeline.errors import did_you_mean


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
    """A column of obs (or of a csv) to predict.

    `from_columns`: true/false columns of obs that make up a column of several classes a cell, each one a class.
    """

    absent: ClassVar[dict[str, Absent]] = {
        "is_bio_context_for_datastore": Absent((None, False)),
    }

    label_column_name: str
    task_group: str | None = None
    is_stratification_label: bool = False
    is_regression_label: bool = False
    is_multilabel: bool = False
    multilabel_str_sep: str = "|"
    from_columns: list[str] | None = Field(None, min_length=1)
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
        if self.from_columns is not None:
            if not self.is_multilabel:
                raise ValueError(f"'{name}': from_columns makes several classes a cell; set is_multilabel=true")
            if twice := sorted({flag for flag in self.from_columns if self.from_columns.count(flag) > 1}):
                raise ValueError(f"'{name}': from_columns names {', '.join(twice)} more than once")
            if mixed := [flag for flag in self.from_columns if self.multilabel_str_sep in flag]:
                raise ValueError(
                    f"'{name}': from_columns names {', '.join(mixed)}, and {self.multilabel_str_sep!r} separates classes; set another "
                    "multilabel_str_sep"
                )
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
        "enable_perturbation_metrics": Absent(
            (None, False), "remove it: perturbations are scored wherever they are predicted"
        ),
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


ControlSet = Literal["auto", "default", "full"]
ControlName = Literal[
    "majority",
    "logistic_l2",
    "logistic_l1",
    "pca50_logistic",
    "linear_probe",
    "knn",
    "train_mean",
    "ridge",
    "kmer6_logistic",
    "kmer6_ridge",
    "gc_logistic",
    "cnn",
    "celltypist",
    "no_pretrain",
]


def read_controls(value: Any) -> str | list[str]:
    """A set of controls, or a list of sets and controls in a fixed order, from either or from words between commas.

    Raises ValueError for a word that is none.
    """
    words = value.strip().strip("[]").split(",") if isinstance(value, str) else value
    if not isinstance(words, list | tuple):
        raise ValueError(f"must be one of {', '.join(get_args(ControlSet))}, or a list of controls; found {value!r}")
    words = [str(word).strip() for word in words if str(word).strip()]
    known = (*get_args(ControlSet), *get_args(ControlName))
    if unknown := [word for word in words if word not in known]:
        hint = did_you_mean(unknown[0], known, before="; ")
        raise ValueError(f"unknown control {', '.join(unknown)}; known: {', '.join(known)}{hint}")
    words = [word for word in known if word in words]
    return words[0] if len(words) == 1 and words[0] in get_args(ControlSet) else words


HELD_OUT_ONLY = ("label_mapping", "label_ontology", "label_from", "only_cells", "seen_cells", "seen_cells_by")


class EvaluationConfig(Section):
    """What stands beside a test score.

    `controls`: 'default' is the simplest guess and a linear model, 'full' adds more, 'auto' is full below 10,000 cells and default above;
    or a list of these and of controls, such as [full, no_pretrain]. The default ones are always there.
    `stratified`: resamples keep the number of test cells of each class. `group_column`: an obs column, such as the donor, whose cells
    are resampled together; null for that of the split, if it has one.
    `unknown_threshold`: below this calibrated confidence a cell is called unknown; auto takes the lowest that reaches
    `unknown_target_accuracy` on dev cells, null calls none unknown.
    `batch_column`: an obs column, such as the experiment, for scores of how well embeddings of test cells mix its values.
    `masked_positions`: about how many of the values predicted at masked positions are stored and scored.

    Of data that the model does not come from (`bmfm evaluate OTHER.h5ad`), for a model of the workspace: `label_mapping`, a csv, tsv or json
    file that says which class of the model each label is; `label_ontology`, an OBO or OWL file that relates the rest; `label_from`,
    {label column of the model: obs column}; `only_cells`, {obs column: value or values} of the cells to test. `seen_cells`: cells that the
    model was trained on are refused, left out (drop), or tested all the same (keep); `seen_cells_by`: they are told by their counts, or by
    name alone.
    """

    controls: ControlSet | list[ControlSet | ControlName] = "auto"
    rare_class_floor: int = Field(10, ge=0)
    level: float = Field(0.95, gt=0, lt=1)
    resamples: int = Field(1000, ge=1)
    stratified: bool = False
    group_column: str | None = None
    batch_column: str | None = None
    unknown_threshold: Annotated[float, Field(gt=0, le=1)] | Literal["auto"] | None = "auto"
    unknown_target_accuracy: float = Field(0.95, gt=0, lt=1)
    masked_positions: int = Field(2_000_000, ge=1000)
    label_mapping: str | None = None
    label_ontology: LabelOntology | None = None
    label_from: dict[str, str] | None = None
    only_cells: dict[str, list[str]] | None = None
    seen_cells: Literal["refuse", "drop", "keep"] = "refuse"
    seen_cells_by: Literal["counts", "names"] = "counts"

    @field_validator("controls", mode="before")
    @classmethod
    def _names_of_controls(cls, value: Any) -> Any:
        return read_controls(value)

    @field_validator("label_ontology", mode="before")
    @classmethod
    def _ontology_or_path(cls, value: Any) -> Any:
        return read_ontology(value)

    @field_validator("only_cells", mode="before")
    @classmethod
    def _lists_of_texts(cls, value: Any) -> Any:
        """Values of obs are compared as text; one stands for a list of one."""
        if not isinstance(value, dict):
            return value
        return {
            str(name): [str(one) for one in (values if isinstance(values, list | tuple) else [values])]
            for name, values in value.items()
        }

    @property
    def for_held_out(self) -> list[str]:
        """The keys that are set here and read for data that the model does not come from alone."""
        return [name for name in HELD_OUT_ONLY if getattr(self, name) != type(self).model_fields[name].default]
