"""Predict: labels, probabilities and embeddings for the cells of an h5ad file, with nothing but a model folder.

Gene mapping and the fitted normalisation travel with the model; row filters do not: every cell of the input has a row in the output,
and a cell that cannot be used has an empty label and a reason. What is computed is kept on disk as it comes (predicting/unfinished.py),
so that a run that was stopped goes on where it was.
"""

import logging
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bmfm_pipeline.config import RunConfig
from bmfm_pipeline.data.sources import check_genes, open_source
from bmfm_pipeline.data.sources.checks import check_names, where_counts_lie
from bmfm_pipeline.errors import ConfigError, DataError
from bmfm_pipeline.stages.conversion import readable
from bmfm_pipeline.stages.fitted_chain import OTHER_NAMES
from bmfm_pipeline.stages.gene_names import merges_genes
from bmfm_pipeline.stages.models import find_checkpoint
from bmfm_pipeline.stages.predicting.annotated import check_target, write_annotated
from bmfm_pipeline.stages.predicting.asked import Asked
from bmfm_pipeline.stages.predicting.chunks import EMBEDDINGS, ChunkPredictor
from bmfm_pipeline.stages.predicting.mapping import CellMap, check_batch_column
from bmfm_pipeline.stages.predicting.pace import Pace
from bmfm_pipeline.stages.predicting.poolings import named_poolings
from bmfm_pipeline.stages.predicting.predictor import Predictor
from bmfm_pipeline.stages.predicting.rows import Answers
from bmfm_pipeline.stages.predicting.sequences import SequenceChunks, SequenceInput, refuse_for_sequences
from bmfm_pipeline.stages.predicting.tables import blocks, count_unknown, table_names, write_tables
from bmfm_pipeline.stages.predicting.unfinished import PredictedCells
from bmfm_pipeline.stages.prediction_settings import settings_of_config
from bmfm_pipeline.stages.remote_output import written_to
from bmfm_pipeline.storage import (
    Workspace,
    check_allowed,
    code_version,
    content_hash,
    disk_errors,
    is_remote,
    join_uri,
    local_path,
    localise,
    strip_userinfo,
)
from bmfm_pipeline.tracking import EXPERIMENT, StageTracker, tracking_uri

_ASKED_BY = ("output_predictions", "output_embeddings")
Progress = Callable[[dict[str, Any]], None]
logger = logging.getLogger(__name__)
BY_DEFAULT = (
    "%s does not say how cells are prepared for it, so these settings are used: %s. Change one with data_module.KEY=VALUE, and compare "
    "predictions with known ones before relying on them"
)
TOO_LONG = "%d of %d sequences have more pieces than the model reads (%d with the special ones) and were cut there"
IN_WINDOWS = "%d of %d sequences have more pieces than the model reads (%d with the special ones) and were read in overlapping windows"
UNKNOWN_VALUES = "%d expression values were not among those of the training cells and were read as [UNK]"


