"""Each stage's run in MLflow: opened by its first step, fed while it works, closed by its last or by an error."""

from pathlib import Path
from typing import Any

from bmfm_pipeline.stages.jobs import Job
from bmfm_pipeline.storage import Artefact, read_json, write_json_atomic
from bmfm_pipeline.tracking import EXPERIMENT, StageTracker, tracking_uri

# What MLflow shows as the description of a run, as markdown.
NOTE = "mlflow.note.content"
# Trackers of this process by job key: steps of one process share a connection and a buffer.
_open: dict[str, StageTracker] = {}


def _tracker(job: Job) -> StageTracker | None:
    """The tracker of a job that was started, continued by its run id in another process."""
    if job.key in _open:
        return _open[job.key]
    file = job.run_dir / "mlflow.json"
    if not file.exists():
        return None
    state_dir = job.place.state_dir
    tracker = StageTracker(
        tracking_uri(state_dir), EXPERIMENT, job.stage, run_id=read_json(file)["run_id"], state_dir=state_dir
    )
    _open[job.key] = tracker
    return tracker


def flow_run_tags(id: str, url: str) -> dict[str, str]:
    """Tags that lead from a run in MLflow to the Prefect run that it belongs to; a person follows the link in its description."""
    note = f"[Run in Prefect]({url}): its log, progress and tables" if url else ""
    tags = {"prefect.flow_run_id": id, "prefect.flow_run_url": url, NOTE: note}
    return {name: value for name, value in tags.items() if value}


def start_tracking(job: Job) -> None:
    """Open the stage's run: under its pipeline's, tagged with the Prefect run, with config, data and code."""
    state_dir = job.place.state_dir
    tags = {
        "bmfm.stage": job.stage,
        "bmfm.dataset": job.name,
        "bmfm.key": job.key,
        "bmfm.code_version": job.code,
        **flow_run_tags(job.context.get("prefect_flow_run_id", ""), job.context.get("prefect_flow_run_url", "")),
    }
    if job.stage in ("finetune", "evaluate"):
        tags["bmfm.seed"] = str(job.config["seed"]["seed_value"])
        tags["bmfm.train_fraction"] = f"{job.config['data_module'].get('train_fraction') or 1:g}"
    tracker = StageTracker(
        tracking_uri(state_dir),
        EXPERIMENT,
        f"{job.title}-{job.name}",
        parent_run_id=job.context.get("mlflow_parent_run_id") or None,
        tags={name: value for name, value in tags.items() if value},
        state_dir=state_dir,
    )
    tracker.log_config(job.config)
    for role, entry in job.inputs.items():
        if role in ("source", "data"):
            tracker.log_dataset(job.name, entry["id"], source=entry["uri"], context=role)
        else:
            tracker.set_tags({f"bmfm.input.{role}": entry["uri"], f"bmfm.input.{role}.hash": entry["id"]})
    write_json_atomic(job.run_dir / "mlflow.json", {"run_id": tracker.run_id, "url": tracker.url})
    _open[job.key] = tracker


def run_links(job: Job) -> dict[str, str]:
    """The page of the stage's MLflow run, for people, from its first step on; nothing while MLflow is away."""
    file = job.run_dir / "mlflow.json"
    url = read_json(file).get("url") if file.exists() else ""
    return {"MLflow run": url} if url else {}


def history_of(job: Job) -> Path:
    """Where a training of the job keeps the losses and scores of its steps while it goes on."""
    return job.run_dir / "training" / "history.jsonl"


def log_progress(job: Job, event: dict[str, Any]) -> None:
    """Metrics of a training event, while it trains."""
    tracker = _tracker(job)
    if tracker is None:
        return
    if event["kind"] == "progress":
        values = {
            "train/loss": event["loss"],
            "cells_per_s": event["cells_per_s"],
            "loader_wait_share": event["loader_wait_share"],
        }
        tracker.log_metrics(values, step=event["step"])
    elif event["kind"] == "validation":
        tracker.log_metrics(event["metrics"], step=event["step"])


def log_curve(job: Job, curve: list[tuple[int, dict[str, float]]]) -> None:
    """Metrics by step of a stage's run, such as scores by percent of the training cells."""
    tracker = _tracker(job)
    for step, values in curve if tracker is not None else ():
        tracker.log_metrics(values, step=step)


def finish_tracking(
    job: Job,
    artefact: Artefact,
    *,
    files: list[str] = (),
    metrics: dict[str, float] | None = None,
    history: Path | None = None,
    tags: dict[str, str] | None = None,
) -> dict[str, str]:
    """Record what the stage made and close its run; returns links for people."""
    tracker = _tracker(job)
    if tracker is None:
        return {}
    tracker.set_tags({"bmfm.artefact": artefact.uri, "bmfm.artefact_hash": artefact.hash, **(tags or {})})
    numbers = {
        name: float(value)
        for name, value in artefact.summary.items()
        if isinstance(value, int | float) and value is not True
    }
    tracker.log_metrics({**numbers, **(metrics or {})})
    if history is not None and history.exists():
        tracker.log_history(history)
    folder = artefact.local()
    for name in files:
        if (folder / name).exists():
            tracker.log_artifact(folder / name)
    url = tracker.url
    tracker.end("FINISHED")
    _open.pop(job.key, None)
    return {"MLflow run": url} if url else {}


def fail_tracking(job: Job, error: BaseException) -> None:
    """Close the run of a stage that ended with an error."""
    tracker = _tracker(job)
    if tracker is not None:
        tracker.__exit__(type(error), error, None)
        _open.pop(job.key, None)
