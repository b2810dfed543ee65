"""The step of an evaluation that gives its model company: what simple methods, and the model without pretraining, reach."""

import logging
import shutil
from typing import Any

import numpy as np

from bmfm_pipeline.config import RunConfig
from bmfm_pipeline.evaluation.controls import chosen_for
from bmfm_pipeline.evaluation.controls.celltypist import check_celltypist, too_large
from bmfm_pipeline.evaluation.controls.choice import ALL, which_controls
from bmfm_pipeline.evaluation.controls.values import note_on_values, values_for_controls
from bmfm_pipeline.evaluation.predictions import LabelPredictions, read_predictions, write_control_predictions
from bmfm_pipeline.stages.controls_kept import Column, KeptControls
from bmfm_pipeline.stages.held_out import HeldOut, is_held_out_job
from bmfm_pipeline.stages.inputs import input_folder
from bmfm_pipeline.stages.jobs import Job
from bmfm_pipeline.stages.running import Progress
from bmfm_pipeline.storage import hash_file, read_json, write_json_atomic
from bmfm_pipeline.training.prepared import PreparedData

logger = logging.getLogger(__name__)
NOTES = "control_notes.json"


def controls(job: Job, on_progress: Progress) -> dict[str, Any]:
    """Simple methods on the same training rows and the same test cells, each computed once for all evaluations on this split."""
    run = RunConfig.model_validate(job.config)
    held = HeldOut.read(job, run) if is_held_out_job(job) else None
    prepared = PreparedData(input_folder(job, "data")) if held is None else held.both
    file = job.staging / "controls.json"
    columns = _columns(prepared, run) if run.predicts_labels else []
    if not columns:
        write_json_atomic(file, {})
        write_json_atomic(job.staging / NOTES, [])
        return {"uri": str(file), "hash": hash_file(file), "summary": {}}
    counts, kind = values_for_controls(prepared.store)
    notes = [] if kind in ("counts", "words") else [note_on_values(kind)]
    position = {name: row for row, name in enumerate(prepared.store.obs_names)}
    model = read_predictions(job.staging / "predictions.parquet")
    rows = np.array([position[cell] for cell in model.cells], dtype=np.int64)
    kept = KeptControls(job, run, prepared, counts, rows, columns, on_progress, kind)
    found: dict[str, dict[str, LabelPredictions]] = {}
    for column in columns:
        if not column.known(kept.cells.rows["train"]).any():
            logger.warning("controls: no training cell has a known %s, so there is nothing to fit them on", column.name)
            continue
        chosen, left = _chosen(run, column, kept) if held is None else _default_alone(run, column, kept)
        notes += left
        for control in chosen:
            found.setdefault(control, {}).update(kept.get(control, column))
    notes += kept.notes
    for note in notes:
        logger.warning("%s", note)
    write_json_atomic(job.staging / NOTES, notes)
    shutil.rmtree(job.run_dir / "controls", ignore_errors=True)  # empty: what was in it is published
    found = {control: found[control] for control in ALL if control in found}
    write_control_predictions(file, found)
    states = [row["state"] for row in kept.done if row["control"] != "embeddings"]
    summary = {"controls": ", ".join(found), "computed": states.count("computed"), "reused": states.count("reused")}
    return {"uri": str(file), "hash": hash_file(file), "summary": summary, "table": kept.done}


def notes_of_controls(job: Job) -> list[str]:
    """What the step had to say, for the notes of the evaluation."""
    file = job.staging / NOTES
    return read_json(file) if file.exists() else []


def _columns(prepared: PreparedData, run: RunConfig) -> list[Column]:
    values, columns = prepared.labels(run), []
    for column in run.label_columns:
        name = column.label_column_name
        known = {} if column.is_regression_label else prepared.label_dict[name]
        columns.append(Column(name, values[name], sorted(known, key=known.get)))
    return columns


def _default_alone(run: RunConfig, column: Column, kept: KeptControls) -> tuple[tuple[str, ...], list[str]]:
    """The same for other data than the model comes from: what needs no second pass over the training cells."""
    asked = run.evaluation.controls
    notes = []
    if asked not in ("auto", "default"):
        named = asked if isinstance(asked, str) else ", ".join(asked)
        notes.append(f"{column.name}: controls are the default ones on held-out data, not {named}")
    return which_controls("default", numbers=not column.class_names, sequences=kept.of_sequences), notes


def _chosen(run: RunConfig, column: Column, kept: KeptControls) -> tuple[tuple[str, ...], list[str]]:
    """(controls of a column, notes on what is left out of those that were asked for)."""
    several = len(column.targets) if column.values.ndim == 2 else 0
    asked, store = run.evaluation.controls, kept.prepared.store
    chosen, notes = chosen_for(
        column.name, asked, store.n_cells, numbers=not column.class_names, several=several, sequences=kept.of_sequences
    )
    if "celltypist" in chosen:
        check_celltypist()
        if why := too_large(len(kept.cells.rows["train"]), store.n_genes):
            chosen = tuple(name for name in chosen if name != "celltypist")
            notes.append(f"{column.name}: {why}")
    return chosen, notes
