"""The table of a benchmark, made of the stored predictions of every cell's test."""

import shutil
from typing import Any

from bmfm_pipeline.errors import DataError
from bmfm_pipeline.evaluation.benchmark import CellScores, benchmark_of
from bmfm_pipeline.evaluation.pages.benchmark_page import (
    benchmark_csv,
    benchmark_html,
    benchmark_markdown,
    benchmark_rows,
)
from bmfm_pipeline.evaluation.study import PointScores
from bmfm_pipeline.stages.jobs import Job
from bmfm_pipeline.stages.publishing import publish_staged
from bmfm_pipeline.stages.running import Progress
from bmfm_pipeline.stages.study import read_point
from bmfm_pipeline.stages.tracked import finish_tracking, start_tracking
from bmfm_pipeline.storage import hash_file, load_artefact, read_json, write_json_atomic, write_text_atomic

FILES = ("benchmark.json", "benchmark.md", "benchmark.csv", "benchmark.html")


def summarise(job: Job, on_progress: Progress) -> dict[str, Any]:
    """benchmark.json, benchmark.md, benchmark.csv and benchmark.html from the stored predictions of every cell."""
    shutil.rmtree(job.staging, ignore_errors=True)
    job.staging.mkdir(parents=True)
    start_tracking(job)
    settings, tests, used = job.config, [], []
    for number, cell in enumerate(settings["cells"]):
        tested, how = _read(cell, job.inputs[cell["name"]]["uri"])
        tests.append(tested)
        used.append(how)
        on_progress({"kind": "progress", "stage": job.stage, "step": number + 1, "max_steps": len(settings["cells"])})
    if not tests:
        raise DataError(f"benchmark {job.name}: no cell has a test to put into a table")
    found = {
        "suite": settings["suite"],
        "title": settings["title"],
        **benchmark_of(
            tests,
            seeds_of=settings["seeds_of"],
            metrics=settings["metrics"],
            rank_by=settings["rank_by"],
            failed=settings["failed"],
            level=used[0]["level"],
            resamples=max(how["resamples"] for how in used),
            stratified=all(how["stratified"] for how in used),
        ),
        "cells": [{**cell, "evaluation": job.inputs[cell["name"]]["uri"]} for cell in settings["cells"]],
    }
    if settings["notes"]:
        found["notes"] = [settings["notes"], *found["notes"]]
    found["about"] = _about(job, found)
    write_json_atomic(job.staging / "benchmark.json", found)
    for name, write in (
        ("benchmark.md", benchmark_markdown),
        ("benchmark.csv", benchmark_csv),
        ("benchmark.html", benchmark_html),
    ):
        write_text_atomic(job.staging / name, write(found))
    file = job.staging / "benchmark.json"
    return {
        "uri": str(file),
        "hash": hash_file(file),
        "summary": {"sentences": found["sentences"]},
        "table": benchmark_rows(found),
    }


def _read(cell: dict[str, Any], uri: str) -> tuple[CellScores, dict[str, Any]]:
    """(what the evaluation of a cell found, how it made its intervals)."""
    artefact = load_artefact(uri)
    data = str(artefact.inputs.get("data", {}).get("id", ""))
    entry = {"name": cell["name"], "fraction": 1.0, "seed": cell["seed"]}
    if "predictions.parquet" in artefact.files:
        scores, how = read_point(entry, uri)
    else:  # scores of masked fields or of perturbations: their cells are not rows of one table
        model = load_artefact(artefact.inputs["model"]["uri"])
        n_train = int(model.summary.get("train_cells") or 0)
        rows = read_json(artefact.local_file("metrics.json"))
        scores = PointScores(**entry, n_train=n_train, rows=rows, truth={}, guesses={}, cells={})
        how = read_json(artefact.local_file("run_config.json"))["evaluation"]
    return CellScores(cell["dataset"], cell["model"], scores, data), how


def _about(job: Job, found: dict[str, Any]) -> dict[str, Any]:
    seeds = list(dict.fromkeys(cell["seed"] for cell in found["cells"]))
    return {
        "suite": job.name,
        "cells": f"{len(found['cells'])} tested, {len(found['failed'])} failed",
        "seeds": f"{', '.join(map(str, seeds))} (of {found['seeds_of']})",
        **{f"test of {cell['name']}": cell["evaluation"] for cell in found["cells"]},
        "key": job.key,
    }


def publish(job: Job, on_progress: Progress) -> dict[str, Any]:
    """Publish the table; the value of every model is a metric of its run in MLflow."""
    found = read_json(job.staging / "benchmark.json")
    summary = {"name": job.name, "cells": len(found["cells"]), "failed": len(found["failed"])}
    artefact = publish_staged(job, summary)
    metrics = {
        f"benchmark/{row['dataset']}/{row['target']}/{row['metric']}/{row['method']}": row["value"]
        for row in found["rows"]
        if row["is_model"]
    }
    links = finish_tracking(job, artefact, files=list(FILES), metrics=metrics)
    links["Benchmark"] = artefact.file("benchmark.html")
    return {"uri": artefact.uri, "hash": artefact.hash, "summary": artefact.summary, "links": links}
