"""The benchmark flow: every dataset of a suite with every model and every seed, and one table that grows as they end."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Annotated, Any

from prefect import flow, runtime
from prefect.states import Failed

from bmfm_pipeline.errors import ConfigError, PipelineError
from bmfm_pipeline.stages.benchmark_plan import BenchmarkPlan, plan_benchmark
from bmfm_pipeline.stages.benchmark_running import BenchmarkOutcome, IncompleteBenchmark, run_benchmark
from bmfm_pipeline.stages.fanning import Ended, Work
from bmfm_pipeline.stages.tracked import flow_run_tags
from bmfm_pipeline.storage import load_artefact, read_json
from bmfm_pipeline.tracking import EXPERIMENT, StageTracker, tracking_uri
from flows import local
from flows.benchmark_parameters import BenchmarkParameters
from flows.fanning import Fan, context_of_place, place_of_work
from flows.live_table import LiveTable
from flows.pages import label_run, show_links
from flows.parameters import shown_as
from flows.running import relayed_logs, run_job

WAITING, DONE = "waiting", "done"


def _run_name() -> str:
    parameters = runtime.flow_run.parameters.get("parameters")
    suite = getattr(parameters, "suite", None) or runtime.deployment.name or ""
    return f"benchmark-{suite.rsplit('/', 1)[-1].removesuffix('.yaml')}".rstrip("-")


@flow(name="benchmark", flow_run_name=_run_name)
def benchmark(
    parameters: Annotated[BenchmarkParameters, shown_as("Benchmark")] = BenchmarkParameters(),  # noqa: B008 - defaults of the form
) -> Any:
    """Every dataset of a suite with every model and every seed, and one table with intervals and controls."""
    with relayed_logs():
        try:
            suite = parameters.suite or runtime.deployment.name
            if not suite:
                raise ConfigError("benchmark: name a suite (`bmfm benchmark` lists them) or the YAML file of one")
            plan = plan_benchmark(suite, parameters.words(), parameters.workspace)
            return _run(plan, parameters)
        except PipelineError as error:
            return Failed(message=str(error), data=error)


def _run(plan: BenchmarkPlan, parameters: BenchmarkParameters) -> dict[str, Any]:
    name, state_dir = plan.suite.name, plan.place.state_dir
    with StageTracker(
        tracking_uri(state_dir),
        EXPERIMENT,
        f"benchmark-{name}",
        tags={
            "bmfm.stage": "benchmark",
            "bmfm.suite": name,
            **flow_run_tags(str(runtime.flow_run.id), runtime.flow_run.ui_url or ""),
        },
        state_dir=state_dir,
    ) as tracker:
        label_run(f"suite:{name}", f"mlflow-run:{tracker.run_id}")
        tracker.log_params({"suite": name, "cells": len(plan.names), "overrides": parameters.words()})
        outcome = _carry_out(plan, parameters, tracker.run_id)
        tracker.set_tags({"bmfm.artefact.benchmark": outcome.table["uri"]})
        url = tracker.url
        answer = {
            **outcome.answer(),
            "mlflow_run_id": tracker.run_id,
            "mlflow_url": url,
            "flow_run_id": str(runtime.flow_run.id),
        }
        page = load_artefact(answer["uri"]).file("benchmark.html")
        show_links("benchmark", {"MLflow run": url or "", "Page": page})
        if outcome.failed:
            raise IncompleteBenchmark(answer)
    return answer


def _carry_out(plan: BenchmarkPlan, parameters: BenchmarkParameters, mlflow_run: str) -> BenchmarkOutcome:
    board = _Board(plan)
    begin = partial(begin_cell, mlflow_run)
    with Fan(place_of_work(parameters.fan_out), parameters.parallel, ("benchmark",)) as fan:

        def each(attempt: Callable[[Work], Ended], works: list[Work]) -> list[Ended]:
            return fan.map(attempt, works, [work.name for work in works], "cell", board.ended)

        outcome = run_benchmark(plan, start=begin, each=each)
    board.finish(outcome)
    return outcome


def begin_cell(mlflow_run: str, job: Any, cell: Any) -> dict[str, Any]:
    """A job as steps of the task of its cell."""
    named = {"study_point": cell.name} if cell is not None else {}
    context = {**job.context, "mlflow_parent_run_id": mlflow_run, **context_of_place(), **named}
    return run_job(replace(job, context=context))


class _Board:
    """The table on the page of the run: a row for each cell, filled in when its test is done."""

    def __init__(self, plan: BenchmarkPlan):
        self.plan = plan
        self.cells = {cell.name: cell for cell in plan.cells}
        self.rows = {name: {"cell": name, "state": WAITING, "result": "", "evaluation": ""} for name in plan.names}
        for name, error in plan.unplanned.items():
            self.rows[name] |= {"state": "cannot run", "result": str(error)}
        self.table = LiveTable("benchmark-cells", f"Cells of the benchmark {plan.suite.name}")
        self.table.show(list(self.rows.values()))

    def ended(self, name: str, found: Any) -> None:
        """A piece of work has ended; what several cells share has no row."""
        if name not in self.rows:
            return
        error = found if isinstance(found, BaseException) else found.error
        if error is None:
            evaluation = self.cells[name].evaluation
            self.rows[name] |= {"state": DONE, "result": _headline(evaluation.uri), "evaluation": evaluation.uri}
        else:
            self.rows[name] |= {"state": "failed", "result": str(error)}
        self.table.show(list(self.rows.values()))

    def finish(self, outcome: BenchmarkOutcome) -> None:
        for name, error in outcome.failed.items():
            if self.rows[name]["state"] == WAITING:
                self.rows[name] |= {"state": "failed", "result": str(error)}
        self.table.show(list(self.rows.values()))


def _headline(uri: str) -> str:
    """The first metrics of the model, each with its interval."""
    from bmfm_pipeline.evaluation.pages.numbers import with_interval

    rows = [row for row in read_json(load_artefact(uri).local_file("metrics.json")) if row["model"] == "model"]
    return ", ".join(f"{row['metric']} {with_interval(row)}" for row in rows[:2])


def run_benchmark_here(
    parameters: BenchmarkParameters, on_progress: Callable[[dict[str, Any]], None] | None = None
) -> dict[str, Any]:
    """The benchmark in this process; `on_progress` receives every event of every stage. Errors are raised as they are."""
    with local.listening(on_progress):
        return benchmark(parameters)
