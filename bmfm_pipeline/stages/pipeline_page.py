"""One page for a whole run, made of what its stages published: an artefact of its own, so that a run again finds it."""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bmfm_pipeline.evaluation.pages import sections
from bmfm_pipeline.evaluation.pages.charts import MOST_TARGETS_WITH_CHARTS, curves, forests
from bmfm_pipeline.evaluation.pages.numbers import duration, size, with_interval
from bmfm_pipeline.evaluation.pages.rendering import TEMPLATES, render
from bmfm_pipeline.evaluation.wording import verdict_kind
from bmfm_pipeline.storage import (
    Artefact,
    Workspace,
    exclusive,
    find_artefact,
    hash_bytes,
    hash_json,
    load_artefact,
    publish,
    read_json,
)
from bmfm_pipeline.storage import code_version as version_of

logger = logging.getLogger(__name__)
STAGE, PAGE = "pipeline", "pipeline_report.html"
MODULE = "bmfm_pipeline.stages.pipeline_page"
KEY_LENGTH = 32
SHOWN_OF_A_KEY = 12
HEADLINE, MOST_HEADLINES = ("accuracy", "f1", "mse", "pcc"), 4


def pipeline_page(place: Workspace, results: Mapping[str, Mapping[str, Any]], study: str | None = None) -> str | None:
    """The address of the page about finished stages, {name: result with its "uri" and whether it was "cached"}, in their order.

    `study` is the address of the study that the stages are part of: the page leads to its own. A page about the same artefacts is found again. None, and a warning, where it cannot be made: the stages are done without it.
    """
    try:
        return _find_or_make(place, results, study).file(PAGE)
    except Exception as error:
        logger.warning("the page about the whole run could not be made (%s: %s)", type(error).__name__, error)
        return None


def _find_or_make(place: Workspace, results: Mapping[str, Mapping[str, Any]], study: str | None) -> Artefact:
    parts = {name: load_artefact(result["uri"]) for name, result in results.items()}
    around = {"study": load_artefact(study)} if study else {}
    templates = {file.name: hash_bytes(file.read_bytes()) for file in sorted(TEMPLATES.iterdir())}
    code = hash_json({"code": version_of(MODULE), "templates": templates})
    ids = {name: [part.key, part.hash] for name, part in {**parts, **around}.items()}
    key = hash_json({"stages": ids, "code": code})
    key = key[:KEY_LENGTH]
    found = find_artefact(place, STAGE, key)
    if found is not None:
        return found
    with exclusive(place.run_dir(key)):
        staging = place.run_dir(key) / "artefact"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        reused = {name: bool(result.get("cached")) for name, result in results.items()}
        (staging / PAGE).write_text(render_pipeline(parts, reused, around.get("study")), encoding="utf-8")
        name = next((part.summary["name"] for part in parts.values() if part.summary.get("name")), "run")
        artefact = publish(
            staging,
            place,
            STAGE,
            key,
            inputs={
                name: {"id": part.key, "uri": part.uri, "stage": part.stage}
                for name, part in {**parts, **around}.items()
            },
            config={},
            code_version=code,
            summary={"name": name},
        )
    shutil.rmtree(place.run_dir(key), ignore_errors=True)
    return artefact


def render_pipeline(parts: Mapping[str, Artefact], reused: Mapping[str, bool], study: Artefact | None = None) -> str:
    """The page about published stages by name; `reused` tells which of them were there before the run, `study` what they are part of."""
    from bmfm_pipeline.evaluation.tables import LABELS

    costs = {
        name: {**part.cost, "detail": sections.training_detail(part.summary)}
        for name, part in parts.items()
        if part.cost
    }
    evaluations = {name: part for name, part in parts.items() if part.stage == "evaluate"}
    found = {name: _json(part, "evaluation.json") for name, part in evaluations.items()}
    verdicts = [{"text": text, "kind": verdict_kind(text)} for entry in found.values() for text in entry["verdicts"]]
    tables = []
    for entry in found.values():
        for table in sections.metric_tables(entry["rows"], LABELS):
            drawn = len({row["target"] for row in entry["rows"]}) <= MOST_TARGETS_WITH_CHARTS
            tables.append({**table, "forests": forests(table["target"], entry["rows"], LABELS) if drawn else []})
    prepared = next((_json(part, "report.json") for part in parts.values() if part.stage == "preprocess"), {})
    return render(
        "pipeline.html",
        title=f"{_name(parts)}: the whole run",
        verdicts=verdicts,
        level=next((f"{100 * entry['level']:g}" for entry in found.values()), "95"),
        notes=[note for entry in found.values() for note in entry["notes"]],
        chain=[_step(name, part, reused.get(name, False)) for name, part in parts.items()],
        tables=tables,
        steps=prepared.get("steps") or [],
        genes=sections.gene_section(prepared.get("gene_names")),
        trainings=[
            {"name": name, "drawings": curves(_file(part, "history.jsonl")), "facts": _training(part)}
            for name, part in parts.items()
            if part.stage in ("pretrain", "finetune")
        ],
        reports=[_page_of(part, "report.html") for part in evaluations.values()],
        study=_page_of(study, "study.html") | _points(study) if study else None,
        costs=sections.cost_rows(costs),
        totals=sections.cost_totals(costs),
        machines=_machines(costs),
    )


