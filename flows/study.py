"""A study inside the pipeline flow: what its points share as subflows, then every point as a task, some of them at the same time."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed, Failed
from prefect.task_runners import ThreadPoolTaskRunner

from bmfm_pipeline.errors import Preempted
from bmfm_pipeline.stages.study_plan import Point, StudyPlan, plan_study
from bmfm_pipeline.stages.study_running import StudyOutcome, run_study
from bmfm_pipeline.storage import load_artefact, read_json
from flows import local
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
    results: dict[str, dict[str, Any]] = {}

    def begin(job: Any, point: Point | None) -> dict[str, Any]:
        if job.stage == "study" or (point is not None and not parameters.pools):
            context = {**job.context, "mlflow_parent_run_id": mlflow_run, "study_point": point.name if point else ""}
            results[job.key] = run_job(replace(job, context=context))
        else:
            whose = point or next(other for other in plan.points if any(own.key == job.key for own in other.jobs))
            form = parameters.model_copy(update={"overrides": [*parameters.overrides, *whose.overrides]})
            before = {own.title: results[own.key] for own in whose.jobs if own.key in results}
            results[job.key] = start(job, form, before, mlflow_run)
        return results[job.key]

    def each(attempt: Callable[[Point], BaseException | None], points: list[Point]) -> list[BaseException | None]:
        return _as_tasks(attempt, points, parameters.parallel or 1)

    outcome = run_study(plan, start=begin, each=each)
    show_table("study-points", _rows(outcome), f"Points of the study on {plan.name}")
    return outcome


def _as_tasks(attempt: Callable[[Point], BaseException | None], points: list[Point], parallel: int) -> list:
    """Apply `attempt` to every point in a task of its own, at most `parallel` at a time; returns what it returned."""
    by_name = {point.name: point for point in points}

    def point(name: str) -> Any:
        error = attempt(by_name[name])
        if error is not None:
            return Failed(message=str(error), data=error)
        return Completed(name="Completed", message=by_name[name].evaluation.uri)

    one = task(point, name="point", task_run_name="{name}", tags=["study"], cache_policy=NO_CACHE, persist_result=False)
    states: list[Any] = []
    if parallel == 1:  # in the thread of the flow, where Ctrl-C and SIGTERM are noticed at once
        for name in by_name:
            states.append(one(name, return_state=True))
            if isinstance(_error_of(states[-1]), Preempted):
                break
    else:
        with ThreadPoolTaskRunner(max_workers=parallel) as runner:
            futures = [runner.submit(one, {"name": name}) for name in by_name]
            try:
                for future in futures:
                    future.wait()
            except BaseException:
                local.stop_all()  # before the runner waits for its threads
                raise
        states = [future.state for future in futures]
    ends = [_error_of(state) for state in states]
    for error in ends:
        if isinstance(error, Preempted):
            raise error
    return ends


def _error_of(state: Any) -> BaseException | None:
    return None if state.is_completed() else state.result(raise_on_failure=False)


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
