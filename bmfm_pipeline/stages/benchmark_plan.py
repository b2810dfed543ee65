"""Cells of a benchmark: the chain once per dataset, model and seed, with everything else the same."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from bmfm_pipeline.config.environment import require_path
from bmfm_pipeline.config.suites import Suite, SuiteDataset, SuiteModel, load_suite, suite_with
from bmfm_pipeline.errors import ConfigError, PipelineError
from bmfm_pipeline.evaluation.benchmark_words import grouped
from bmfm_pipeline.stages.controls_plan import check_controls
from bmfm_pipeline.stages.jobs import Job, make_job
from bmfm_pipeline.stages.planning import compose_stage, plan_pipeline, stage_overrides
from bmfm_pipeline.stages.study_plan import seed_words
from bmfm_pipeline.storage import Workspace


@dataclass(frozen=True)
class Cell:
    """One training and its test: of a dataset with a model and a seed. `overrides` say so; `jobs` are in order."""

    dataset: str
    model: str
    seed: int
    target: str
    label: str | None
    overrides: tuple[str, ...]
    jobs: tuple[Job, ...]

    @property
    def name(self) -> str:
        return cell_name(self.dataset, self.model, self.seed)

    @property
    def evaluation(self) -> Job:
        return self.jobs[-1]


@dataclass(frozen=True)
class BenchmarkPlan:
    """The cells that can be planned, and by name the error of each that cannot."""

    suite: Suite
    place: Workspace
    cells: tuple[Cell, ...]
    unplanned: dict[str, PipelineError] = field(default_factory=dict)
    uses: dict[str, int] = field(default_factory=dict)  # key of a job: cells that need it

    @property
    def jobs(self) -> list[Job]:
        """Every job of every cell, once."""
        return list({job.key: job for cell in self.cells for job in cell.jobs}.values())

    @property
    def wanted(self) -> dict[str, dict[str, str | int]]:
        """Dataset, model and seed of every cell by its name, in the order of the suite."""
        suite = self.suite
        return {
            cell_name(dataset.name, model.name, seed): {"dataset": dataset.name, "model": model.name, "seed": seed}
            for dataset in suite.datasets
            for model in suite.models
            for seed in suite.seeds
        }

    @property
    def names(self) -> list[str]:
        return list(self.wanted)

    def table_job(self, failed: dict[str, BaseException] | None = None) -> Job:
        """The job that puts the tests together: of the cells that did not fail; the others stand in it with their reasons."""
        reasons = {name: str(error) for name, error in {**self.unplanned, **(failed or {})}.items()}
        done = [cell for cell in self.cells if cell.name not in reasons]
        suite = self.suite
        view = {
            "suite": suite.name,
            "title": suite.title,
            "seeds_of": suite.seeds_of,
            "metrics": suite.metrics,
            "rank_by": suite.rank_by,
            "notes": suite.notes,
            "datasets": [entry.name for entry in suite.datasets],
            "models": [entry.name for entry in suite.models],
            "cells": [
                {"name": cell.name, "dataset": cell.dataset, "model": cell.model, "seed": cell.seed} for cell in done
            ],
            "failed": [
                {"name": name, **about, "reason": reasons[name]}
                for name, about in self.wanted.items()
                if name in reasons
            ],
        }
        inputs = {cell.name: cell.evaluation.as_input() for cell in done}
        job = make_job(
            "benchmark", suite.name, self.place, {**view, "seed": {"seed_value": suite.seeds[0]}}, view, inputs
        )
        if job.cached or job.reason.startswith("no benchmark"):
            return job
        return replace(job, reason="its tests or settings are not those of an earlier table")


def cell_name(dataset: str, model: str, seed: int) -> str:
    return f"{dataset}, {model}, seed {seed}"


def lines_of(failed: Mapping[str, object]) -> list[str]:
    """'- cell: reason' of failed cells, one line for the seeds that have the same."""
    entries = [{"name": name, "reason": str(reason)} for name, reason in failed.items()]
    return [f"- {entry['name']}: {entry['reason']}" for entry in grouped(entries)]


def plan_benchmark(suite: str | Suite, words: Sequence[str] = (), workspace: str | None = None) -> BenchmarkPlan:
    """Every cell of a suite, a name of one or the path of its YAML file, planned whole.

    `words` are those of the command line: seeds=, seeds_of=, controls=, datasets=, models=, and overrides for all cells. A cell that
    cannot be planned, for its data is missing, say, is kept with its error; ConfigError where that holds for all.
    """
    if not isinstance(suite, Suite):
        suite = load_suite(suite)
    suite = suite_with(suite, words)
    if suite.control_words is not None:
        check_controls(suite.control_words)
    place = Workspace(workspace)
    cells: list[Cell] = []
    unplanned: dict[str, PipelineError] = {}
    for dataset in suite.datasets:
        for model in suite.models:
            try:
                cells += _cells_of(suite, dataset, model, place)
            except PipelineError as error:
                unplanned |= {cell_name(dataset.name, model.name, seed): error for seed in suite.seeds}
    if not cells:
        reasons = "\n".join(lines_of(unplanned))
        raise ConfigError(f"suite {suite.name}: no dataset of it can be run here:\n{reasons}")
    keys = [job.key for cell in cells for job in {job.key: job for job in cell.jobs}.values()]
    return BenchmarkPlan(suite, place, tuple(cells), unplanned, {key: keys.count(key) for key in set(keys)})


def _cells_of(suite: Suite, dataset: SuiteDataset, model: SuiteModel, place: Workspace) -> list[Cell]:
    target = require_path(dataset.dataset, f"dataset {dataset.name} of suite {suite.name}")
    common = [*suite.overrides, *dataset.overrides, *model.overrides]
    run = compose_stage("finetune", target, overrides=stage_overrides("finetune", common), label=dataset.label)
    state = run.data_module.transform_kwargs.random_state
    state = run.seed.seed_value if state is None else state
    found = []
    for seed in suite.seeds:
        for what in dict.fromkeys((suite.seeds_of, "training")):
            overrides = [*common, *seed_words(seed, what, state)]
            jobs = plan_pipeline(
                target, label=dataset.label, overrides=overrides, workspace=place.uri, controls=suite.control_words
            )
            if what != "finetuning" or any(job.stage == "finetune" for job in jobs):
                break  # without labels there is pretraining alone for a seed to change
        found.append(Cell(dataset.name, model.name, seed, target, dataset.label, tuple(overrides), tuple(jobs)))
    return found
