"""The forms of the flows: what a person fills in on a deployment's page, turned into Hydra overrides."""

import json
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema, field_validator, model_validator

from bmfm_pipeline.config.sections import read_controls
from bmfm_pipeline.config.tasks import CiMethod

# Optional values show as plain inputs that may stay empty, not as a choice between a type and null.
Text = Annotated[str | None, WithJsonSchema({"type": "string"})]
Whole = Annotated[int | None, WithJsonSchema({"type": "integer", "minimum": 0})]
Positive = Annotated[int | None, WithJsonSchema({"type": "integer", "minimum": 1})]
Margin = Annotated[float | None, WithJsonSchema({"type": "number", "minimum": 0})]
Ticked = Annotated[bool | None, WithJsonSchema({"type": "boolean"})]
Rate = Annotated[float | None, WithJsonSchema({"type": "number", "exclusiveMinimum": 0})]


IntervalMethod = Annotated[CiMethod | None, WithJsonSchema({"type": "string", "enum": list(get_args(CiMethod))})]
SeedsOf = Annotated[
    Literal["finetuning", "training", "split"] | None,
    WithJsonSchema({"type": "string", "enum": ["finetuning", "training", "split"]}),
]


def _named_controls(value: str | None) -> str | None:
    if value is None:
        return None
    found = read_controls(value)
    return found if isinstance(found, str) else ",".join(found)


Controls = Annotated[str | None, AfterValidator(_named_controls), WithJsonSchema({"type": "string"})]
Baseline = Annotated[Literal["pad", "zero"] | None, WithJsonSchema({"type": "string", "enum": ["pad", "zero"]})]
RARELY_SET = ("overrides", "config_name", "config_dir", "workspace")


def _as_a_page_needs_it(schema: dict[str, Any]) -> None:
    """What is rarely set stands last (pages go by `position`); a page would fill in a default of null and then refuse it."""
    properties = schema["properties"]
    for name in RARELY_SET:
        if name in properties:
            properties[name] = properties.pop(name)
    for position, entry in enumerate(properties.values()):
        entry["position"] = position
        if entry.get("default", 0) is None:
            del entry["default"]


class Form(BaseModel):
    """A form on a page: unknown keys are refused, and what is left empty is not set."""

    model_config = ConfigDict(extra="forbid", json_schema_extra=_as_a_page_needs_it)

    workspace: Text = Field(
        None,
        title="Workspace",
        description="Where artefacts lie: a folder or s3://bucket/prefix. Empty: BMFM_WORKSPACE of the worker, else ./workspace.",
    )

    @field_validator("*", mode="before")
    @classmethod
    def _empty_is_unset(cls, value: Any) -> Any:
        return None if isinstance(value, str) and not value.strip() else value


class FlowParameters(Form):
    """What every flow takes. Empty values leave the packaged configuration as it is."""

    # Knob -> the configuration key that it sets.
    knobs: ClassVar[dict[str, str]] = {"seed": "seed.seed_value"}

    target: Text = Field(
        None,
        title="Dataset",
        description="A dataset of the catalogue (`bmfm datasets`) or the path of an h5ad file, of a folder of them, or a pattern such as "
        "/data/*.h5ad, local or on s3, that the worker can read. "
        "Empty: the dataset this deployment is named after.",
        examples=["zheng68k-mini", "/data/cells.h5ad"],
    )
    label: Text = Field(
        None, title="Label column", description="The obs column to predict, for h5ad files. Empty: the catalogue's."
    )
    seed: Whole = Field(None, title="Seed", description="Same seed, same machine, same numbers. Empty: 1234.")
    overrides: list[str] = Field(
        default_factory=list,
        title="Overrides",
        description="Hydra overrides, one each, such as trainer.learning_rate=0.0001 or data_module.max_length=256.",
    )

    @field_validator("overrides", mode="before")
    @classmethod
    def _no_list_is_empty(cls, value: Any) -> Any:
        return [] if value is None else value

    @field_validator("overrides")
    @classmethod
    def _looks_like_overrides(cls, value: list[str]) -> list[str]:
        for word in value:
            if "=" not in word and not word.startswith("~"):
                raise ValueError(f"'{word}' is not an override; write key=value, +key=value, ++key=value or ~key")
        return value

    @model_validator(mode="after")
    def _said_once(self):
        named = {word.lstrip("+~").split("=", 1)[0] for word in self.overrides}
        for knob, key in self.knobs.items():
            if getattr(self, knob) is not None and key in named:
                raise ValueError(f"{key} is set twice: by '{knob}' and among the overrides; keep one of them")
        return self

    def to_overrides(self) -> list[str]:
        """The knobs that were set, as overrides, then the user's own."""
        knobs = [
            f"{key}={_literal(getattr(self, knob))}"
            for knob, key in self.knobs.items()
            if getattr(self, knob) is not None
        ]
        return [*knobs, *self.overrides]


