"""The report step of an evaluation: confused pairs with their genes, then the page, its text and its figures."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from bmfm_pipeline.config import RunConfig
from bmfm_pipeline.data.splits import split_sentence
from bmfm_pipeline.errors import StorageError
from bmfm_pipeline.evaluation.confused import MEASURE, describe_confused
from bmfm_pipeline.evaluation.controls import log_cp10k
from bmfm_pipeline.evaluation.controls.values import WITHOUT_COUNTS, values_for_controls
from bmfm_pipeline.evaluation.pages.numbers import counted, observing, size
from bmfm_pipeline.evaluation.pages.sections import training_detail
from bmfm_pipeline.evaluation.predictions import read_predictions
from bmfm_pipeline.evaluation.report import CALIBRATION, CONFUSED, EMBEDDING_MAP, write_report
from bmfm_pipeline.evaluation.rows import Evaluation
from bmfm_pipeline.evaluation.several_classes import by_class
from bmfm_pipeline.stages.costs import cost_of, machine, versions
from bmfm_pipeline.stages.held_out import HeldOut, is_held_out_job
from bmfm_pipeline.stages.held_out_plan import TRAINING
from bmfm_pipeline.stages.inputs import input_folder
from bmfm_pipeline.stages.jobs import Job
from bmfm_pipeline.stages.running import Progress
from bmfm_pipeline.storage import hash_file, load_artefact, read_json, write_json_atomic
from bmfm_pipeline.tracking import redact
from bmfm_pipeline.training.prepared import PreparedData

MANIFEST = "artefact.json"


def report(job: Job, on_progress: Progress) -> dict[str, Any]:
    """report.html, self-contained; report.md and figures/ beside it; confused.json."""
    run = RunConfig.model_validate(job.config)
    evaluation = Evaluation(**read_json(job.staging / "evaluation.json"))
    data, model = input_folder(job, "data"), input_folder(job, "model")
    held = HeldOut.read(job, run) if is_held_out_job(job) else None
    if confused := _confused(job, run, PreparedData(data) if held is None else held.both):
        write_json_atomic(job.staging / CONFUSED, confused)
    trained = _read(model / "run_config.json")
    prepared = _read(data / "report.json")
    file = job.staging / "report.html"
    with observing(run.observed):
        write_report(
            file,
            evaluation,
            title=f"{job.name}: evaluation{' on held-out data' if held else ''}",
            lead=_lead(job, model, evaluation),
            facts=_facts(job, run, data, trained, held),
            notes=[*trained.get("notes", []), *run.notes],
            history=model / "history.jsonl",
            preprocessing=prepared.get("steps", []),
            config=redact(json.loads(json.dumps(job.config))),
            calibration=_read(job.staging / CALIBRATION),
            embedding_map=_read(job.staging / EMBEDDING_MAP),
            confused=confused,
            genes=prepared.get("gene_names"),
            environment=environment(),
            costs={**_costs_before(job, model, data), "evaluate": cost_of(job, until="report")},
            text=job.staging / "report.md",
            figures=job.staging / "figures",
        )
    return {"uri": str(file), "hash": hash_file(file)}


def _read(file: Path) -> dict[str, Any]:
    return read_json(file) if file.exists() else {}


def _lead(job: Job, model: Path, evaluation: Evaluation) -> str:
    kind = _read(model / "config.json").get("model_type", "model")
    own = [row for row in evaluation.rows if row["n"]]
    said = f", on {own[0]['n']:,} {own[0]['split']} {counted(own[:1])}" if own else ""
    return f"{kind}, key {job.inputs['model']['id'][:12]}{said}"


def _facts(
    job: Job, run: RunConfig, data: Path, trained: dict[str, Any], held: HeldOut | None = None
) -> dict[str, Any]:
    split = read_json(data / "split.json")
    divided = ", ".join(f"{name} {count}" for name, count in split["counts"].items())
    said = f"{divided} {run.observed}; {split_sentence(split)} (hash {split['hash'][:16]})"
    if held is not None:
        entry = job.inputs[TRAINING]
        said = (
            f"held-out data: {len(held.rows)} test {run.observed} of {held.said['cells']} (hash {held.split_hash[:16]})"
        )
        said += f"; the model was trained on {entry['uri']} (hash {entry['id'][:16]})"
    manifest = _read(data / MANIFEST)
    sources = {
        f"{role} (input of the data)": f"{entry['uri']} (hash {entry['id'][:16]})"
        for role, entry in (manifest.get("inputs") or {}).items()
    }
    return {
        "dataset": job.name,
        "model": f"{job.inputs['model']['uri']} (hash {job.inputs['model']['id'][:16]})",
        "data": f"{job.inputs['data']['uri']} (hash {job.inputs['data']['id'][:16]})",
        **sources,
        "split": said,
        "seed": run.seed.seed_value,
        "interval": f"{run.task.ci_method}, level {run.evaluation.level}",
        "device": f"{run.task.accelerator}, precision {run.task.precision}",
        "preset": trained.get("preset_used") or "none",
        "key": job.key,
        "code": job.code[:16],
    }


def environment() -> dict[str, str]:
    """Machine and versions in words."""
    found = machine()
    return {
        "processor": f"{found['processor']}, {found['cores']} cores",
        "memory": size(found["memory_bytes"]),
        "system": found["system"],
        "versions": ", ".join(f"{name} {number}" for name, number in versions().items()),
    }


def _costs_before(job: Job, model: Path, data: Path) -> dict[str, dict[str, Any]]:
    """What preprocessing and training cost, of those stages whose artefacts say so, in the order they ran."""
    fitted = _read(model / MANIFEST)
    manifests = [_read(data / MANIFEST), *_started_from(fitted), fitted]
    return {
        manifest["stage"]: {**manifest["cost"], "detail": training_detail(manifest.get("summary") or {})}
        for manifest in manifests
        if manifest.get("cost")
    }


def _started_from(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The manifest of the model that a training started from, where it is still there."""
    start = (manifest.get("inputs") or {}).get("checkpoint")
    if start is None or start.get("stage") not in ("pretrain", "finetune"):
        return []
    try:
        return [vars(load_artefact(start["uri"]))]
    except StorageError:
        return []


def _confused(job: Job, run: RunConfig, prepared) -> dict[str, Any]:
    if (
        not run.predicts_labels or run.data_module.sequences is not None
    ):  # sequences have no genes to tell classes apart by
        return {}
    predictions = read_predictions(job.staging / "predictions.parquet")
    labels, _ = by_class(prepared.labels(run), {name: sorted(known, key=known.get) for name, known in prepared.label_dict.items()})  # fmt: skip
    position = {name: row for row, name in enumerate(prepared.store.obs_names)}
    values, kind = values_for_controls(prepared.store)
    values_of, measure = values.rows, WITHOUT_COUNTS.get(kind, MEASURE)
    if kind == "counts":
        values_of = lambda rows: log_cp10k(values.rows(rows))  # noqa: E731
    return describe_confused(
        predictions.labels,
        np.array([position[cell] for cell in predictions.cells], dtype=np.int64),
        labels,
        prepared.training_rows(run),
        values_of,
        prepared.store.var_names,
        seed=run.seed.seed_value,
        measure=measure,
    )
