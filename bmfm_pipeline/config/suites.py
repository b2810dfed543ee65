"""Benchmark suites: one YAML file each, in `bmfm_pipeline/suites`, in the folders that BMFM_SUITES names, or anywhere."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from bmfm_pipeline.config.strict import Section, readable
from bmfm_pipeline.config.yaml_files import named_yaml, not_yaml
from bmfm_pipeline.errors import ConfigError, did_you_mean
from bmfm_pipeline.storage import check_allowed

FOLDER = Path(__file__).resolve().parents[1] / "suites"


class SuiteDataset(Section):
    """A dataset of a suite: a name of the catalogue, or a file (a relative path counts from the folder of the suite's file; variables as
    ${oc.env:NAME}). `name` is what the table calls it, `label` the obs column of a file, `overrides` what holds for this dataset alone."""

    dataset: str
    name: str = ""
    label: str | None = None
    overrides: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _has_a_name(self) -> "SuiteDataset":
        if not self.name:
            self.name = self.dataset.rstrip("/").rsplit("/", 1)[-1].removesuffix(".h5ad")
        return self


class SuiteModel(Section):
    """A model of a suite: what the table calls it, and the overrides that make it."""

    name: str
    overrides: list[str] = Field(default_factory=list)


class Suite(Section):
    """Every dataset with every model and every seed, each as the ordinary stages.

    `seeds` are the seeds themselves; `seeds_of` what they change, as in a study. `overrides` hold for all. `metrics` are the columns of
    the table (default: by the kind of the label), `rank_by` the metric by which methods are ranked.
    """

    name: str
    title: str = ""
    datasets: list[SuiteDataset] = Field(min_length=1)
    models: list[SuiteModel] = Field(default_factory=lambda: [SuiteModel(name="model")], min_length=1)
    seeds: list[int] = Field(default_factory=lambda: [1234], min_length=1)
    seeds_of: Literal["finetuning", "training", "split"] = "finetuning"
    controls: str | list[str] | None = None
    overrides: list[str] = Field(default_factory=list)
    metrics: list[str] = Field(default_factory=list)
    rank_by: str | None = None
    notes: str = ""
    deployed: bool = False  # whether deployments/prefect.yaml has benchmark/NAME

    @field_validator("datasets", mode="before")
    @classmethod
    def _names_alone(cls, value: Any) -> Any:
        return [{"dataset": entry} if isinstance(entry, str) else entry for entry in value] if isinstance(value, list) else value  # fmt: skip

    @field_validator("seeds")
    @classmethod
    def _each_once(cls, value: list[int]) -> list[int]:
        if len(set(value)) < len(value) or min(value) < 0:
            raise ValueError(f"name each seed once, as whole numbers from 0 (found {value})")
        return value

    @model_validator(mode="after")
    def _one_name_each(self) -> "Suite":
        for what, names in (
            ("datasets", [entry.name for entry in self.datasets]),
            ("models", [entry.name for entry in self.models]),
        ):
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice:
                raise ValueError(f"two {what} are called '{twice}'; give them a `name` each")
        return self

    @property
    def control_words(self) -> str | None:
        return ",".join(self.controls) if isinstance(self.controls, list) else self.controls


def list_suites() -> list[Suite]:
    """All suites that have a name: the packaged ones, then those of BMFM_SUITES."""
    return [_read(path) for path in _files().values()]


def load_suite(name: str | os.PathLike) -> Suite:
    """The suite called `name`, or that of a YAML file; ConfigError with a suggestion when there is none."""
    text = str(name)
    files = _files()
    if text in files:
        return _read(files[text])
    if text.endswith((".yaml", ".yml")) or "/" in text:
        path = Path(text).expanduser()
        check_allowed(path, "the file of a suite")
        if not path.is_file():
            raise ConfigError(f"{text}: no such file; suites known by name: {', '.join(files)}")
        return _read(path, own=True)
    raise ConfigError(
        f"suite '{text}' is neither known ({', '.join(files)}) nor a YAML file{did_you_mean(text, files, before='; ')}"
    )


def _files() -> dict[str, Path]:
    return named_yaml(FOLDER, "BMFM_SUITES", "suite")


def _read(path: Path, own: bool = False) -> Suite:
    try:
        suite = Suite.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        raise readable(error, str(path)) from None
    except yaml.YAMLError as error:
        raise not_yaml(error, path) from None
    if suite.name != path.stem and not own:
        raise ConfigError(
            f"{path}: name is '{suite.name}', but the file is called {path.name}; give both the same name"
        )
    for entry in suite.datasets:
        is_file = entry.dataset.endswith(".h5ad") or "/" in entry.dataset
        if is_file and not entry.dataset.startswith(("/", "~", "$")) and "://" not in entry.dataset:
            entry.dataset = str(path.absolute().parent / entry.dataset)
    return suite


def suite_with(suite: Suite, words: Sequence[str]) -> Suite:
    """The suite with seeds=..., seeds_of=..., controls=..., datasets=..., models=... of a command line, and the other words as overrides
    of every cell, after the suite's own. datasets= and models= keep those that are named."""
    changed: dict[str, Any] = {}
    overrides = []
    for word in words:
        key, _, value = word.partition("=")
        if key not in ("seeds", "seeds_of", "controls", "datasets", "models"):
            overrides.append(word)
            continue
        names = [part.strip() for part in value.strip("[]").split(",") if part.strip()]
        if key in ("datasets", "models"):
            changed[key] = [_named(suite, key, name).model_dump() for name in names]
        elif key == "seeds":
            changed[key] = _seeds(value, names, suite.seeds)
        else:
            changed[key] = value
    try:
        found = Suite.model_validate({**suite.model_dump(), **changed})
    except ValidationError as error:
        raise readable(error, f"suite {suite.name}") from None
    for model in found.models:
        model.overrides = [*model.overrides, *overrides]
    return found


def _named(suite: Suite, key: str, name: str) -> SuiteDataset | SuiteModel:
    entries = getattr(suite, key)
    found = next((entry for entry in entries if entry.name == name), None)
    if found is None:
        names = [entry.name for entry in entries]
        raise ConfigError(
            f"{key}={name}: suite {suite.name} has {', '.join(names)}{did_you_mean(name, names, before='; ')}"
        )
    return found


def _seeds(value: str, names: list[str], own: list[int]) -> list[int]:
    """So many seeds, from the suite's first on, or those that are listed in brackets or with commas."""
    if not names or not all(name.isdecimal() for name in names):
        raise ConfigError(f"seeds={value}: write how many, such as 5, or a list such as [1,2,3]")
    if len(names) > 1 or "[" in value:
        return [int(name) for name in names]
    return [own[0] + number for number in range(int(names[0]))]