class StageParameters(FlowParameters):
    """What the flow of one stage takes."""

    config_name: Text = Field(
        None, title="Config name", description="Another top config than the packaged one, without .yaml."
    )
    config_dir: Text = Field(
        None, title="Config folder", description="A folder on the worker, searched before the packaged configs."
    )


class PreprocessParameters(StageParameters):
    """Check, split and transform a dataset."""


class TrainingParameters(StageParameters):
    """What pretraining and fine-tuning have in common."""

    knobs: ClassVar[dict[str, str]] = {
        **StageParameters.knobs,
        "max_epochs": "task.max_epochs",
        "max_steps": "task.max_steps",
        "batch_size": "data_module.batch_size",
        "learning_rate": "trainer.learning_rate",
        "checkpoint": "model.checkpoint",
    }
    max_epochs: Positive = Field(None, title="Epochs", description="Passes over the training cells at most.")
    max_steps: Positive = Field(None, title="Steps", description="Optimiser steps at most.")
    batch_size: Positive = Field(None, title="Batch size", description="Cells in a batch.")
    learning_rate: Rate = Field(None, title="Learning rate", description="Peak learning rate, after warm-up.")


class PretrainParameters(TrainingParameters):
    """Pretrain a model on the training cells of a dataset, which is preprocessed first when it is not yet."""

    checkpoint: Text = Field(
        None,
        title="Start from",
        description="A model folder or artefact, a .ckpt file, org/name of the Hugging Face hub, or 'latest'. Empty: from scratch.",
    )


class FinetuneParameters(TrainingParameters):
    """Fine-tune a model on the labels of a dataset."""

    checkpoint: Text = Field(
        None,
        title="Pretrained model",
        description="A model folder or artefact, a .ckpt file, org/name of the Hugging Face hub, or 'latest' for the newest pretrained "
        "model of this dataset. Empty: from scratch.",
    )


class EvaluateParameters(StageParameters):
    """Test a fine-tuned model: metrics with confidence intervals, beside honest controls."""

    knobs: ClassVar[dict[str, str]] = {
        **StageParameters.knobs,
        "checkpoint": "task.checkpoint",
        "ci_method": "task.ci_method",
        "num_bootstrap_runs": "task.num_bootstrap_runs",
        "controls": "evaluation.controls",
    }
    checkpoint: Text = Field(
        None,
        title="Model",
        description="A fine-tuned model artefact or folder, a .ckpt file, org/name of the hub, 'latest', or 'last'. Empty: the model that the whole chain makes on this dataset "
        "(made now when it does not exist).",
    )
    ci_method: IntervalMethod = Field(
        None,
        title="Interval method",
        description="How the 95 % confidence intervals are made. Empty: as the config says.",
    )
    num_bootstrap_runs: Whole = Field(None, title="Bootstrap runs", description="Resamples for the bootstrap methods.")
    controls: Controls = Field(
        None,
        title="Controls",
        description="Simple models on the same split, printed beside the model: auto, default or full, or several words with commas, such as "
        "full, no_pretrain. Empty: as the config says, which is auto.",
        examples=["full", "full, no_pretrain"],
    )


class ReevaluateParameters(FlowParameters):
    """Test the champion of a dataset on the data as they are now, and a challenger beside it."""

    knobs: ClassVar[dict[str, str]] = {**FlowParameters.knobs, "margin": "promotion.margin"}
    data: Text = Field(
        None,
        title="Other cells",
        description="Test on these instead: an h5ad file, a folder of them, or a dataset, with labels. Empty: the dataset as it is now.",
    )
    margin: Margin = Field(
        None,
        title="Margin",
        description="By how much a challenger must at least be better, such as 0.01 for one point. Empty: as the config says.",
    )


