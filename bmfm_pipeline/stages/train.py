"""Pretrain and fine-tune: prepare inputs, train in a child process, publish the model. One function per step."""

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from bmfm_pipeline.config import RunConfig
from bmfm_pipeline.errors import StorageError
from bmfm_pipeline.stages.inputs import input_folder
from bmfm_pipeline.stages.jobs import Job
from bmfm_pipeline.stages.publishing import publish_staged
from bmfm_pipeline.stages.running import Progress, step_result
from bmfm_pipeline.stages.tracked import finish_tracking, log_progress, start_tracking
from bmfm_pipeline.storage import SharedRun, read_json, write_json_atomic
from bmfm_pipeline.training import TrainSpec, train_in_child
from bmfm_pipeline.training.model_card import write_card
from bmfm_pipeline.training.records import write_records

logger = logging.getLogger(__name__)
# Larger weights are not copied into MLflow: the run's tags say where they lie.
MOST_BYTES_IN_MLFLOW = 200 * 2**20
# Of several trainings at the same time each has these to itself, as the context of its job says.
PLACE = {"cuda_visible_devices": "CUDA_VISIBLE_DEVICES", "omp_num_threads": "OMP_NUM_THREADS"}


def prepare(job: Job, on_progress: Progress) -> dict[str, Any]:
    """Bring the inputs to this machine and write down what the child process is to do."""
    start_tracking(job)
    data = input_folder(job, "data")
    checkpoint = input_folder(job, "checkpoint") if "checkpoint" in job.inputs else None
    if checkpoint is None and job.stage == "finetune":
        logger.warning("finetune: model.checkpoint is null: training FROM SCRATCH, without a pretrained model")
    spec = TrainSpec(
        stage=job.stage,
        config=job.config,
        data=str(data),
        init_from=None if checkpoint is None else str(checkpoint),
        run_dir=str(job.run_dir / "training"),
        shared=_shared(job),
    )
    write_json_atomic(job.run_dir / "train_spec.json", spec.to_dict())
    run = RunConfig.model_validate(job.config)
    for note in run.notes:  # what differs from what was asked for is said, not only stored
        logger.warning("%s", note)
    summary = {"data": str(data), "start": "pretrained" if checkpoint else "from scratch", "notes": run.notes}
    return {"uri": str(job.run_dir / "train_spec.json"), "summary": summary}


def _shared(job: Job) -> dict[str, Any] | None:
    """Where other machines find the checkpoints of this job, and what they are told about it."""
    uri = job.place.shared_run_uri(job.key)
    about = {name: getattr(job, name) for name in ("stage", "name", "key", "variant", "workspace", "inputs")}
    return None if uri is None else {"uri": uri, "job": about}


def _forget_shared(job: Job) -> None:
    """The checkpoints of a published training are in its artefact."""
    uri = job.place.shared_run_uri(job.key)
    if uri is not None:
        try:
            SharedRun(uri).remove()
        except StorageError as error:
            logger.warning("%s; `bmfm workspace gc` deletes what is left of it", error)


def _link(source: Path, target: Path) -> None:
    """The same bytes under a second name, copied only where links are not possible: publishing may fail and be tried again."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def train(job: Job, on_progress: Progress) -> dict[str, Any]:
    """Train in a child process; raises Preempted when it was stopped and can be resumed by running the step again."""
    spec = TrainSpec.from_file(job.run_dir / "train_spec.json")

    def relay(event: dict[str, Any]) -> None:
        on_progress({"stage": job.stage, **event})
        log_progress(job, event)

    given = {variable: job.context[name] for name, variable in PLACE.items() if name in job.context}
    result = train_in_child(spec, on_progress=relay, environment=given)
    if outside := result.summary.get("values_outside_vocabulary"):
        logger.warning(
            "%d expression values (counted at every use) have no token and were read as [UNK]; bin them with a BinTransform, or give "
            "the field tokenization_strategy=continuous_value_encoder",
            outside,
        )
    return {"uri": str(result.model_dir), "summary": result.summary}


def _taken_over(file: Path) -> dict[str, int]:
    """How many tensors came from the checkpoint, and how many heads did not; nothing where training began from scratch."""
    if not file.exists():
        return {}
    report = read_json(file)
    return {
        "weights_loaded": len(report["loaded"]),
        "heads_started_fresh": len(report["new_heads"]),
        "heads_not_used": len(report["not_used"]),
    }


def publish(job: Job, on_progress: Progress) -> dict[str, Any]:
    """Publish the best weights as a model folder with all that prediction needs, the checkpoints and the history."""
    trained = step_result(job, "train")
    training = job.run_dir / "training"
    staging = job.staging
    shutil.rmtree(staging, ignore_errors=True)
    shutil.copytree(trained["uri"], staging)
    for name in ("history.jsonl", "loading_report.json"):
        if (training / name).exists():
            shutil.copy2(training / name, staging / name)
    write_records(
        staging,
        name=job.name,
        stage=job.stage,
        config=job.config,
        inputs=job.inputs,
        summary=trained["summary"],
        data=input_folder(job, "data"),
    )
    write_card(staging, staging)
    (staging / "checkpoints").mkdir()
    for file in sorted((training / "checkpoints").glob("*.ckpt")):
        _link(file, staging / "checkpoints" / file.name)
    (staging / "run_config.json").write_text(json.dumps(job.config, indent=1))
    artefact = publish_staged(
        job,
        {
            "name": job.name,
            **({"variant": job.variant} if job.variant else {}),
            **trained["summary"],
            **_taken_over(staging / "loading_report.json"),
        },
    )
    folder = artefact.local()
    files = ["loading_report.json", "config.json", "label_dict.json", "calibration.json", "README.md"]
    weights = {name: entry["bytes"] for name, entry in artefact.files.items() if name.endswith(".safetensors")}
    if sum(weights.values()) <= MOST_BYTES_IN_MLFLOW:
        files += weights
    links = finish_tracking(
        job,
        artefact,
        files=files,
        history=folder / "history.jsonl",
        tags={"bmfm.checkpoint": artefact.file(f"checkpoints/{trained['summary']['best_checkpoint']}")},
    )
    shutil.rmtree(training, ignore_errors=True)
    _forget_shared(job)
    return {"uri": artefact.uri, "hash": artefact.hash, "summary": artefact.summary, "links": links}