def predict_file(
    model: str,
    file: str,
    output: str | Path,
    *,
    layer: str | None = None,
    batch_size: int | None = None,
    asked: Asked | None = None,
    settings: dict[str, Any] | None = None,
    insist: bool = True,
    windows: bool = False,
    workspace: str | None = None,
    context: dict[str, str] | None = None,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Write predictions (cell, each label, reason, each confidence), probabilities, logits and embeddings (no header) into `output`, a folder or s3://bucket/prefix.

    `model` is whatever names a checkpoint. The files appear when all cells are done; a run that fails leaves what was there
    before, and the same call again goes on where it stopped, while model, input and settings are the same. `settings` are keys of the data
    module for a model that carries none; for another they are refused, or left aside unless `insist`. `windows`: sequences that are longer
    than the model reads are read in overlapping windows and the answers averaged, not cut. `context` tags the MLflow run.
    Returns numbers for a person: cells, unusable cells by reason, genes known and unknown, cells per second, settings left to defaults,
    weights loaded, the files. Raises DataError, CheckpointError, ConfigError or StorageError.
    """
    if is_remote(output):
        again = {"layer": layer, "batch_size": batch_size, "asked": asked, "settings": settings, "insist": insist}
        again |= {"windows": windows, "workspace": workspace, "context": context, "on_progress": on_progress}
        return written_to(output, Workspace(workspace), lambda folder: predict_file(model, file, folder, **again))
    from bmfm_pipeline.models import load_model, model_folder
    from bmfm_pipeline.stages.planning import settled

    asked = asked or Asked()
    place = Workspace(workspace)
    check_allowed(file, "--input")
    named = find_checkpoint(model, place, None, stage="finetune")
    folder = model_folder(named.uri)
    predictor = Predictor.open(folder, settings, insist)
    if predictor.run.predicts_pairs:
        raise ConfigError(
            f"{model}: predicts what perturbations change, so say which: --perturb GENE, or --perturb GENE1,GENE2 for both at once; the cells "
            "of --input are the control cells"
        )
    answers = Answers(predictor, asked.unknown_below)
    poolings = named_poolings(asked.poolings or [predictor.pooling])
    if predictor.reads_sequences:
        refuse_for_sequences(layer, asked.annotated)
        local, genes, kind = localise(file), None, partial(SequenceChunks, windows=windows)
        source = SequenceInput.open(local, predictor.run.data_module.sequences)
    else:
        if windows:
            raise ConfigError(f"--windows: {model} reads cells; only sequences are read in windows. Leave it out")
        local, kind = readable(localise(file), place), ChunkPredictor
        source = open_source(local, layer, duplicates_rule(predictor))
        genes = check_input(source, predictor)
    check_batch_column(source, asked.batch_column)
    source.forget_tables()
    output = local_path(output)
    target = None if asked.annotated is None else output / asked.annotated
    for place_of_it in [output, *([target] if target else [])]:  # the state is where what goes to s3 is gathered
        check_allowed(place_of_it, "--output", also=(place.state_dir,))
    if target is not None:
        check_target(source, target)
    network = load_model(folder, source=strip_userinfo(named.uri))
    if predictor.defaults:
        logger.warning(BY_DEFAULT, model, "; ".join(predictor.defaults))
    run = settled(predictor.run)
    chunks = kind(predictor, source, network, run, batch_size, poolings)
    follows_from = {
        "model": named.id,
        "input": content_hash(local, place.memo),
        "layer": layer,
        "settings": settings,
        "pooling": list(poolings),
        "windows": windows,
        "batch size": chunks.batch_size,
        "precision": run.task.precision,
        "device": run.task.accelerator,
        "code": code_version(__name__),
    }
    tell = on_progress or (lambda event: None)
    with disk_errors(output, "--output"):
        output.mkdir(parents=True, exist_ok=True)
    with (
        StageTracker(
            tracking_uri(place.state_dir),
            EXPERIMENT,
            f"predict-{Path(file).stem}",
            tags={"bmfm.stage": "predict", "bmfm.model": str(model)} | (context or {}),
            state_dir=place.state_dir,
        ) as tracker,
        PredictedCells(output, follows_from, chunks.widths) as cells,
    ):
        summary = {"cells": source.n_cells, "resumed_at": cells.done}
        summary["cells_per_s"] = _predict(chunks, cells, tell, predictor.run.observed)
        reasons = cells.counts_by_reason()
        summary |= {"unusable": sum(reasons.values()), "reasons": reasons, "genes": genes}
        if too_long := getattr(chunks, "too_long", 0):
            summary["longer_than_the_model"] = too_long
            said = IN_WINDOWS if windows else TOO_LONG
            logger.warning(said, too_long, source.n_cells, run.data_module.evaluation_length)
            summary["in_windows"] = windows
        with disk_errors(output, "--output"):
            summary |= _write(output, target, source, cells, answers, asked, list(poolings), str(model), named.id)
        summary["unknown"] = count_unknown(cells, answers)
        summary["values_outside_vocabulary"] = cells.unknown_values
        summary["without_position"] = _without_position(cells, list(poolings))
        summary |= {"settings_by_default": list(predictor.defaults), "tensors_loaded": len(network.load_report.loaded)}
        if cells.unknown_values:
            logger.warning(UNKNOWN_VALUES, cells.unknown_values)
        tracker.log_params(
            {"input": str(file), "model": str(model), "model_hash": named.id, "output": str(output)}
            | ({"settings_by_default": "; ".join(predictor.defaults)} if predictor.defaults else {})
        )
        numbers = {"cells": source.n_cells, "unusable_cells": summary["unusable"]}
        if summary["cells_per_s"]:
            numbers["cells_per_s"] = summary["cells_per_s"]
        scores = {f"integration/{name}": entry["value"] for name, entry in summary.get("integration", {}).items()}
        tracker.log_metrics(numbers | {name: value for name, value in scores.items() if value is not None})
        cells.remove()
    return {"output": str(output), "model": str(model), **summary}


def _predict(chunks: ChunkPredictor, cells: PredictedCells, tell: Progress, observed: str) -> float | None:
    """Predict the cells that are not done yet; returns cells per second."""
    first, total = cells.done, chunks.source.n_cells
    if first:
        tell({"kind": "note", "message": f"{first} of {total} {observed} were predicted before; going on from there"})
    pace, began = Pace(total, tell, first, observed=observed), time.monotonic()
    for _, found in chunks.run_from(first, pace):
        with disk_errors(cells.folder, "--output"):
            cells.add(found.arrays, found.reasons, found.unknown_values)
        pace(cells.done)
    return (total - first) / max(time.monotonic() - began, 1e-9) if total > first else None


def _without_position(cells: PredictedCells, poolings: list[str]) -> dict[str, int]:
    """How many usable cells have no embedding, because they are shorter than the position that it is taken from."""
    missing = dict.fromkeys(poolings, 0)
    for where in blocks(cells.done):
        usable = cells.reason_codes()[where] == 0
        for name in poolings:
            missing[name] += int(np.isnan(cells.rows(EMBEDDINGS + name)[where]).any(axis=1)[usable].sum())
    found = {name: count for name, count in missing.items() if count}
    for name, count in found.items():
        logger.warning("%s: %d cells are shorter than that; their embedding is nan", name, count)
    return found


def _write(output, target, source, cells, answers, asked: Asked, poolings: list[str], model: str, model_id: str):
    """All files, each appearing whole when all are written. Returns what is new in the summary."""
    names = source.obs_names
    wanted = [
        name
        for name in table_names(poolings)
        if asked.tables is None or name in asked.tables or name.split("_")[0] in asked.tables
    ]
    summary: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="files-", dir=cells.folder) as folder:
        folder = Path(folder)
        write_tables(folder, asked.format, wanted, cells, lambda start, stop: names[start:stop], answers, poolings)
        mapped = CellMap(source, cells, answers, poolings[0], asked.seed)
        layout = None
        if asked.umap:
            layout = mapped.layout()
            mapped.write(folder / f"umap.{asked.format}", layout, names)
        if asked.batch_column:
            summary["integration"], summary["integration_notes"] = mapped.integration(asked.batch_column)
            mapped.write_scores(folder / "integration.json", summary["integration"], summary["integration_notes"])
        if target is not None:
            about = {"model": model, "model_hash": model_id, "pooling": ", ".join(poolings)}
            write_annotated(source, target, cells, answers, poolings, about, layout)
        made = sorted(path.name for path in folder.iterdir())
        for name in made:
            os.replace(folder / name, output / name)
    summary["files"] = [str(output / name) for name in made] + ([str(target)] if target else [])
    return summary


def duplicates_rule(predictor: Predictor) -> str:
    return predictor.run.data_module.transform_kwargs.duplicate_genes


def check_input(source, predictor: Predictor) -> dict[str, Any]:
    """Refuse an input that would give numbers without meaning; returns how many genes the model knows."""
    problems: list[str] = []
    if 0 in source.shape:
        raise DataError(f"{source.path}: {source.where} is empty: {source.n_cells} cells x {source.n_genes} genes")
    check_names(source, "sum" if merges_genes(predictor.chain) else duplicates_rule(predictor), problems)
    if predictor.chain.needs_counts:
        chunk = source.first_rows(1000)
        finite = chunk.data[np.isfinite(chunk.data)]
        off = finite[finite != np.rint(finite)]
        if len(off):
            problems.append(
                f"{source.where}: holds values that are not whole numbers, e.g. {float(off[0]):.4g}; the model was made from counts"
                f"{where_counts_lie(source).replace('set data_module.transform_kwargs.layer=', 'name it with --layer ')}"
            )
    if problems:
        raise DataError(f"{source.path} cannot be used:\n" + "\n".join(f"- {problem}" for problem in problems))
    names, vocabulary = predictor.chain.gene_names(source.var_names), predictor.vocabularies["genes"]
    own = vocabulary.tokens[vocabulary.n_special :]
    # A model of few genes finds them all in a file of many.
    floor = {"min_share": 0.0} if 2 * len(set(own) & set(names)) >= len(own) else {}
    return check_genes(names, vocabulary.tokens, "the model", cure=OTHER_NAMES, **floor)


def predict_with_config(run: RunConfig, workspace: str | None, on_progress: Progress | None = None) -> dict[str, Any]:
    """Predict as a config with a predict task says: task.checkpoint, source_h5ad_file_name, task.default_root_dir.

    Raises ConfigError naming what the config leaves out.
    """
    from bmfm_pipeline.stages.inputs import find_source

    if not run.task.checkpoint:
        raise ConfigError("predict: task.checkpoint must name a model artefact or folder")
    source = find_source(run)
    if source.files:
        raise ConfigError(
            f"predict: data_module.transform_kwargs.source_h5ad_file_name must name one file, and {source.place} are named; predict one "
            "file after another, each into a folder of its own"
        )
    tables = [name for name in table_names(["any"]) if getattr(run.task, _ASKED_BY[name == "embeddings"])]
    if not tables:
        raise ConfigError(
            "predict: task.output_predictions and task.output_embeddings are both false, so nothing would be written"
        )
    output = run.task.default_root_dir or join_uri(Workspace(workspace).uri, "predictions")
    said = "pooling_method" in run.trainer.model_fields_set
    poolings = [run.trainer.pooling_method] if said else []
    return predict_file(
        run.task.checkpoint, source.uri, output, workspace=workspace, on_progress=on_progress,
        layer=run.data_module.transform_kwargs.layer, batch_size=run.data_module.batch_size,
        settings=settings_of_config(run), insist=False,
        asked=Asked(poolings=poolings, tables=tables, seed=run.seed.seed_value),
    )  # fmt: skip
