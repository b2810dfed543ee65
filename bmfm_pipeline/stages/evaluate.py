"""Evaluate: one inference pass, controls on the same split, metrics with intervals, a report. One function per step."""

import csv
import json
import logging
import platform
import shutil
from typing import Any

import numpy as np

from bmfm_pipeline.config import DataModuleConfig, RunConfig
from bmfm_pipeline.data.label_ontology import read_allowed
from bmfm_pipeline.data.splits import split_sentence
from bmfm_pipeline.errors import DataError
from bmfm_pipeline.evaluation.card import numbers_of_test
from bmfm_pipeline.evaluation.controls import run_controls, which_controls
from bmfm_pipeline.evaluation.predictions import (
    read_control_predictions,
    read_predictions,
    write_control_predictions,
    write_embeddings,
    write_predictions,
)
from bmfm_pipeline.evaluation.report import write_report
from bmfm_pipeline.evaluation.several_classes import by_class, predictions_by_class
from bmfm_pipeline.evaluation.tables import Evaluation, Settings, evaluate_predictions
from bmfm_pipeline.stages.inputs import input_folder
from bmfm_pipeline.stages.jobs import Job
from bmfm_pipeline.stages.running import Progress
from bmfm_pipeline.stages.tracked import finish_tracking, start_tracking
from bmfm_pipeline.storage import hash_file, read_json, write_json_atomic
from bmfm_pipeline.storage import publish as publish_artefact
from bmfm_pipeline.training.gene_tables import with_kept_tables
from bmfm_pipeline.training.model_card import write_card
from bmfm_pipeline.training.prepared import PreparedData

logger = logging.getLogger(__name__)
UNKNOWN_VALUES = "%d expression values of test cells were not among those of the training cells and were read as [UNK]"
WITHOUT_COUNTS = "controls: the processed data holds no raw counts, so they are computed from its values (X) instead"


def _run(job: Job) -> RunConfig:
    return RunConfig.model_validate(job.config)


def _class_names(prepared: PreparedData, run: RunConfig) -> dict[str, list[str]]:
    """Class names in id order; an empty list for a regression column."""
    names = {}
    for column in run.label_columns:
        name = column.label_column_name
        known = {} if column.is_regression_label else prepared.label_dict[name]
        names[name] = sorted(known, key=known.get)
    return names


def predict(job: Job, on_progress: Progress) -> dict[str, Any]:
    """One pass of the model over the test cells; everything after reads what is stored here."""
    from bmfm_pipeline.evaluation.inference import predict_loader
    from bmfm_pipeline.models import load_model
    from bmfm_pipeline.objectives import build_objectives, fit_constants
    from bmfm_pipeline.training.data_module import build_data_module

    shutil.rmtree(job.staging, ignore_errors=True)
    job.staging.mkdir(parents=True)
    start_tracking(job)
    run = _run(job)
    model_folder = input_folder(job, "model")
    own = with_kept_tables(run.model_dump(mode="json")["data_module"], model_folder)
    run.data_module = DataModuleConfig.model_validate(own)
    data = build_data_module(run, input_folder(job, "data"))
    data.setup("test")
    rows = data.rows["test"]
    if not len(rows):
        raise DataError(
            f"{data.prepared.folder}: the split has no test cells; set data_module.transform_kwargs.split_weights.test above 0"
        )
    model = load_model(model_folder, source=job.inputs["model"]["uri"])
    labels = _class_names(data.prepared, run) if run.predicts_labels else {}
    trained = RunConfig.model_validate(read_json(model_folder / "run_config.json"))
    objectives = constants = None
    if run.predicts_fields:
        losses = [entry for entry in trained.trainer.losses or [] if "field_name" in entry]
        objectives = build_objectives(
            losses, data.prepared.field_dicts(trained), [], data.prepared.token_values(trained)
        )
        constants = fit_constants(objectives, data.training_labels())
    total = len(rows)
    truth = data.prepared.labels(run) if labels else None
    predictions = predict_loader(
        model,
        data.test_dataloader(),
        labels,
        truth=truth,
        objectives=objectives,
        constants=constants,
        on_batch=lambda done: on_progress({"kind": "progress", "stage": "evaluate", "step": done, "max_steps": total}),
        device="cuda" if run.task.accelerator == "gpu" else "cpu",
        precision=run.task.precision,
        pooling=run.trainer.pooling_method if labels else None,
    )
    if predictions.embeddings is not None:
        write_embeddings(job.staging, "test", predictions.embeddings, rows)
    if unknown := data.builder.report.values_outside_vocabulary:
        logger.warning(UNKNOWN_VALUES, unknown)
    file = job.staging / "predictions.parquet"
    predictions.labels = predictions_by_class(predictions.labels, truth or {})
    write_predictions(file, predictions)
    return {"uri": str(file), "hash": hash_file(file), "summary": {"cells": len(predictions.cells)}}


