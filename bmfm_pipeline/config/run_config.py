"""RunConfig: one resolved and checked configuration, and the part of it that names an artefact."""

from typing import Any, Literal

from pydantic import Field, SerializeAsAny, field_validator, model_validator

from bmfm_pipeline.config.checks import check_run, derive_decode_modes, resolve_losses
from bmfm_pipeline.config.data_module import DataModuleConfig
from bmfm_pipeline.config.sections import (
    EvaluationConfig,
    FieldInfo,
    LabelColumnInfo,
    ModelConfig,
    SeedConfig,
    TokenizerConfig,
    TrainerConfig,
)
from bmfm_pipeline.config.strict import Section
from bmfm_pipeline.config.tasks import (
    InterpretTaskConfig,
    PredictTaskConfig,
    TaskConfig,
    TestTaskConfig,
    TrainingTaskConfig,
)

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
        "processed_name",
        "num_workers",
        "dataset_kwargs",
        "transform_kwargs",
        "transform_datasets",
    ),
    "model": ("checkpoint", "use_cache"),
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
        "profiler",
        "checkpoint",
        "resume_training_from_ckpt",
    ),
}


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
    model: ModelConfig = Field(default_factory=ModelConfig)
    trainer: TrainerConfig = Field(default_factory=TrainerConfig)
    task: SerializeAsAny[TaskConfig] = Field(default_factory=TrainingTaskConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    track_clearml: dict[str, Any] | None = None
    preset: Literal["auto", "none", "laptop"] = "none"
    preset_used: str | None = None
    sizes_from_checkpoint: bool = False
    notes: list[str] = Field(default_factory=list)

    @field_validator("fields", mode="before")
    @classmethod
    def _fields_or_standard(cls, value: Any) -> Any:
        return standard_fields() if value is None else value

    @field_validator("task", mode="before")
    @classmethod
    def _task_kind(cls, value: Any) -> Any:
        if isinstance(value, TaskConfig):
            return value
        if isinstance(value, list):
            raise ValueError("a list of tasks is run one task at a time; give one task here")
        values = dict(value or {})
        kind = values.pop("kind", None) or _guess_task(values)
        if kind not in TASKS:
            raise ValueError(f"kind must be one of {', '.join(TASKS)}, found {kind!r}")
        return TASKS[kind].model_validate(values)

    @model_validator(mode="after")
    def _check(self) -> "RunConfig":
        if self.model.pad_token_id != PAD_TOKEN_ID:
            self.note(f"model.pad_token_id {self.model.pad_token_id}: follows the tokenizer, {PAD_TOKEN_ID}")
            self.model.pad_token_id = PAD_TOKEN_ID
        check_run(self)
        if self.is_training:
            losses = resolve_losses(self)
            self.trainer.losses = losses
            derive_decode_modes(self, losses)
        return self

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
        return self.data_module.masks and self.data_module.collation_strategy in ("language_modeling", "multitask")

    @property
    def predicts_labels(self) -> bool:
        return self.data_module.collation_strategy in ("sequence_classification", "multitask")

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
        """The part of this config that enters the key of a `stage` artefact; files and artefacts enter as inputs, by content."""
        plain = self.model_dump(mode="json")
        settings = self.data_module.transform_kwargs
        if stage == "preprocess":
            seed = self.seed.seed_value if settings.random_state is None else settings.random_state
            transform = plain["data_module"]["transform_kwargs"]
            for name in ("source_h5ad_file_name", "processed_data_source", "random_state"):
                transform.pop(name)
            labels = (
                "label_column_name",
                "is_stratification_label",
                "is_regression_label",
                "is_multilabel",
                "multilabel_str_sep",
            )
            return {
                "transform": transform,
                "seed": seed,
                "transform_datasets": self.data_module.transform_datasets,
                "filter_query": self.data_module.dataset_kwargs.filter_query,
                "labels": [
                    {name: label[name] for name in (*labels, "silent_label_values", "label_ontology")}
                    for label in plain["label_columns"]
                ],
                "tokenizer": "data" if self.tokenizer.identifier == "data" else "folder",
                "prepend_tokens": self.tokenizer.prepend_tokens,
            }
        sections = ["seed", "fields", "label_columns", "data_module", "task"]
        sections += ["evaluation"] if stage in ("evaluate", "predict") else ["model", "trainer"]
        view = {name: plain[name] for name in sections}
        for section, names in EXECUTION_ONLY.items():
            if section in view:
                view[section] = {name: value for name, value in view[section].items() if name not in names}
        return view


def _guess_task(values: dict[str, Any]) -> str:
    if {"ci_method", "num_bootstrap_runs"} & set(values):
        return "test"
    if {"output_predictions", "output_embeddings"} & set(values):
        return "predict"
    if {"attribute_kwargs", "attribute_filter"} & set(values):
        return "interpret"
    return "train"
