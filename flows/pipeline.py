"""The pipeline flow: the four stages as subflows under one MLflow run, in this process or each on its own pool."""

from collections.abc import Callable
from typing import Annotated, Any

from prefect import flow, runtime, task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger
from prefect.states import Completed, Failed

from bmfm_pipeline import stages
from bmfm_pipeline.errors import PipelineError, TrainingError
from bmfm_pipeline.stages.pipeline_page import PAGE, pipeline_page
from bmfm_pipeline.stages.planning import stage_overrides, why_skipped
from bmfm_pipeline.stages.study_plan import StudyPlan
from bmfm_pipeline.stages.study_running import IncompleteStudy
from bmfm_pipeline.stages.tracked import flow_run_tags
from bmfm_pipeline.storage import load_artefact, localise, read_json
from bmfm_pipeline.tracking import EXPERIMENT, StageTracker, tracking_uri
from flows import local
from flows.evaluate import evaluate
from flows.finetune import finetune
from flows.pages import in_mlflow, label_run, show_links, show_table
from flows.parameters import (
    EvaluateParameters,
    FinetuneParameters,
    PipelineParameters,
    PreprocessParameters,
    PretrainParameters,
    shown_as,
)
from flows.preprocess import preprocess
from flows.pretrain import pretrain
from flows.running import (
    MLFLOW_PARENT_TAG,
    offer_challenger,
    planned_job,
    readable_name,
    relayed_logs,
    required_target,
    run_job,
    short,
    with_target,
)
from flows.study import plan_of, run_points, study_metrics, study_result

FLOWS = {"preprocess": preprocess, "pretrain": pretrain, "finetune": finetune, "evaluate": evaluate}
FORMS = {
    "preprocess": PreprocessParameters,
    "pretrain": PretrainParameters,
    "finetune": FinetuneParameters,
    "evaluate": EvaluateParameters,
}


@flow(name="pipeline", flow_run_name=readable_name)
def pipeline(
    parameters: Annotated[PipelineParameters, shown_as("The whole chain")] = PipelineParameters(),  # noqa: B008 - defaults of the form
) -> Any:
    """The whole chain on one dataset: preprocess, pretrain, fine-tune, evaluate."""
    with relayed_logs():
        try:
            parameters = with_target(parameters)
            parameters = parameters.model_copy(update={"pools": _uses_pools(parameters)})
            if study := plan_of(parameters, required_target(parameters)):
                return _run_all(parameters, list(study.main.jobs), study)
            jobs = stages.plan_pipeline(
                required_target(parameters),
                label=parameters.label,
                overrides=parameters.to_overrides(),
                workspace=parameters.workspace,
                controls=parameters.controls,
            )
            return _run_all(parameters, jobs)
        except PipelineError as error:
            return Failed(message=str(error), data=error)


def _run_all(parameters: PipelineParameters, jobs: list[Any], study: StudyPlan | None = None) -> dict[str, Any]:
    last = jobs[-1]
    state_dir = last.place.state_dir
    with StageTracker(
        tracking_uri(state_dir),
        EXPERIMENT,
        f"pipeline-{last.name}",
        tags={
            "bmfm.stage": "pipeline",
            "bmfm.dataset": last.name,
            **flow_run_tags(str(runtime.flow_run.id), runtime.flow_run.ui_url or ""),
        },
        state_dir=state_dir,
    ) as tracker:
        label_run(f"dataset:{last.name}", f"mlflow-run:{tracker.run_id}", name=f"pipeline-{last.name}-{last.key[:8]}")
        tracker.log_params(parameters.model_dump(exclude={"overrides"}, exclude_none=True))
        tracker.log_params({"overrides": parameters.overrides})
        results, outcome = {}, None
        start = _start_on_pool if parameters.pools else _run_here
        if study is not None:
            outcome = run_points(study, parameters, start, tracker.run_id)
            results = outcome.main
            tracker.set_tags({"bmfm.artefact.study": outcome.study["uri"]})
            for percent, values in study_metrics(outcome):
                tracker.log_metrics(values, step=percent)
        for job in jobs if study is None else ():
            results[job.title] = start(job, parameters, results, tracker.run_id)
        tracker.set_tags({f"bmfm.artefact.{stage}": result["uri"] for stage, result in results.items()})
        for stage in stages.STAGES:
            if stage not in results:
                _skip.with_options(name=stage, task_run_name=f"{stage}: skipped")(why_skipped(stage, jobs))
        tracker.log_metrics(_headline(results))
        for job in jobs:
            if job.stage == "finetune":
                offer_challenger(job, load_artefact(results["evaluate"]["uri"]))
        page = pipeline_page(last.place, results, outcome.study["uri"] if outcome else None)
        if page:
            tracker.log_artifact(localise(page))
        url = tracker.url
        answer = {
            "stages": results,
            "pipeline_report": page,
            "mlflow_run_id": tracker.run_id,
            "mlflow_url": url,
            "flow_run_id": str(runtime.flow_run.id),
            **({"study": study_result(outcome)} if outcome else {}),
        }
        if outcome is not None and outcome.failed:
            raise IncompleteStudy(outcome, answer)
    show_table("pipeline-stages", [_row(stage, result) for stage, result in results.items()], f"Stages on {last.name}")
    reports = {
        "Page about the run": page or "",
        "Page about the run in MLflow": in_mlflow(url, PAGE) if page else "",
        "Evaluation report": load_artefact(results["evaluate"]["uri"]).file("report.html"),
    }
    show_links("pipeline", {"MLflow run": url or "", **reports})
    return answer


