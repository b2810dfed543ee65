"""A study: the tests of several trainings read together, as a curve over shares of the training cells, a spread over seeds, or both."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from bmfm_pipeline.evaluation.groups import read_groups
from bmfm_pipeline.evaluation.pages.study_page import study_drawings, study_markdown, study_page
from bmfm_pipeline.evaluation.predictions import read_control_predictions, read_predictions
from bmfm_pipeline.evaluation.study import PointScores, study_of
from bmfm_pipeline.evaluation.study_words import differences_of
from bmfm_pipeline.evaluation.tables import LABELS
from bmfm_pipeline.stages.jobs import Job
from bmfm_pipeline.stages.publishing import publish_staged
from bmfm_pipeline.stages.running import Progress
from bmfm_pipeline.stages.tracked import finish_tracking, log_curve, start_tracking
from bmfm_pipeline.storage import hash_file, load_artefact, read_json, write_json_atomic, write_text_atomic

KINDS = {
    "few_shot": "share of the training cells",
    "seeds": "spread over seeds",
    "few_shot_and_seeds": "share of the training cells, and spread over seeds",
    "single": "one training",
}


def summarise(job: Job, on_progress: Progress) -> dict[str, Any]:
    """study.json, study.md and study.html from the stored predictions of every point."""
    shutil.rmtree(job.staging, ignore_errors=True)
    job.staging.mkdir(parents=True)
    start_tracking(job)
    points, evaluation = [], {}
    for number, entry in enumerate(job.config["points"]):
        point, evaluation = read_point(entry, job.inputs[entry["name"]]["uri"])
        points.append(point)
        on_progress({"kind": "progress", "stage": "study", "step": number + 1, "max_steps": len(job.config["points"])})
    study = study_of(
        points,
        seeds_of=job.config["seeds_of"],
        missing=job.config["missing"],
        level=evaluation["level"],
        resamples=evaluation["resamples"],
        stratified=evaluation["stratified"],
    )
    study = {"dataset": job.name, **study}
    title = f"{job.name}: {KINDS[study['kind']]}"
    about = _about(job, study)
    write_json_atomic(job.staging / "study.json", study)
    write_text_atomic(job.staging / "study.html", study_page(study, title, LABELS, about))
    write_text_atomic(job.staging / "study.md", study_markdown(study, title, LABELS, about))
    _write_figures(job.staging / "figures", study)
    file = job.staging / "study.json"
    return {
        "uri": str(file),
        "hash": hash_file(file),
        "summary": {"verdicts": study["verdicts"]},
        "table": _table(study),
    }


def read_point(entry: dict[str, Any], uri: str) -> tuple[PointScores, dict[str, Any]]:
    """(what the evaluation at `uri` found, how it made its intervals)."""
    artefact = load_artefact(uri)
    folder = artefact.local()
    predictions = read_predictions(folder / "predictions.parquet")
    controls = read_control_predictions(folder / "controls.json", predictions)
    cells = np.array(predictions.cells, dtype=object)
    _, groups = read_groups(folder)
    truth, guesses, names, of_target = {}, {}, {}, {}
    for target, label in predictions.labels.items():
        known = label.known
        if not known.any():
            continue
        truth[target], names[target] = label.truth[known], cells[known].tolist()
        of_target[target] = None if groups is None else np.asarray(groups)[known]
        others = {name: labels[target].predicted[known] for name, labels in controls.items() if target in labels}
        guesses[target] = {"model": label.predicted[known], **others}
    model = load_artefact(artefact.inputs["model"]["uri"])
    facts = {
        "evaluation": uri,
        "model": model.uri,
        "steps": model.summary.get("steps"),
        "best_step": model.summary.get("best_step"),
        "dev_cells": model.summary.get("dev_cells"),
        "test_cells": len(cells),
    }
    point = PointScores(
        name=entry["name"],
        fraction=entry["fraction"],
        seed=entry["seed"],
        n_train=int(model.summary["train_cells"]),
        rows=read_json(folder / "metrics.json"),
        truth=truth,
        guesses=guesses,
        cells=names,
        groups=of_target,
        facts=facts,
    )
    return point, read_json(folder / "run_config.json")["evaluation"]


def _about(job: Job, study: dict[str, Any]) -> dict[str, Any]:
    seeds = list(dict.fromkeys(point["seed"] for point in study["points"]))
    return {
        "dataset": job.name,
        "points": f"{len(study['points'])}: " + ", ".join(point["name"] for point in study["points"]),
        "seeds": f"{', '.join(map(str, seeds))} (of {study['seeds_of']})",
        **{f"test at {point['name']}": point["evaluation"] for point in study["points"]},
        "key": job.key,
    }


def _write_figures(folder: Path, study: dict[str, Any]) -> None:
    folder.mkdir()
    targets = dict.fromkeys(row["target"] for row in study["differences"])
    for target in list(targets)[:1]:
        for number, drawing in enumerate(study_drawings(study, target, LABELS)):
            (folder / f"study-{number + 1}.svg").write_text(drawing.svg(alone=True), encoding="utf-8")


def _table(study: dict[str, Any]) -> list[dict[str, Any]]:
    """The model's means for the page of the run."""
    shown = ("accuracy", "f1", "mse", "pcc")
    return [
        {
            name: row[name]
            for name in ("target", "metric", "fraction", "n_train", "mean", "sd", "ci_low", "ci_high", "n_seeds")
        }
        for row in study["summary"]
        if row["model"] == "model" and row["metric"] in shown
    ]


def curve_metrics(study: dict[str, Any]) -> list[tuple[int, dict[str, float]]]:
    """[(percent of the training cells, {name: value})] of the model and its difference from the control, for a tracker's curves."""
    found: dict[int, dict[str, float]] = {}
    for row in _table(study):
        step = round(100 * row["fraction"])
        found.setdefault(step, {})[f"study/{row['target']}/{row['metric']}"] = row["mean"]
        if row["sd"] is not None:
            found[step][f"study/{row['target']}/{row['metric']}_sd"] = row["sd"]
        for difference in differences_of(study, row["target"], row["metric"]):
            if difference["fraction"] == row["fraction"]:
                name = f"study/{row['target']}/{row['metric']}_minus_{difference['control']}"
                found[step][name] = difference["value"]
    return sorted(found.items())


def publish(job: Job, on_progress: Progress) -> dict[str, Any]:
    """Publish the study, its curve as metrics by share."""
    study = read_json(job.staging / "study.json")
    artefact = publish_staged(job, {"name": job.name, "kind": study["kind"], "points": len(study["points"])})
    log_curve(job, curve_metrics(study))
    links = finish_tracking(job, artefact, files=["study.json", "study.html", "study.md"])
    links["Study"] = artefact.file("study.html")
    return {"uri": artefact.uri, "hash": artefact.hash, "summary": artefact.summary, "links": links}
