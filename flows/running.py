"""How a flow runs stages: plan and check everything first, then one task per step, cached stages shown as Cached."""

import contextlib
import logging
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from prefect import runtime, task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger
from prefect.states import Completed, Failed

from bmfm_pipeline import stages
from bmfm_pipeline.errors import ConfigError, PipelineError, Preempted
from bmfm_pipeline.stages.running import one_at_a_time
from bmfm_pipeline.stages.tracked import history_of, run_links
from bmfm_pipeline.tracking import redact_text
from flows import local
from flows.handing_back import handed_back_when_stopped
from flows.pages import artifact_key, in_mlflow, is_page, label_run, show_figures, show_links, show_table
from flows.parameters import FlowParameters, StageParameters
from flows.progress import ProgressPage

# A stage that the pipeline planned already, handed to its subflow in this process.
planned_job: ContextVar[Any] = ContextVar("planned_job", default=None)
MLFLOW_PARENT_TAG = "mlflow-parent:"
RETRIES, RETRY_SECONDS = 2, 10


def readable_name() -> str:
    """flow_run_name of all flows: what it is about, until the key of its artefact is known."""
    parameters = runtime.flow_run.parameters.get("parameters")
    target = getattr(parameters, "target", None) or _deployed_target() or getattr(parameters, "config_name", None)
    return "-".join(part for part in (runtime.flow_run.flow_name, short(target)) if part)


def short(target: str | None) -> str:
    """The last part of a path, without its ending."""
    return (target or "").rstrip("/").rsplit("/", 1)[-1].removesuffix(".h5ad")


def _deployed_target() -> str | None:
    """The dataset a deployment is named after: overriding one parameter of a run must not lose the others' defaults."""
    from bmfm_pipeline.config import list_entries

    name = runtime.deployment.name
    return name if name in [entry.name for entry in list_entries()] else None


def with_target(parameters: FlowParameters) -> Any:
    """The same form, about the dataset that the deployment is named after when it names none."""
    named = parameters.target or getattr(parameters, "config_name", None)
    target = None if named else _deployed_target()
    return parameters.model_copy(update={"target": target}) if target else parameters


def run_stage_flow(stage: str, parameters: StageParameters) -> Any:
    """The body of a stage's flow: returns the stage's result, or a Cached or Failed state.

    Planning composes and checks the whole configuration, so a wrong parameter fails the run before any data is read, with the
    reason as its message.
    """
    with relayed_logs():
        try:
            jobs = _plan(stage, with_target(parameters))
            last = jobs[-1]
            label_run(f"stage:{stage}", f"dataset:{last.name}", name=f"{stage}-{last.name}-{last.key[:8]}")
            results = [run_job(job) for job in jobs]
            if stage == "finetune":
                offer_challenger(last)
        except PipelineError as error:
            return Failed(message=str(error), data=error)
    if last.cached:
        return Completed(name="Cached", message=f"{last.reason}: {last.uri}", data=results[-1])
    return results[-1]


def offer_challenger(job: Any, test: Any = None) -> None:
    """Register the model of a finished fine-tuning, where promotion.after_finetune says so; `test` is its evaluation, if it has one."""
    if job.config["promotion"]["after_finetune"] == "nothing":
        return
    from bmfm_pipeline.stages.registering import offer_model
    from flows.triggers import triggered_by

    if said := offer_model(job, test, triggered_by()):
        get_run_logger().info("%s", said)


def _plan(stage: str, parameters: StageParameters) -> list[Any]:
    handed = planned_job.get()
    if handed is not None and handed.stage == stage:
        return [handed]
    return stages.plan_stage(
        stage,
        parameters.target,
        config_name=parameters.config_name,
        config_dir=parameters.config_dir,
        overrides=parameters.to_overrides(),
        label=parameters.label,
        workspace=parameters.workspace,
    )


def run_job(job: Any) -> dict[str, Any]:
    """The steps of one planned stage as tasks; a stage whose artefact exists is one task, shown as Cached."""
    log = get_run_logger()
    log.info("%s of %s: %s", job.title, job.name, job.reason)
    local.tell(
        {
            "kind": "stage",
            "stage": job.title,
            "cached": job.cached,
            "key": job.key,
            "uri": job.uri,
            "reason": job.reason,
            "of": job.context.get("study_point", ""),
        }
    )
    if job.cached:
        return _reused(job, job.reason)
    from flows.fanning import spread_files

    # A cluster lasts from the first step that needs it to the last.
    with one_at_a_time(job) as finished, spread_files():
        if finished is None:
            return _run_steps(job)
    return _reused(job, "another run has made it meanwhile")


def _reused(job: Any, reason: str) -> dict[str, Any]:
    named = _reuse.with_options(name=job.stage, task_run_name=f"{job.stage} {job.key[:8]}")
    named(job.uri, reason)
    return stages.run_stage(job)