def _stage_form(job: Any, parameters: PipelineParameters, **own: Any) -> Any:
    overrides = stage_overrides(job.stage, parameters.to_overrides())
    if job.stage == "evaluate" and parameters.controls is not None:
        own["controls"] = parameters.controls
    return FORMS[job.stage](
        target=parameters.target, label=parameters.label, overrides=overrides, workspace=parameters.workspace, **own
    )


def _run_here(job: Any, parameters: PipelineParameters, results: dict[str, Any], mlflow_run: str) -> dict[str, Any]:
    """The stage as a subflow of this process, handed the job that is planned already."""
    token = planned_job.set(_under(job, mlflow_run))
    try:
        return FLOWS[job.stage](_stage_form(job, parameters))
    finally:
        planned_job.reset(token)


def _under(job: Any, mlflow_run: str) -> Any:
    from dataclasses import replace

    return replace(job, context={**job.context, "mlflow_parent_run_id": mlflow_run})


def _own_pool() -> str | None:
    """The pool whose worker has started this run; None for a run that none has."""
    from prefect.context import FlowRunContext

    context = FlowRunContext.get()
    return context.flow_run.work_pool_name if context and context.flow_run else None


def _uses_pools(parameters: PipelineParameters) -> bool:
    """As the form says; where it says nothing, when this run is in another pool than the deployments that train."""
    if parameters.pools is not None:
        return parameters.pools
    own = _own_pool()
    if own is None or not runtime.deployment.name:
        return False
    from prefect.exceptions import ObjectNotFound

    try:
        return _pool_of(f"pretrain/{runtime.deployment.name}") != own
    except ObjectNotFound:  # a deployment of somebody's own
        return False


def _pool_of(deployment: str) -> str | None:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        return client.read_deployment_by_name(deployment).work_pool_name


def _runs_in_own_place(deployment: str) -> bool:
    """Whether a stage belongs to the pool of this very run: pipelines that fill a pool would wait for places that they hold themselves."""
    own = _own_pool()
    return own is not None and _pool_of(deployment) == own


def _start_on_pool(
    job: Any, parameters: PipelineParameters, results: dict[str, Any], mlflow_run: str
) -> dict[str, Any]:
    """The stage as a run of its own deployment, wherever that pool's worker is; it plans again from the same overrides.

    The models of earlier stages are named by address, so that the stage's key is the one planned here.
    """
    if job.cached:
        return run_job(job)
    if job.variant:  # no form says what it is: the run that tests the model makes it first
        return {"uri": job.uri, "hash": "", "summary": {}, "links": {}, "table": [], "cached": False}
    from prefect.deployments import run_deployment

    own = {}
    if job.stage == "finetune" and "pretrain" in results:
        own["checkpoint"] = results["pretrain"]["uri"]
    if job.stage == "evaluate":
        own["checkpoint"] = results["finetune" if "finetune" in results else "pretrain"]["uri"]
    form = _stage_form(job, parameters, **own)
    name = f"{job.stage}/{runtime.deployment.name or short(parameters.target)}"
    if _runs_in_own_place(name):
        get_run_logger().info("%s runs here: this run has a place of its pool", name)
        return _run_here(job, parameters, results, mlflow_run)
    get_run_logger().info("starting deployment %s", name)
    run = run_deployment(
        name,
        parameters={"parameters": form.model_dump(mode="json", exclude_none=True)},
        tags=[f"{MLFLOW_PARENT_TAG}{mlflow_run}"],
    )
    if run.state is None or not run.state.is_completed():
        raise TrainingError(
            f"{name} ({run.name}) ended {run.state.name if run.state else 'unknown'}: {run.state.message if run.state else ''}"
        )
    artefact = job.artefact()
    if artefact is None:
        raise TrainingError(
            f"{name} completed, but its artefact {job.uri} is not in this workspace; worker and pipeline need the same "
            "workspace and the same version of the code"
        )
    return {
        "uri": artefact.uri,
        "hash": artefact.hash,
        "summary": artefact.summary,
        "links": {},
        "table": [],
        "cached": False,
    }


@task(cache_policy=NO_CACHE)
def _skip(reason: str) -> Any:
    return Completed(name="Skipped", message=reason)


def _row(stage: str, result: dict[str, Any]) -> dict[str, Any]:
    return {"stage": stage, "state": "Cached" if result.get("cached") else "Completed", "artefact": result["uri"]}


def _headline(results: dict[str, Any]) -> dict[str, float]:
    """The model's metrics, on the parent run too, so that pipelines can be compared in one table."""
    rows = read_json(load_artefact(results["evaluate"]["uri"]).local_file("metrics.json"))
    return {
        f"{row.get('target', 'test')}/{row['metric']}": row["value"]
        for row in rows
        if row.get("model") == "model" and isinstance(row.get("value"), int | float)
    }


def run_pipeline(
    parameters: PipelineParameters, on_progress: Callable[[dict[str, Any]], None] | None = None
) -> dict[str, Any]:
    """Run the pipeline in this process and return {"stages": {stage: result}, "mlflow_run_id", "mlflow_url", "flow_run_id"}.

    `on_progress` receives every event of every stage. Errors of the stages are raised as they are. Call flows.local.prepare
    before importing this module, so that Prefect finds its place.
    """
    with local.listening(on_progress):
        return pipeline(parameters)
