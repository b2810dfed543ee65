"""A study inside the pipeline flow: what its points share as subflows, then every point as a task, some of them at the same time."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from bmfm_pipeline.stages.fanning import Ended, Work
from bmfm_pipeline.stages.study_plan import Point, StudyPlan, plan_study
from bmfm_pipeline.stages.study_running import StudyOutcome, run_study
from bmfm_pipeline.storage import load_artefact, read_json
from flows.fanning import HERE, Fan, context_of_place, place_of_work
from flows.pages import show_table
from flows.parameters import PipelineParameters
from flows.running import run_job

# As pipeline.py starts the job of a stage: (job, parameters, results by stage, MLflow run) -> result.
Start = Callable[[Any, PipelineParameters, dict[str, Any], str], dict[str, Any]]


def plan_of(parameters: PipelineParameters, target: str) -> StudyPlan | None:
    """The study that a form asks for; None when it asks for the chain alone."""
    if parameters.few_shot is None and parameters.seeds is None:
        return None
    return plan_study(
        target,
        few_shot=parameters.few_shot,
        seeds=parameters.seeds,
        seeds_of=parameters.seeds_of,
        label=parameters.label,
        overrides=parameters.to_overrides(),
        workspace=parameters.workspace,
        controls=parameters.controls,
    )


def run_points(plan: StudyPlan, parameters: PipelineParameters, start: Start, mlflow_run: str) -> StudyOutcome:
    """Carry out a study: shared stages through `start`, the stages of a point through `start` on pools and as steps of its task here."""
    with fan_of(parameters) as fan:
        outcome = _run(plan, parameters, start, mlflow_run, fan)
    show_table("study-points", _rows(outcome), f"Points of the study on {plan.name}")
    return outcome


def _run(plan: StudyPlan, parameters: PipelineParameters, start: Start, mlflow_run: str, fan: Fan) -> StudyOutcome:
    begin: Any = partial(begin_here, mlflow_run)
    if fan.where == HERE:
        begin = _Begin(plan, parameters, start, mlflow_run)

    def each(attempt: Callable[[Work], Ended], works: list[Work]) -> list[Ended]:
        if len(works) == 1 and works[0].point is None:
            return [attempt(works[0])]
        return fan.map(attempt, works, [work.name for work in works], "point")

    return run_study(plan, start=begin, each=each)


def fan_of(parameters: PipelineParameters) -> Fan:
    """Where the points of a form are trained."""
    if parameters.pools:  # they are, on the pools' workers: here they are only waited for
        return Fan(HERE, parameters.parallel, ("study",))
    return Fan(place_of_work(parameters.fan_out), parameters.parallel, ("study",))


def begin_here(mlflow_run: str, job: Any, point: Any) -> dict[str, Any]:
    """A job as steps of the task of its point."""
    named = {"study_point": point.name} if point is not None else {}
    context = {**job.context, "mlflow_parent_run_id": mlflow_run, **context_of_place(), **named}
    return run_job(replace(job, context=context))


class _Begin:
    """Jobs of a study where this process starts them."""

    def __init__(self, plan: StudyPlan, parameters: PipelineParameters, start: Start, mlflow_run: str):
        self.plan, self.parameters, self.start, self.mlflow_run = plan, parameters, start, mlflow_run
        self.results: dict[str, dict[str, Any]] = {}

    def __call__(self, job: Any, point: Point | None) -> dict[str, Any]:
        if job.stage == "study" or (point is not None and not self.parameters.pools):
            found = begin_here(self.mlflow_run, job, point)
        else:
            whose = point or next(one for one in self.plan.points if any(own.key == job.key for own in one.jobs))
            form = self.parameters.model_copy(update={"overrides": [*self.parameters.overrides, *whose.overrides]})
            before = {own.title: self.results[own.key] for own in whose.jobs if own.key in self.results}
            found = self.start(job, form, before, self.mlflow_run)
        self.results[job.key] = found
        return found


def _rows(outcome: StudyOutcome) -> list[dict[str, Any]]:
    found = []
    for point in outcome.plan.points:
        error = outcome.failed.get(point.name)
        found.append(
            {
                "point": point.name,
                "state": "Completed" if error is None else "Failed",
                "evaluation": "" if error is not None else point.evaluation.uri,
                "error": "" if error is None else str(error),
            }
        )
    return found


def study_metrics(outcome: StudyOutcome) -> list[tuple[int, dict[str, float]]]:
    """The curve of a study as metrics by percent of the training cells, for the run of the whole pipeline."""
    from bmfm_pipeline.stages.study import curve_metrics

    return curve_metrics(read_json(load_artefact(outcome.study["uri"]).local_file("study.json")))


def study_result(outcome: StudyOutcome) -> dict[str, Any]:
    """What the pipeline returns of a study: its address, its points, and the errors of those that failed."""
    return {
        "uri": outcome.study["uri"],
        "points": {
            point.name: point.evaluation.uri for point in outcome.plan.points if point.name not in outcome.failed
        },
        "failed": {name: str(error) for name, error in outcome.failed.items()},
    }