class InterpretParameters(StageParameters):
    """Attribute the predictions of a fine-tuned model to genes, by cell and by class."""

    knobs: ClassVar[dict[str, str]] = {
        "seed": "task.seed",
        "checkpoint": "task.checkpoint",
        "cells": "task.cells",
        "max_cells": "task.max_cells",
        "baseline": "task.baseline",
        "sanity_checks": "task.sanity_checks",
    }
    checkpoint: Text = Field(
        None,
        title="Model",
        description="A fine-tuned model artefact or folder, a .ckpt file, org/name of the hub, or 'latest'. Empty: the model that the whole "
        "chain makes on this dataset (made now when it does not exist).",
    )
    cells: Text = Field(
        None,
        title="Cells",
        description="An h5ad file whose cells are interpreted; labels are not needed. Empty: test cells of the model's data.",
    )
    max_cells: Positive = Field(
        None, title="Cells of each class", description="Test cells of each class at most. Empty: 50."
    )
    baseline: Baseline = Field(
        None,
        title="Baseline",
        description="What a cell is compared with: pad has no genes, zero the same genes without expression. Empty: as the model was trained.",
    )
    sanity_checks: bool = Field(
        False, title="Sanity checks", description="Also compare with attributions of shuffled weights."
    )

    def to_overrides(self) -> list[str]:
        """As of every form; a check that was not asked for needs no words."""
        return [word for word in super().to_overrides() if word != "task.sanity_checks=False"]


class PipelineParameters(FlowParameters):
    """The whole chain: preprocess, pretrain, fine-tune, evaluate."""

    knobs: ClassVar[dict[str, str]] = {
        **FlowParameters.knobs,
        "max_epochs": "task.max_epochs",
        "max_steps": "task.max_steps",
        "batch_size": "data_module.batch_size",
        "ci_method": "task.ci_method",
        "num_bootstrap_runs": "task.num_bootstrap_runs",
    }
    max_epochs: Positive = Field(
        None, title="Epochs", description="Passes over the training cells at most, in both trainings."
    )
    max_steps: Positive = Field(None, title="Steps", description="Optimiser steps at most, in both trainings.")
    batch_size: Positive = Field(None, title="Batch size", description="Cells in a batch.")
    ci_method: IntervalMethod = Field(
        None,
        title="Interval method",
        description="How the 95 % confidence intervals are made. Empty: as the config says.",
    )
    num_bootstrap_runs: Whole = Field(None, title="Bootstrap runs", description="Resamples for the bootstrap methods.")
    controls: Controls = Field(
        None,
        title="Controls",
        description="Simple models on the same split, printed beside the model: auto, default or full, or several words with commas, such as "
        "full, no_pretrain. Empty: as the config says, which is auto.",
        examples=["full", "full, no_pretrain"],
    )
    few_shot: Text = Field(
        None,
        title="Shares of the training cells",
        description="Fine-tune and test once with each share, in percent, such as 10, 25, 50, 100; true is 10, 25, 50, 75, 100. Empty: "
        "all cells, once.",
        examples=["10, 25, 50, 75, 100"],
    )
    seeds: Text = Field(
        None,
        title="Seeds",
        description="Fine-tune and test once with each of so many seeds, such as 5, or with those that are listed, such as [1, 2, 3]. "
        "Empty: the seed above, once.",
        examples=["5"],
    )
    seeds_of: SeedsOf = Field(
        None,
        title="What a seed changes",
        description="finetuning: order, masks and fresh heads, from one pretrained model; training: pretraining too; split: the test cells "
        "as well. Empty: finetuning.",
    )
    parallel: Positive = Field(
        None,
        ge=1,
        title="Points at the same time",
        description="How many shares and seeds are trained at the same time, each in a process of its own. Empty: 1, or on a Dask cluster "
        "of this machine as many as it takes.",
    )
    fan_out: Text = Field(
        None,
        title="Where points are trained",
        description="here, dask (a Dask cluster of this machine), or the address of a scheduler such as tcp://scheduler:8786. Empty: as "
        "BMFM_DASK of the worker says, else here.",
    )
    pools: Ticked = Field(
        None,
        title="One worker per stage",
        description="Start each stage as its own deployment, on the pool it belongs to, instead of all in this process. Left as it is: yes where "
        "this run is in another pool than those, as deployments are made (it only waits, in the pool cpu).",
    )

    @field_validator("few_shot", "seeds", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        """Lists and numbers of a program, and text of a page, are one thing; false is empty."""
        if value is None or value is False or (isinstance(value, str) and value.strip().lower() in ("", "false")):
            return None
        return json.dumps(value) if isinstance(value, bool | int | float | list | tuple) else value

    @model_validator(mode="after")
    def _can_be_read(self):
        from bmfm_pipeline.errors import ConfigError
        from bmfm_pipeline.stages.study_plan import read_percentages, read_seeds

        try:
            read_percentages(self.few_shot)
            read_seeds(self.seeds)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return self


def shown_as(title: str) -> Any:
    """The name of a form in a flow's signature: under its heading Parameters, Prefect's page would call it `parameters` again.

    An empty form is the default, for the same reason for which none of its fields has a default of null.
    """
    return Field(json_schema_extra={"title": title, "default": {}})


def _literal(value: Any) -> str:
    """A value as Hydra reads it back; text is quoted because paths may hold any character."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else str(value)
