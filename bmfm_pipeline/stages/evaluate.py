"""Evaluate: one inference pass, controls on the same split, metrics with intervals, a report. One function per step."""

import csv
import logging
import shutil
from typing import Any

import numpy as np

from bmfm_pipeline.config import DataModuleConfig, RunConfig
from bmfm_pipeline.data.label_ontology import read_allowed
from bmfm_pipeline.data.splits import read_split_info
from bmfm_pipeline.errors import DataError
from bmfm_pipeline.evaluation.calibration import Unknown, calibration_of, fitted_to, rows_of_all
from bmfm_pipeline.evaluation.card import numbers_of_test
from bmfm_pipeline.evaluation.confidences import confidences_of_model, read_confidences, write_confidences
from bmfm_pipeline.evaluation.embedding_map import check_batch_column
from bmfm_pipeline.evaluation.groups import (
    check_group_column,
    donors_not_respected,
    groups_of_cells,
    read_groups,
    write_groups,
)
from bmfm_pipeline.evaluation.predictions import (
    Predictions,
    read_control_predictions,
    read_predictions,
    write_embeddings,
    write_predictions,
)
from bmfm_pipeline.evaluation.several_classes import predictions_by_class
from bmfm_pipeline.evaluation.tables import Settings, evaluate_predictions
from bmfm_pipeline.evaluation.unlearning import say_what_is_left
from bmfm_pipeline.evaluation.wording import in_words
from bmfm_pipeline.stages.controls_step import controls as controls  # a step, written in its own file
from bmfm_pipeline.stages.controls_step import notes_of_controls
from bmfm_pipeline.stages.embedding_map_step import embedding_map as embedding_map  # a step, written in its own file
from bmfm_pipeline.stages.held_out import HeldOut, is_held_out_job
from bmfm_pipeline.stages.held_out_scores import data_of_held_out, predictions_of_held_out, score_held_out
from bmfm_pipeline.stages.inputs import input_folder
from bmfm_pipeline.stages.jobs import Job
from bmfm_pipeline.stages.masked_positions import recording, score_fields
from bmfm_pipeline.stages.perturbation_scores import predict_perturbations, score_perturbations
from bmfm_pipeline.stages.publishing import publish_staged
from bmfm_pipeline.stages.reporting import report as report  # a step, written in its own file
from bmfm_pipeline.stages.running import Progress
from bmfm_pipeline.stages.tracked import finish_tracking, start_tracking
from bmfm_pipeline.storage import hash_file, read_json, write_json_atomic
from bmfm_pipeline.training.gene_tables import with_kept_tables
from bmfm_pipeline.training.model_card import write_card
from bmfm_pipeline.training.prepared import PreparedData
from bmfm_pipeline.training.temperature import read_calibration, temperatures

logger = logging.getLogger(__name__)
UNKNOWN_VALUES = "%d expression values of test cells were not among those of the training cells and were read as [UNK]"


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
    from bmfm_pipeline.training.data_module import build_data_module

    shutil.rmtree(job.staging, ignore_errors=True)
    job.staging.mkdir(parents=True)
    start_tracking(job)
    run = _run(job)
    model_folder = input_folder(job, "model")
    own = with_kept_tables(run.model_dump(mode="json")["data_module"], model_folder)
    run.data_module = DataModuleConfig.model_validate(own)
    held = HeldOut.begin(job, run) if is_held_out_job(job) else None
    data = build_data_module(run, input_folder(job, "data")) if held is None else data_of_held_out(held, run)
    data.setup("test")
    check_group_column(data.prepared.store, run.evaluation.group_column)
    check_batch_column(data.prepared.store, run.evaluation.batch_column)
    rows = data.rows["test"]
    if not len(rows):
        raise DataError(
            f"{data.prepared.folder}: the split has no test cells; set data_module.transform_kwargs.split_weights.test above 0"
        )
    model = load_model(model_folder, source=job.inputs["model"]["uri"])
    labels = _class_names(data.prepared, run) if run.predicts_labels else {}
    trained = RunConfig.model_validate(read_json(model_folder / "run_config.json"))
    total = len(rows)
    truth = data.prepared.labels(run) if labels else None
    if run.predicts_pairs:

        def told(done: int) -> None:
            on_progress({"kind": "progress", "stage": "evaluate", "step": done, "max_steps": total})

        cells = predict_perturbations(run, trained, model, data, job.staging, told)
        file = job.staging / "predictions.parquet"
        write_predictions(file, Predictions(cells, {}))
        write_confidences(job.staging, cells, {})
        return {"uri": str(file), "hash": hash_file(file), "summary": {"cells": len(cells)}}
    with recording(run, trained, data, job.staging, None if held is None else held.training.folder) as fields:
        predictions = predict_loader(
            model,
            data.test_dataloader(),
            labels,
            truth=truth,
            fields=fields,
            on_batch=lambda done: on_progress(
                {"kind": "progress", "stage": "evaluate", "step": done, "max_steps": total}
            ),
            device="cuda" if run.task.accelerator == "gpu" else "cpu",
            precision=run.task.precision,
            pooling=run.trainer.pooling_method if labels else None,
            keep_logits=True,
        )
    if predictions.embeddings is not None:
        write_embeddings(job.staging, "test", predictions.embeddings, rows)
    if unknown := data.builder.report.values_outside_vocabulary:
        logger.warning(UNKNOWN_VALUES, unknown)
    scales = temperatures(read_calibration(model_folder))
    common = {}
    if held is not None:
        truth, common = held.truth, held.common
        predictions_of_held_out(predictions, held, rows)
    found = confidences_of_model(predictions, scales, truth or {}, common)
    write_confidences(job.staging, predictions.cells, found)
    predictions.logits = {}
    file = job.staging / "predictions.parquet"
    predictions.labels = predictions_by_class(predictions.labels, truth or {})
    write_predictions(file, predictions)
    return {"uri": str(file), "hash": hash_file(file), "summary": {"cells": len(predictions.cells)}}


