"""The end of a run in a person's words, and as the JSON object that programs read."""

import os
from typing import Any

from bmfm_pipeline.storage import Artefact, Workspace, load_artefact, read_json, strip_userinfo
from bmfm_pipeline.tracking import is_http

MOST_FILES = 5


def outcome(workspace: Workspace, stages: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """{"model", "artefacts", "metrics"} of finished stages, given {stage: result with its uri}."""
    artefacts = {stage: result["uri"] for stage, result in stages.items()}
    model = artefacts.get("finetune") or artefacts.get("pretrain")
    for stage in ("evaluate", "interpret"):
        if stage in artefacts and model is None:
            model = load_artefact(artefacts[stage]).inputs.get("model", {}).get("uri")
    metrics, report = [], None
    if "evaluate" in artefacts:
        artefact = load_artefact(artefacts["evaluate"])
        metrics, report = _file_of(artefact, "metrics.json"), artefact.file("report.html")
    return {
        "model": model,
        "artefacts": artefacts,
        "metrics": metrics,
        "report": report,
        "workspace": workspace.uri,
    }


def _file_of(artefact: Artefact, name: str) -> Any:
    return read_json(artefact.local_file(name))


def describe(found: dict[str, Any]) -> str:
    """The table of the model beside its controls, the verdict, and where everything lies."""
    lines: list[str] = []
    evaluated = found["artefacts"].get("evaluate")
    if evaluated:
        from bmfm_pipeline.evaluation.tables import text_table

        artefact = load_artefact(evaluated)
        lines += ["", text_table(found["metrics"]), ""]
        lines += _file_of(artefact, "evaluation.json")["verdicts"]
        lines += ["", f"report      {artefact.file('report.html')}"]
        if found.get("pipeline_report"):
            lines.append(f"whole run   {found['pipeline_report']}")
    lines += _files_left_out(found["artefacts"].get("preprocess"))
    if "interpret" in found["artefacts"]:
        lines += _interpretation(load_artefact(found["artefacts"]["interpret"]))
    if found.get("study"):
        from bmfm_pipeline.evaluation.study_words import study_text

        artefact = load_artefact(found["study"]["uri"])
        study = _file_of(artefact, "study.json")
        lines += [
            "",
            study_text(study),
            "",
            *study["verdicts"],
            *study["findings"],
            "",
            f"study       {artefact.file('study.html')}",
        ]
    if found["model"]:
        lines.append(f"model       {found['model']}")
    else:
        lines += [f"{stage:<11} {uri}" for stage, uri in found["artefacts"].items()]
    return "\n".join(lines)


def _files_left_out(uri: str | None) -> list[str]:
    """Files of a dataset of many that could not be used, with the reason; the others are said while they are read."""
    artefact = load_artefact(uri) if uri else None
    if artefact is None or not artefact.summary.get("files_set_aside"):
        return []
    aside = _file_of(artefact, "report.json")["files"]["set_aside"]
    total = len(aside) + artefact.summary["files"]
    lines = ["", f"{len(aside)} of {total} files could not be used, and their cells are left out:"]
    lines += [f"  {entry['file']}: {entry['reason']}" for entry in aside[:MOST_FILES]]
    if len(aside) > MOST_FILES:
        lines.append(f"  and {len(aside) - MOST_FILES} more, in {artefact.file('report.json')}")
    return lines


def _interpretation(artefact: Artefact) -> list[str]:
    """The top genes of every class and how far they can be believed."""
    found = _file_of(artefact, "interpretation.json")
    lines = [""]
    for label, entry in found["labels"].items():
        names = {id(one): one["class"] if one["class"] is not None else label for one in entry["classes"]}
        width = max(map(len, names.values()), default=0)
        for one in entry["classes"]:
            genes = ", ".join(row["gene"] for row in one["top"][:8])
            lines.append(f"{names[id(one)]:<{width}}  {one['n_cells']:>5} {found.get('of', 'cells')}  {genes}")
    return [*lines, "", *found["sentences"], "", f"report      {artefact.file('interpret.html')}"]


def where_to_look(workspace: Workspace) -> str:
    """How to open the pages of Prefect and MLflow on what this run left."""
    chosen = os.environ.get("MLFLOW_TRACKING_URI", "")
    option = "" if os.environ.get("BMFM_WORKSPACE", "workspace") == "workspace" else f" --workspace {workspace.uri}"
    lines = [f"pages       bmfm ui{option}    (Prefect at http://127.0.0.1:4200, MLflow at http://127.0.0.1:5000)"]
    if is_http(chosen):
        lines.append(f"MLflow      {strip_userinfo(chosen)}")
    return "\n".join(lines)
