"""RunConfig: one resolved and checked configuration, and the part of it that names an artefact."""

from typing import Any, Literal

from pydantic import Field, SerializeAsAny, field_validator, model_validator

from bmfm_pipeline.config.accelerator import find_accelerator
from bmfm_pipeline.config.checks import check_run, derive_decode_modes, resolve_losses
from bmfm_pipeline.config.data_module import DataModuleConfig
from bmfm_pipeline.config.models import ModelConfig, SCBertModel, read_model
from bmfm_pipeline.config.promotion import PromotionConfig
from bmfm_pipeline.config.reshaping import batching_view, note_read_depth
from bmfm_pipeline.config.sections import (
    EvaluationConfig,
    FieldInfo,
    LabelColumnInfo,
    SeedConfig,
    TokenizerConfig,
    TrainerConfig,
)
from bmfm_pipeline.config.splits import resolve_split
from bmfm_pipeline.config.strict import Section
from bmfm_pipeline.config.tasks import (
    InterpretTaskConfig,
    PredictTaskConfig,
    TaskConfig,
    TestTaskConfig,
    TrainingTaskConfig,
)
from bmfm_pipeline.errors import ConfigError

TASKS: dict[str, type[TaskConfig]] = {
    "train": TrainingTaskConfig,
    "test": TestTaskConfig,
    "predict": PredictTaskConfig,
    "interpret": InterpretTaskConfig,
}
PAD_TOKEN_ID = 2

# What says only where and how a run executes: it cannot change the numbers, so it does not enter a key.
EXECUTION_ONLY: dict[str, tuple[str, ...]] = {
    "data_module": (
        "data_dir",
        "num_workers",
        "dataset_kwargs",
        "transform_kwargs",
        "transform_datasets",
    ),
    "model": ("checkpoint", "use_cache", "gradient_checkpointing"),
    "task": (
        "default_root_dir",
        "accelerator",
        "strategy",
        "devices",
        "num_nodes",
        "require_accelerator",
        "enable_progress_bar",
        "enable_model_summary",
        "log_every_n_steps",
        "memory_limit",
        "checkpoint",
    ),
}

# What preprocessing reads of a label column.
LABELS_IN_DATA = (
    "label_column_name",
    "is_stratification_label",
    "is_regression_label",
    "is_multilabel",
    "multilabel_str_sep",
    "from_columns",
    "silent_label_values",
    "label_ontology",
)


def standard_fields() -> list[dict[str, Any]]:
    return [{"field_name": "genes"}, {"field_name": "expressions", "is_masked": True}]


