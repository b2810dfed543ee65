"""Passes of a model over cells that its controls need: embeddings of training cells, predictions of a model beside it."""

import logging
import shutil
from typing import Any

import numpy as np

from bmfm_pipeline.batching import choose_rows
from bmfm_pipeline.config import DataModuleConfig, RunConfig
from bmfm_pipeline.evaluation.predictions import LabelPredictions, read_embeddings, write_embeddings
from bmfm_pipeline.evaluation.several_classes import predictions_by_class
from bmfm_pipeline.stages.inputs import input_folder
from bmfm_pipeline.stages.jobs import KEY_LENGTH, Job
from bmfm_pipeline.stages.running import Progress
from bmfm_pipeline.storage import Artefact, code_version, find_artefact, hash_bytes, hash_json, publish
from bmfm_pipeline.training.gene_tables import with_kept_tables

logger = logging.getLogger(__name__)
# Training cells that are embedded for controls; of more, a sample.
MOST_EMBEDDED = 20_000
MODULE = "bmfm_pipeline.stages.controls_passes"


def reading_view(run: RunConfig) -> dict[str, Any]:
    """The part of an evaluation's config that says how a model reads cells, for keys."""
    view = run.key_view("evaluate")
    names = ("seed", "fields", "data_module", "prepend_tokens")
    return {name: view[name] for name in names} | {"precision": run.task.precision}


def sampled(rows: np.ndarray, seed: int) -> np.ndarray:
    """At most 20,000 of `rows`, ascending, the same for the same seed."""
    return np.sort(choose_rows(rows, MOST_EMBEDDED, seed))


def training_embeddings(job: Job, run: RunConfig, rows: np.ndarray, on_progress: Progress) -> tuple[Artefact, bool]:
    """(artefact with embeddings/train.npy of `rows`, whether it was there): one pass for all evaluations of this model on these cells.

    It is copied into the folder of this evaluation as well.
    """
    view = {**reading_view(run), "pooling": run.trainer.pooling_method, "rows": hash_bytes(rows.tobytes())}
    inputs = {role: job.inputs[role] for role in ("data", "model")}
    code = code_version(MODULE)
    ids = {role: entry["id"] for role, entry in inputs.items()}
    key = hash_json({"stage": "embeddings", "inputs": ids, "config": view, "code": code})[:KEY_LENGTH]
    artefact = find_artefact(job.place, "embeddings", key)
    there = artefact is not None
    if artefact is None:
        found = _pass(job, run, "model", rows, {}, on_progress, run.trainer.pooling_method).embeddings
        staging = job.run_dir / "controls" / key
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        write_embeddings(staging, "train", found, rows)
        artefact = publish(
            staging,
            job.place,
            "embeddings",
            key,
            inputs=inputs,
            config=view,
            code_version=code,
            summary={"name": job.name, "cells": len(rows), "features": int(found.shape[1])},
        )
    write_embeddings(job.staging, "train", *read_embeddings(artefact.local(), "train"))
    return artefact, there


def predictions_beside(
    job: Job,
    run: RunConfig,
    role: str,
    column: str,
    names: list[str],
    labels: np.ndarray,
    rows: np.ndarray,
    on_progress: Progress,
) -> dict[str, LabelPredictions]:
    """What the model of input `role` predicts of a label column for `rows`, by target; `labels` are those of all cells."""
    found = _pass(job, run, role, rows, {column: names}, on_progress, None, truth={column: labels})
    return predictions_by_class(found.labels, {column: labels})


def _pass(
    job: Job,
    run: RunConfig,
    role: str,
    rows: np.ndarray,
    class_names: dict[str, list[str]],
    on_progress: Progress,
    pooling: Any,
    truth: dict[str, np.ndarray] | None = None,
):
    from bmfm_pipeline.evaluation.inference import predict_loader
    from bmfm_pipeline.models import load_model
    from bmfm_pipeline.training.data_module import build_data_module

    folder = input_folder(job, role)
    run = run.model_copy(deep=True)
    own = with_kept_tables(run.model_dump(mode="json")["data_module"], folder)
    run.data_module = DataModuleConfig.model_validate(own)
    data = build_data_module(run, input_folder(job, "data"))
    data.setup("test")
    total = len(rows)
    return predict_loader(
        load_model(folder, source=job.inputs[role]["uri"]),
        data.evaluation_loader(rows),
        class_names,
        truth=truth,
        on_batch=lambda done: on_progress({"kind": "progress", "stage": "evaluate", "step": done, "max_steps": total}),
        device="cuda" if run.task.accelerator == "gpu" else "cpu",
        precision=run.task.precision,
        pooling=pooling,
    )