def _group_column(run: RunConfig, prepared: PreparedData) -> str | None:
    return run.evaluation.group_column or prepared.split_group


def _settings(job: Job, run: RunConfig, groups: np.ndarray | None, held: HeldOut | None = None) -> Settings:
    split = read_json(input_folder(job, "data") / "split.json")
    return Settings(
        method=run.task.ci_method,
        resamples=run.evaluation.resamples,
        bootstrap_runs=run.task.num_bootstrap_runs,
        level=run.evaluation.level,
        seed=run.seed.seed_value,
        rare_class_floor=run.evaluation.rare_class_floor,
        split="test" if held is None else "held-out",
        split_hash=split["hash"] if held is None else held.split_hash,
        groups=groups,
        stratified=run.evaluation.stratified,
        allowed=_allowed(PreparedData(input_folder(job, "data")), run) if held is None else {},
    )


def _allowed(prepared: PreparedData, run: RunConfig) -> dict[str, np.ndarray]:
    """What the ontologies of label columns say, of those that have one."""
    names = [column.label_column_name for column in run.label_columns if column.label_ontology is not None]
    found = {name: read_allowed(prepared.folder, name, prepared.label_dict[name]) for name in names}
    return {name: table for name, table in found.items() if table is not None}


def _unlearned(run: RunConfig) -> dict[str, float]:
    columns = {column.label_column_name: column.gradient_reversal_coefficient for column in run.label_columns}
    return {name: coefficient for name, coefficient in columns.items() if coefficient is not None}


def metrics(job: Job, on_progress: Progress) -> dict[str, Any]:
    """Every metric with its interval, for the model and the controls, from stored predictions."""
    run = _run(job)
    model = read_predictions(job.staging / "predictions.parquet")
    others = read_control_predictions(job.staging / "controls.json", model)
    prepared = PreparedData(input_folder(job, "data"))
    held = HeldOut.read(job, run) if is_held_out_job(job) else None
    column = _group_column(run, prepared)
    groups, notes = groups_of_cells(prepared.store, column, model.cells)
    notes += donors_not_respected(read_split_info(prepared.folder), column)
    if groups is not None and run.evaluation.stratified:
        notes.append(f"evaluation.stratified has no effect: whole values of {column} are resampled instead")
    write_groups(job.staging, column, groups)
    settings = _settings(job, run, groups, held)
    evaluation = evaluate_predictions(model, others, settings)
    if held is not None:
        score_held_out(evaluation, held, model, others, settings)
    say_what_is_left(evaluation, _unlearned(run))
    score_fields(evaluation, job.staging, model.cells, settings)
    if run.predicts_pairs:
        score_perturbations(evaluation, run, prepared, job.staging, settings)
    fitted = read_calibration(input_folder(job, "model"))
    evaluation.rows += rows_of_all(read_confidences(job.staging), others, fitted, settings)
    evaluation.notes += notes + notes_of_controls(job) + _shared_with_training(run, prepared)
    if run.data_module.train_fraction is not None:
        cells_of = prepared if held is None else held.training
        evaluation.notes.append(f"{cells_of.training_sentence(run)}, for the model and its controls alike")
    if run.observed != "cells":
        evaluation.rows = [{**row, "of": run.observed} for row in evaluation.rows]
        evaluation.verdicts = [in_words(text, run.observed) for text in evaluation.verdicts]
        evaluation.notes = [in_words(text, run.observed) for text in evaluation.notes]
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


def _shared_with_training(run: RunConfig, prepared: PreparedData) -> list[str]:
    """Which of the tested sequences are training sequences, as their preprocessing has counted."""
    if run.data_module.sequences is None:
        return []
    said = read_json(prepared.folder / "report.json").get("split", {}).get("leakage")
    return [f"leakage: {said}"] if said else []


def calibration(job: Job, on_progress: Progress) -> dict[str, Any]:
    """Whether the model's confidence can be believed, and what calling unsure cells unknown would do."""
    run = _run(job)
    found, fitted = read_confidences(job.staging), read_calibration(input_folder(job, "model"))
    held = HeldOut.read(job, run) if is_held_out_job(job) else None
    settings = _settings(job, run, read_groups(job.staging)[1], held)
    unknown = Unknown(run.evaluation.unknown_threshold, run.evaluation.unknown_target_accuracy)
    result = {
        target: entry
        for target, ways in found.items()
        if (entry := calibration_of(ways, fitted_to(target, fitted), settings, unknown))
    }
    for entry in result.values():
        entry["sentence"] = in_words(entry["sentence"], run.observed)
    file = job.staging / "calibration.json"
    write_json_atomic(file, result)
    said = [f"{target}: {entry['sentence']}" for target, entry in result.items()]
    return {"uri": str(file), "hash": hash_file(file), "summary": {"calibration": said} if said else {}}


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
    artefact = publish_staged(job, {"name": job.name, **headline})
    links = finish_tracking(
        job,
        artefact,
        files=[
            "metrics.json",
            "metrics.csv",
            "calibration.json",
            "gene_errors.csv",
            "perturbations.csv",
            "report.html",
            "report.md",
            "README.md",
        ],
    )
    links["Report"] = artefact.file("report.html")
    return {"uri": artefact.uri, "hash": artefact.hash, "summary": artefact.summary, "links": links}
