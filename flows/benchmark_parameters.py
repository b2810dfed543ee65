"""The form of the benchmark flow."""

from pydantic import Field, field_validator

from flows.parameters import Controls, Form, Positive, SeedsOf, Text


class BenchmarkParameters(Form):
    """Every dataset of a suite with every model and every seed, and one table."""

    suite: Text = Field(
        None,
        title="Suite",
        description="A name that `bmfm benchmark` lists, or the path of a YAML file that the worker can read. Empty: the suite this "
        "deployment is named after.",
        examples=["demo", "/data/suites/mine.yaml"],
    )
    datasets: Text = Field(
        None, title="Datasets", description="Only these of the suite, with commas. Empty: all.", examples=["zheng68k"]
    )
    models: Text = Field(None, title="Models", description="Only these of the suite, with commas. Empty: all.")
    seeds: Text = Field(
        None,
        title="Seeds",
        description="How many, such as 5, or a list such as [1, 2, 3]. Empty: the suite's.",
        examples=["5"],
    )
    seeds_of: SeedsOf = Field(
        None,
        title="What a seed changes",
        description="finetuning: order, masks and fresh heads, from one pretrained model; training: pretraining too; split: the test cells "
        "as well. Empty: as the suite says.",
    )
    controls: Controls = Field(
        None,
        title="Controls",
        description="Simple models on the same split: auto, default or full, or several words with commas. Empty: as the suite says.",
    )
    parallel: Positive = Field(
        None,
        ge=1,
        title="Cells at the same time",
        description="How many cells are trained at the same time, each in a process of its own. Empty: 1, or on a Dask cluster of this machine "
        "as many as it takes.",
    )
    fan_out: Text = Field(
        None,
        title="Where cells are trained",
        description="here, dask (a Dask cluster of this machine), or the address of a scheduler such as tcp://scheduler:8786. Empty: as "
        "BMFM_DASK of the worker says, else here.",
    )
    overrides: list[str] = Field(
        default_factory=list,
        title="Overrides",
        description="Hydra overrides for all cells, one each, such as task.max_steps=100.",
    )

    @field_validator("overrides", mode="before")
    @classmethod
    def _no_list_is_empty(cls, value: object) -> object:
        return [] if value is None else value

    @field_validator("seeds", mode="before")
    @classmethod
    def _as_text(cls, value: object) -> object:
        return str(value) if isinstance(value, int | list) else value

    def words(self) -> list[str]:
        """What was filled in as plan_benchmark takes it."""
        named = ("datasets", "models", "seeds", "seeds_of", "controls")
        return [f"{name}={getattr(self, name)}" for name in named if getattr(self, name) is not None] + self.overrides
