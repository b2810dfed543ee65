"""The step `embedding_map` of the evaluate stage: test cells on a map, from embeddings that the step `predict` stored."""

from typing import Any

from bmfm_pipeline.config import RunConfig
from bmfm_pipeline.evaluation.confidences import read_confidences
from bmfm_pipeline.evaluation.embedding_map import FILE, batches_of_cells
from bmfm_pipeline.evaluation.embedding_map import embedding_map as map_of
from bmfm_pipeline.evaluation.predictions import read_embeddings, read_predictions
from bmfm_pipeline.stages.inputs import input_folder
from bmfm_pipeline.stages.jobs import Job
from bmfm_pipeline.stages.running import Progress
from bmfm_pipeline.storage import hash_file, write_json_atomic
from bmfm_pipeline.training.prepared import PreparedData


def embedding_map(job: Job, on_progress: Progress) -> dict[str, Any]:
    """Test cells on a map of their embeddings, and how well they mix batches where a batch column is named."""
    run, stored = RunConfig.model_validate(job.config), read_embeddings(job.staging, "test")
    found = None
    if stored is not None:
        embeddings, rows = stored
        column, batches = run.evaluation.batch_column, None
        if column is not None:
            batches = batches_of_cells(PreparedData(input_folder(job, "data")).store, column, rows)
        predictions = read_predictions(job.staging / "predictions.parquet")
        found = map_of(embeddings, predictions, read_confidences(job.staging), batches, run.seed.seed_value)
    if found is None:  # no labels are predicted, or of hardly any cell
        return {"uri": str(job.staging), "hash": "", "summary": {"cells": 0}}
    file = job.staging / FILE
    write_json_atomic(file, found)
    summary = {"cells": len(found["cells"])}
    summary |= {name: entry["value"] for name, entry in found["integration"].items()}
    return {"uri": str(file), "hash": hash_file(file), "summary": summary}