def controls(job: Job, on_progress: Progress) -> dict[str, Any]:
    """Simple methods on the same training rows and the same test cells, from raw counts."""
    run = _run(job)
    prepared = PreparedData(input_folder(job, "data"))
    file = job.staging / "controls.json"
    names = _class_names(prepared, run) if run.predicts_labels else {}
    if not names:
        write_json_atomic(file, {})
        return {"uri": str(file), "hash": hash_file(file), "summary": {}}
    which = which_controls(run.evaluation.controls)
    counts = prepared.store.counts
    if counts is None:
        logger.warning("%s", WITHOUT_COUNTS)
        counts = prepared.store.matrix
    model = read_predictions(job.staging / "predictions.parquet")
    position = {name: row for row, name in enumerate(prepared.store.obs_names)}
    test_rows = [position[cell] for cell in model.cells]
    labels, names = by_class(prepared.labels(run), names)
    found = run_controls(
        counts,
        prepared.rows("train"),
        np.array(test_rows),
        labels,
        names,
        which,
        seed=run.seed.seed_value,
    )
    write_control_predictions(file, found)
    return {"uri": str(file), "hash": hash_file(file), "summary": {"controls": ", ".join(found)}}


def _groups(prepared: PreparedData, column: str | None, cells: list[str]) -> tuple[np.ndarray | None, list[str]]:
    """(the group of each test cell where the split kept groups whole, what to say about it)."""
    if column is None:
        return None, []
    store = prepared.store
    of = dict(zip(store.obs_names, store.column(column), strict=True))
    groups = np.array([str(of[cell]) for cell in cells], dtype=object)
    count = len(np.unique(groups))
    if count < 2:
        return None, [f"intervals: all test cells have the same {column}, so they say nothing about other values of it"]
    few = "; with so few, they are rough" if count < 10 else ""
    return groups, [f"intervals resample whole values of {column}, of which the test cells have {count}{few}"]


def _settings(job: Job, run: RunConfig, groups: np.ndarray | None) -> Settings:
    split = read_json(input_folder(job, "data") / "split.json")
    return Settings(
        method=run.task.ci_method,
        resamples=run.evaluation.resamples,
        bootstrap_runs=run.task.num_bootstrap_runs,
        level=run.evaluation.level,
        seed=run.seed.seed_value,
        rare_class_floor=run.evaluation.rare_class_floor,
        split_hash=split["hash"],
        groups=groups,
        allowed=_allowed(PreparedData(input_folder(job, "data")), run),
    )


def _allowed(prepared: PreparedData, run: RunConfig) -> dict[str, np.ndarray]:
    """What the ontologies of label columns say, of those that have one."""
    names = [column.label_column_name for column in run.label_columns if column.label_ontology is not None]
    found = {name: read_allowed(prepared.folder, name, prepared.label_dict[name]) for name in names}
    return {name: table for name, table in found.items() if table is not None}