def _run_steps(job: Any) -> dict[str, Any]:
    job_file = job.write(context=run_context(job.context))
    tables, links, result = [], {}, {}
    for step in stages.STEPS[job.stage]:
        local.tell({"kind": "step", "stage": job.stage, "step_name": step, "of": job.context.get("study_point", "")})
        result = step_task(job.stage, step)(job_file, job.stage, step)
        if result.get("table"):
            tables.append((step, result["table"]))
        _show_new_links(job.stage, result.get("links") or {}, links)
    for step, rows in tables:
        show_table(artifact_key(job.stage, step), rows, f"{job.stage} of {job.name}: {step}")
    if not tables:
        show_table(artifact_key(job.stage, "summary"), _summary_rows(result), f"{job.stage} of {job.name}")
    if not job.context.get("study_point"):  # a study shows its own
        reports = {"Report in MLflow": in_mlflow(links.get("MLflow run"), "report.html")} if "Report" in links else {}
        show_figures(job.stage, result["uri"], f"{job.stage} of {job.name}", {**links, **reports})
    return {**result, "links": links, "cached": False}


def _show_new_links(stage: str, found: dict[str, str], shown: dict[str, str]) -> None:
    """Links as soon as a step knows them, so that a training can be watched in MLflow too; each once."""
    new = {text: address for text, address in found.items() if address and shown.get(text) != address}
    show_links(stage, new)
    shown.update(new)
    if address := new.get("MLflow run"):
        label_run(f"mlflow-run:{address.rsplit('/', 1)[-1]}")


def _summary_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    rows = [{"name": name, "value": value} for name, value in (result.get("summary") or {}).items()]
    return [*rows, {"name": "artefact", "value": result.get("uri", "")}]


def run_context(known: dict[str, str]) -> dict[str, str]:
    """What a stage's MLflow run is tagged with: the Prefect run it belongs to, and its parent run in MLflow."""
    context = dict(known)
    if runtime.flow_run.id:
        context["prefect_flow_run_id"] = str(runtime.flow_run.id)
        context["prefect_flow_run_url"] = runtime.flow_run.ui_url or ""
    for tag in runtime.flow_run.tags or ():
        if tag.startswith(MLFLOW_PARENT_TAG):
            context.setdefault("mlflow_parent_run_id", tag.removeprefix(MLFLOW_PARENT_TAG))
    return context


@task(cache_policy=NO_CACHE)
def _reuse(uri: str, reason: str) -> Any:
    """A stage that need not run: its artefact is valid."""
    return Completed(name="Cached", message=reason, data=uri)


def step_task(stage: str, step: str) -> Any:
    """The task of one step. Only training is tried again, and only after a stop from which it can go on."""
    # No tags: for each task with one, Prefect asks its server for a place under a limit of that name, which takes a third of a second.
    options: dict[str, Any] = {"name": step, "task_run_name": f"{stage}: {step}"}
    if step == "train":
        options |= {"retries": RETRIES, "retry_delay_seconds": RETRY_SECONDS, "retry_condition_fn": _was_preempted}
    return task(_run_step, cache_policy=NO_CACHE, persist_result=False, **options)


def _run_step(job_file: str, stage: str, step: str) -> dict[str, Any]:
    """Carry out one step of the job at `job_file`; only addresses, hashes and numbers come back."""
    job = stages.Job.read(job_file)
    page = ProgressPage(
        artifact_key(stage, step),
        local.tell,
        title=f"{job.title} of {job.name}",
        before=history_of(job),
        links=lambda: _pages_of(job),
    )
    return stages.run_step(job_file, step, on_progress=page)


def _pages_of(job: Any) -> dict[str, str]:
    return {text: address for text, address in run_links(job).items() if is_page(address)}


def _was_preempted(task, task_run, state) -> bool:
    return isinstance(state.data, Preempted) and not local.is_stopping()


class _Relay(logging.Handler):
    """Log records of the library, and of the training child that it relays, in the log of the run."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._flow_log = get_run_logger()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            log = get_run_logger()
        except Exception:  # a thread of the library, outside any run
            log = self._flow_log
        log.log(record.levelno, "%s", redact_text(self.format(record)))


@contextlib.contextmanager
def relayed_logs() -> Iterator[None]:
    """While inside, what `bmfm_pipeline` logs is on the page of the run, which goes back to its pool if its worker is stopped.

    Nested flows do not repeat lines.
    """
    logger = logging.getLogger("bmfm_pipeline")
    if any(isinstance(handler, _Relay) for handler in logger.handlers):
        yield
        return
    relay, level = _Relay(), logger.level
    logger.addHandler(relay)
    logger.setLevel(min(level or logging.INFO, logging.INFO))
    try:
        with handed_back_when_stopped():
            yield
    finally:
        logger.removeHandler(relay)
        logger.setLevel(level)


def required_target(parameters: FlowParameters) -> str:
    if not parameters.target:
        raise ConfigError(
            "pipeline: name a dataset (see `bmfm datasets`), an h5ad file, a folder or a pattern of them as target"
        )
    return parameters.target
