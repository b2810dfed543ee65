"""Tasks: train, test, predict, interpret; what they run on and for how long."""

from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from bmfm_pipeline.config.strict import Absent, Section

CiMethod = Literal["bootstrap_quantiles", "bootstrap_t_interval", "binomial", "wilson", "bca"]


class TaskConfig(Section):
    """What all tasks share: where and how to execute. The names are those of the Lightning Trainer."""

    default_root_dir: str | None = None
    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"] = "auto"
    strategy: str = "auto"
    devices: int | str | list[int] = "auto"
    num_nodes: int = 1
    precision: str | int = "auto"
    tf32_mode: Literal["highest", "high", "medium"] | None = None
    require_accelerator: bool = False
    enable_progress_bar: bool = True
    enable_model_summary: bool = False
    log_every_n_steps: int = Field(10, gt=0)
    deterministic: bool = False
    inference_mode: bool = True
    checkpoint: str | None = None

    @field_validator("precision")
    @classmethod
    def _precision(cls, value: str | int) -> str:
        known = ("auto", "16-mixed", "bf16-mixed", "32-true", "16-true", "bf16-true", "64-true")
        text = {"16": "16-mixed", "bf16": "bf16-mixed", "32": "32-true", "64": "64-true"}.get(str(value), str(value))
        if text not in known:
            raise ValueError(f"must be one of {', '.join(known)}")
        return text


class TrainingTaskConfig(TaskConfig):
    """Train: pretraining or fine-tuning.

    `compile`: compile the layers of the encoder with torch.compile, true or the name of a mode; last digits of the numbers change.
    """

    absent: ClassVar[dict[str, Absent]] = {
        "resume_training_from_ckpt": Absent(
            (None, False),
            "remove it: a stopped training resumes by itself; name weights to start from in model.checkpoint",
        ),
        "enable_checkpointing": Absent((None, True), "remove it: checkpoints are always kept"),
        "reload_dataloaders_every_n_epochs": Absent((None, 0, 1)),  # a batch schedule needs no such help
        "benchmark": Absent((None, False)),
        "profiler": Absent(),
        "callbacks": Absent((None, []), "schedules of batch size and length are data_module.batch_schedule"),
        "limit_test_batches": Absent((None, 1.0)),
        "limit_predict_batches": Absent((None, 1.0)),
        "use_distributed_sampler": Absent((None, True)),
        "barebones": Absent((None, False)),
    }

    max_epochs: int | None = Field(20, gt=0)
    min_epochs: int | None = None
    max_steps: int = -1
    min_steps: int | None = None
    max_time: str | dict[str, int] | None = None
    val_check_interval: float | int | None = None
    check_val_every_n_epoch: int | None = 1
    num_sanity_val_steps: int = 0
    accumulate_grad_batches: int = Field(1, gt=0)
    auto_batch_size: Literal["max"] | bool = False
    memory_limit: float | None = Field(None, gt=0)  # GB
    gradient_clip_val: float | None = None
    gradient_clip_algorithm: Literal["norm", "value"] | None = None
    limit_train_batches: float | int | None = None
    limit_val_batches: float | int | None = None
    overfit_batches: float | int = 0
    fast_dev_run: bool | int = False
    freeze_layers: bool | str = False
    checkpoints_every_n_train_steps: int | None = None
    early_stopping_patience: int | None = Field(None, gt=0)
    detect_anomaly: bool = False
    compile: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] | bool = False
    sync_batchnorm: bool = False


class TestTaskConfig(TaskConfig):
    """Test a trained model: metrics with intervals."""

    __test__ = False
    absent: ClassVar[dict[str, Absent]] = {
        "limit_test_batches": Absent(
            (None, 1.0), "set data_module.limit_dataset_samples.test where the model is trained"
        )
    }

    ci_method: CiMethod = "bootstrap_quantiles"
    num_bootstrap_runs: int = Field(0, ge=0)


class PredictTaskConfig(TaskConfig):
    """Predict labels and embeddings for cells."""

    absent: ClassVar[dict[str, Absent]] = {"limit_predict_batches": Absent((None, 1.0))}

    output_predictions: bool = True
    output_embeddings: bool = True


class AttributeSettings(Section):
    """How gradients are integrated, in the words of captum.

    `n_steps`: points between baseline and cell; null takes as many as each cell needs, 16 to 256. `method`: the rule of integration.
    `internal_batch_size`: cells times points that are computed at once, which bounds memory.
    """

    absent: ClassVar[dict[str, Absent]] = {
        "baselines": Absent((None,), "set task.baseline"),
        "target": Absent((None,), "set task.attribute_filter"),
        "additional_forward_args": Absent(),
        "return_convergence_delta": Absent((None, False, True)),  # always in cells.csv
    }

    n_steps: int | None = Field(None, ge=1)
    method: Literal["gausslegendre", "riemann_left", "riemann_right", "riemann_middle", "riemann_trapezoid"] = (
        "gausslegendre"
    )
    internal_batch_size: int = Field(32, ge=1)


class InterpretTaskConfig(TaskConfig):
    """Attribute predictions to genes, by integrated gradients of the scores of label columns.

    `attribute_filter`: the classes of label columns that are attributed; a column that is not named has all, or, of more than 12 classes,
    those of each cell: the predicted and the true one. `baseline`: what a cell is compared with; `pad` has no genes, `zero` the same
    genes without expression, `auto` is zero where the model was shown genes that are not expressed, else pad. `max_cells`: test cells
    of each class. `cells`: an h5ad file to take cells from instead, labels not needed; `layer`: the one of its layers that holds
    counts, or raw. `seed`: of the choice of cells, resamples and permutations; null is the seed of the run. `level`, `resamples`:
    intervals over cells; `permutations`: of scores among genes. `sanity_checks`: also compare with shuffled weights.
    """

    absent: ClassVar[dict[str, Absent]] = {
        "max_epochs": Absent((None, 1)),
        "limit_predict_batches": Absent((None, 1.0), "set task.max_cells"),
    }

    attribute_kwargs: AttributeSettings = Field(default_factory=AttributeSettings)
    attribute_filter: dict[str, list[str]] | None = None
    baseline: Literal["auto", "pad", "zero"] = "auto"
    max_cells: int = Field(50, ge=1)
    cells: str | None = None
    layer: str | None = None
    seed: int | None = None
    level: float = Field(0.95, gt=0, lt=1)
    resamples: int = Field(1000, ge=1)
    permutations: int = Field(200, ge=1)
    sanity_checks: bool = False
    precision: str | int = "32-true"
    inference_mode: bool = False

    @field_validator("attribute_kwargs", mode="before")
    @classmethod
    def _null_is_default(cls, value: Any) -> Any:
        return {} if value is None else value

    @field_validator("precision")
    @classmethod
    def _exact(cls, value: str) -> str:
        """Half precision would make the attributions of a cell miss its score."""
        if value not in ("auto", "32-true"):
            raise ValueError("attributions are computed in 32-true; remove it")
        return "32-true"

    @field_validator("inference_mode")
    @classmethod
    def _with_gradients(cls, value: bool) -> bool:
        if value:
            raise ValueError("attributions need gradients; set inference_mode=false")
        return value