def metrics(job: Job, on_progress: Progress) -> dict[str, Any]:
    """Every metric with its interval, for the model and the controls, from stored predictions."""
    run = _run(job)
    model = read_predictions(job.staging / "predictions.parquet")
    others = read_control_predictions(job.staging / "controls.json", model)
    prepared = PreparedData(input_folder(job, "data"))
    groups, notes = _groups(prepared, prepared.split_group, model.cells)
    evaluation = evaluate_predictions(model, others, _settings(job, run, groups))
    evaluation.notes += notes
    if others and prepared.store.counts is None:
        evaluation.notes.append(WITHOUT_COUNTS)
    write_json_atomic(job.staging / "metrics.json", evaluation.rows)
    write_json_atomic(job.staging / "evaluation.json", evaluation.to_dict())
    with open(job.staging / "metrics.csv", "w", newline="") as stream:
        columns = list(dict.fromkeys(name for row in evaluation.rows for name in row))
        writer = csv.DictWriter(stream, columns)
        writer.writeheader()
        writer.writerows(evaluation.rows)
    file = job.staging / "metrics.json"
    shown = ("metric", "target", "model", "value", "ci_low", "ci_high", "ci_method", "n")
    table = [{name: row[name] for name in shown} for row in evaluation.rows]
    return {"uri": str(file), "hash": hash_file(file), "summary": {"verdicts": evaluation.verdicts}, "table": table}


def report(job: Job, on_progress: Progress) -> dict[str, Any]:
    """report.html, self-contained."""
    from bmfm_pipeline.tracking import redact

    run = _run(job)
    evaluation = Evaluation(**read_json(job.staging / "evaluation.json"))
    data, model = input_folder(job, "data"), input_folder(job, "model")
    trained = read_json(model / "run_config.json")
    split = read_json(data / "split.json")
    facts = {
        "dataset": job.name,
        "model": job.inputs["model"]["uri"],
        "data": job.inputs["data"]["uri"],
        "split": ", ".join(f"{name} {count}" for name, count in split["counts"].items())
        + f" cells; {split_sentence(split)} (hash {split['hash'][:16]})",
        "seed": run.seed.seed_value,
        "interval": f"{run.task.ci_method}, level {run.evaluation.level}",
        "hardware": f"{platform.processor() or platform.machine()}, {run.task.accelerator}, precision {run.task.precision}",
        "preset": trained.get("preset_used") or "none",
        "key": job.key,
    }
    preprocessing = read_json(data / "report.json").get("steps", []) if (data / "report.json").exists() else []
    file = job.staging / "report.html"
    write_report(
        file,
        evaluation,
        title=f"{job.name}: evaluation",
        facts=facts,
        notes=[*trained.get("notes", []), *run.notes],
        history=model / "history.jsonl",
        preprocessing=preprocessing,
        config=redact(json.loads(json.dumps(job.config))),
    )
    return {"uri": str(file), "hash": hash_file(file)}


def publish(job: Job, on_progress: Progress) -> dict[str, Any]:
    """Publish predictions, metrics and report."""
    write_json_atomic(job.staging / "run_config.json", job.config)
    write_card(job.staging, input_folder(job, "model"), tests=numbers_of_test(job.staging))
    rows = read_json(job.staging / "metrics.json")
    headline = {
        f"{row['target']}_{row['metric']}": row["value"]
        for row in rows
        if row["model"] == "model" and row["value"] is not None
    }
    artefact = publish_artefact(
        job.staging,
        job.place,
        job.stage,
        job.key,
        inputs=job.inputs,
        config=job.view,
        code_version=job.code,
        summary={"name": job.name, **headline},
    )
    links = finish_tracking(job, artefact, files=["metrics.json", "metrics.csv", "report.html", "README.md"])
    links["Report"] = artefact.file("report.html")
    return {"uri": artefact.uri, "hash": artefact.hash, "summary": artefact.summary, "links": links}