def _page_of(part: Artefact, file: str) -> dict[str, Any]:
    """Where the page of an artefact lies, and how this page, two folders deep in the same workspace, leads there."""
    return {"uri": part.file(file), "link": f"../../{part.stage}/{part.key}/{file}"}


def _points(study: Artefact) -> dict[str, Any]:
    """The points of a study with the pages of their evaluations, and what the study says."""
    found = _json(study, "study.json") or {}
    points = [
        {"name": name, **_page_of(load_artefact(entry["uri"]), "report.html")} for name, entry in study.inputs.items()
    ]
    return {"points": points, "verdicts": found.get("verdicts", [])}


def _name(parts: Mapping[str, Artefact]) -> str:
    return next((str(part.summary["name"]) for part in parts.values() if part.summary.get("name")), "run")


def _json(part: Artefact, name: str) -> Any:
    return read_json(part.local_file(name)) if name in part.files else {}


def _file(part: Artefact, name: str) -> Path | None:
    return part.local_file(name) if name in part.files else None


def _step(name: str, part: Artefact, reused: bool) -> dict[str, Any]:
    totals = sections.cost_totals({name: part.cost})
    return {
        "name": name,
        "state": "taken from an earlier run" if reused else "made in this run",
        "reused": reused,
        "made": part.created.replace("T", " ").replace("+00:00", " UTC"),
        "key": part.key[:SHOWN_OF_A_KEY],
        "hash": part.hash[:SHOWN_OF_A_KEY],
        "uri": part.uri,
        "inputs": {role: str(entry.get("id", ""))[:SHOWN_OF_A_KEY] for role, entry in part.inputs.items()},
        "time": duration(totals["seconds"]) if part.cost else "",
        "memory": size(totals["peak_bytes"]) if part.cost else "",
        "numbers": _numbers(part),
    }


def _numbers(part: Artefact) -> list[str]:
    """What a stage made, in a few words."""
    summary = part.summary
    if part.stage == "preprocess":
        words = [f"{summary[key]:,} {key}" for key in ("cells", "genes") if key in summary]
        return [*words, ", ".join(f"{key} {summary[key]:,}" for key in ("train", "dev", "test") if key in summary)]
    if part.stage in ("pretrain", "finetune"):
        parameters = f"{summary['parameters']:,} parameters" if summary.get("parameters") else ""
        loss = summary.get("best_validation_loss")
        return [parameters, sections.training_detail(summary), "" if loss is None else f"validation loss {loss:.4g}"]
    rows = [row for row in _json(part, "metrics.json") or [] if row["model"] == "model" and row["metric"] in HEADLINE]
    return [f"{row['target']}: {row['metric']} {with_interval(row)}" for row in rows[:MOST_HEADLINES]]


def _training(part: Artefact) -> dict[str, Any]:
    summary = part.summary
    start = part.inputs.get("checkpoint")
    facts = {
        "started from": f"{start.get('stage') or 'model'} {str(start['id'])[:SHOWN_OF_A_KEY]}"
        if start
        else "nothing (from scratch)",
        "parameters": f"{summary['parameters']:,}" if summary.get("parameters") else None,
        "training": sections.training_detail(summary),
        "epochs": summary.get("epochs"),
        "precision": summary.get("precision"),
        "preset": summary.get("preset"),
        "batch size": summary.get("batch_size"),
        "weights taken over": summary.get("weights_loaded"),
    }
    return {name: value for name, value in facts.items() if value not in (None, "")}


def _machines(costs: Mapping[str, dict[str, Any]]) -> dict[str, str]:
    """Where the stages ran and with which versions: once where all say the same."""
    said: dict[str, list[str]] = {}
    for name, cost in costs.items():
        place, versions = cost.get("machine") or {}, cost.get("versions") or {}
        words = f"{place.get('processor')}, {place.get('cores')} cores, {size(place.get('memory_bytes'))}, {place.get('system')}; " + ", ".join(f"{library} {number}" for library, number in versions.items())  # fmt: skip
        said.setdefault(words, []).append(name)
    return {", ".join(names): words for words, names in said.items()}