class RunConfig(Section):
    """Everything a stage needs to know. Build it with `compose`, or from its own `model_dump(mode="json")`."""

    seed: SeedConfig = Field(default_factory=SeedConfig)
    dataset: str | None = None
    fields: list[FieldInfo] = Field(default_factory=lambda: [FieldInfo(**field) for field in standard_fields()])
    label_columns: list[LabelColumnInfo] = Field(default_factory=list)
    tokenizer: TokenizerConfig = Field(default_factory=TokenizerConfig)
    data_module: DataModuleConfig = Field(default_factory=DataModuleConfig)
    model: SerializeAsAny[ModelConfig] = Field(default_factory=SCBertModel)
    trainer: TrainerConfig = Field(default_factory=TrainerConfig)
    task: SerializeAsAny[TaskConfig] = Field(default_factory=TrainingTaskConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    promotion: PromotionConfig = Field(default_factory=PromotionConfig)
    track_clearml: dict[str, Any] | None = None
    preset: Literal["auto", "none", "laptop"] = "none"
    preset_used: str | None = None
    sizes_from_checkpoint: bool = False
    notes: list[str] = Field(default_factory=list)

    @field_validator("fields", mode="before")
    @classmethod
    def _fields_or_standard(cls, value: Any) -> Any:
        return standard_fields() if value is None else value

    @field_validator("model", mode="before")
    @classmethod
    def _model_type(cls, value: Any) -> Any:
        return read_model(value)

    @field_validator("task", mode="before")
    @classmethod
    def _task_kind(cls, value: Any) -> Any:
        if isinstance(value, TaskConfig):
            return value
        if isinstance(value, list):
            raise ValueError("a list of tasks is run one task at a time; give one task here")
        values = dict(value or {})
        kind = values.pop("kind", None) or guess_task(values)
        if kind not in TASKS:
            raise ValueError(f"kind must be one of {', '.join(TASKS)}, found {kind!r}")
        _refuse_keys_of_other_tasks(values, kind)
        return TASKS[kind].model_validate(values)

    @model_validator(mode="after")
    def _check(self) -> "RunConfig":
        self._note_what_is_not_followed()
        check_run(self)
        resolve_split(self)
        if self.is_training:
            self._start_from_task_checkpoint()
            losses = resolve_losses(self)
            self.trainer.losses = losses
            derive_decode_modes(self, losses)
        return self

    def _note_what_is_not_followed(self) -> None:
        note_read_depth(self)
        if self.model.pad_token_id != PAD_TOKEN_ID:
            self.note(f"model.pad_token_id {self.model.pad_token_id}: follows the tokenizer, {PAD_TOKEN_ID}")
            self.model.pad_token_id = PAD_TOKEN_ID
        if getattr(self.model, "attention", None) == "flex" and find_accelerator() is None:
            self.note("model.attention flex: needs a GPU, computed here as torch, which gives the same numbers")
        if self.is_training and self.task.memory_limit is not None and not self.task.auto_batch_size:
            self.note("task.memory_limit is not used: it is for task.auto_batch_size, which is off")
        if self.is_training and self.task.default_root_dir is not None:
            self.note(f"task.default_root_dir {self.task.default_root_dir}: models and checkpoints go to the workspace")
        if self.track_clearml is not None:
            self.note("track_clearml is not used: runs are tracked in MLflow")

    def _start_from_task_checkpoint(self) -> None:
        """A training task may name its checkpoint too, and then wins over the model section."""
        named = self.task.checkpoint
        if named is None:
            return
        if self.model.checkpoint not in (None, named):
            self.note(f"model.checkpoint {self.model.checkpoint}: task.checkpoint {named} is used instead")
        self.model.checkpoint, self.task.checkpoint = named, None

    def check_trainable(self) -> None:
        """Raise ConfigError when there is nothing to learn. Not part of composing: a run may only preprocess its cells."""
        if self.trainer.losses:
            return
        if self.data_module.collation_strategy == "sequence_classification":
            raise ConfigError(
                "label_columns: sequence_classification needs at least one label column; add `- label_column_name: COLUMN` to "
                "label_columns, or give label=COLUMN"
            )
        if self.predicts_pairs:
            raise ConfigError("trainer.losses: nothing is predicted; name a loss on label_expressions or a delta field")
        raise ConfigError(
            "trainer.losses: nothing is predicted; mask a field (fields.1.is_masked=true, with data_module.mlm=true) or add a label "
            "column"
        )

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    @property
    def is_training(self) -> bool:
        return isinstance(self.task, TrainingTaskConfig)

    @property
    def task_kind(self) -> str:
        return next(kind for kind, model in TASKS.items() if type(self.task) is model)

    @property
    def predicts_fields(self) -> bool:
        module = self.data_module
        return (module.masks or self._whole_cells) and module.collation_strategy in ("language_modeling", "multitask")

    @property
    def predicts_whole_cells(self) -> bool:
        """Whether all genes of a cell are predicted from part of it, in place of masked ones."""
        return self._whole_cells and self.predicts_fields

    @property
    def _whole_cells(self) -> bool:
        strategy = self.data_module.masking_strategy
        return strategy is not None and strategy.kind == "wced"

    @property
    def predicts_labels(self) -> bool:
        return self.data_module.collation_strategy in ("sequence_classification", "multitask")

    @property
    def predicts_pairs(self) -> bool:
        """Whether perturbed cells are predicted from control cells beside them."""
        return self.data_module.collation_strategy == "sequence_labeling"

    @property
    def observed(self) -> str:
        """What the rows of the data are."""
        return "cells" if self.data_module.sequences is None else "sequences"

    @property
    def training_stage(self) -> str:
        """'pretrain' when tokens are masked, else 'finetune'."""
        return "pretrain" if self.predicts_fields else "finetune"

    def model_dump(self, **options: Any) -> dict[str, Any]:
        dumped = super().model_dump(**options)
        if isinstance(dumped.get("task"), dict):
            dumped["task"]["kind"] = self.task_kind
        return dumped

    def key_view(self, stage: str) -> dict[str, Any]:
        """The part of this config that enters the key of a `stage` artefact; files and artefacts enter as inputs, by content.

        Raises ConfigError when a training stage would have nothing to learn.
        """
        plain = self.model_dump(mode="json")
        settings = self.data_module.transform_kwargs
        if stage == "preprocess":
            seed = self.seed.seed_value if settings.random_state is None else settings.random_state
            sequences = self.data_module.sequences
            transform = plain["data_module"]["transform_kwargs"]
            for name in ("source_h5ad_file_name", "processed_data_source", "random_state", "num_workers"):
                transform.pop(name)
            transform["reading"].pop("cell_table")  # tables enter as inputs, by content
            if transform["files"]:
                transform["files"].pop("table")
            for name in ("table", "orthologs"):  # the files enter as inputs, by content
                transform["gene_names"].pop(name)
            transform["map_orthologs"] = self.data_module.map_orthologs
            for name in ("stratifying_label", "split_column_name", "split_weights"):  # older words for the split
                transform.pop(name)
            transform["split"] = resolve_split(self).key_view()
            return {
                "transform": transform,
                "seed": seed,
                "transform_datasets": self.data_module.transform_datasets,
                "perturbation": self.data_module.perturbation and self.data_module.perturbation.preprocessing(),
                "labels": [
                    {name: _without_file(label)[name] for name in LABELS_IN_DATA} for label in plain["label_columns"]
                ],
                "tokenizer": "folder" if self.tokenizer.is_folder else self.tokenizer.identifier,
                "prepend_tokens": self.tokenizer.prepend_tokens,
                **({} if sequences is None else {"sequences": sequences.preprocess_view()}),
                "dynamic": sorted(
                    entry.field_name for entry in self.fields if entry.vocab_update_strategy == "dynamic"
                ),
            }
        if stage in ("pretrain", "finetune"):
            self.check_trainable()
        sections = ["seed", "fields", "label_columns", "data_module", "task"]
        if stage != "interpret":
            sections += ["evaluation"] if stage in ("evaluate", "predict") else ["model", "trainer"]
        view = {name: plain[name] for name in sections} | {"prepend_tokens": self.tokenizer.prepend_tokens}
        for section, names in EXECUTION_ONLY.items():
            if section in view:
                view[section] = {name: value for name, value in view[section].items() if name not in names}
        view["data_module"] = batching_view(self.data_module, view["data_module"])
        view["task"].pop("cells", None)  # the file enters as an input, by content
        if "evaluation" in view:  # files enter as inputs, by content
            view["evaluation"].pop("label_mapping")
            view["evaluation"] = _without_file(view["evaluation"])
        view["label_columns"] = [_without_file(label) for label in view["label_columns"]]
        for entry in view["fields"]:
            if entry["pretrained_embedding"]:  # the file enters as an input, by content
                entry["pretrained_embedding"].pop("filename")
        if stage == "finetune" or (stage == "pretrain" and self.model.checkpoint is not None):
            view["sizes_from_checkpoint"] = self.sizes_from_checkpoint
        return view


def _without_file(label: dict[str, Any]) -> dict[str, Any]:
    """A label column without the path of its ontology: the file enters as an input of preprocessing, by content."""
    ontology = label["label_ontology"]
    if ontology is None:
        return label
    return {**label, "label_ontology": {name: value for name, value in ontology.items() if name != "file"}}


def _refuse_keys_of_other_tasks(values: dict[str, Any], kind: str) -> None:
    """A task written over one of another kind keeps the other's keys: say so, rather than that they are unknown."""
    own = TASKS[kind]
    for name in values:
        others = [other for other, model in TASKS.items() if name in model.model_fields]
        if others and name not in (*own.model_fields, *own.absent):
            raise ValueError(
                f"a {kind} task has no key '{name}', a {others[0]} task has; when the section of another config is replaced, say "
                f"`- override /task: {kind}` in the defaults list"
            )


def guess_task(values: dict[str, Any]) -> str:
    """The kind of a task whose section does not say it, by keys that only one kind has."""
    if {"ci_method", "num_bootstrap_runs"} & set(values):
        return "test"
    if {"output_predictions", "output_embeddings"} & set(values):
        return "predict"
    if {"attribute_kwargs", "attribute_filter"} & set(values):
        return "interpret"
    return "train"
