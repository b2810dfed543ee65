"""The end of a run in a person's words, and as the JSON object that programs read."""

import os
from typing import Any

from bmfm_pipeline.storage import Artefact, Workspace, load_artefact, read_json
from bmfm_pipeline.tracking import is_http


def outcome(workspace: Workspace, stages: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """{"model", "artefacts", "metrics"} of finished stages, given {stage: result with its uri}."""
    artefacts = {stage: result["uri"] for stage, result in stages.items()}
    model = artefacts.get("finetune") or artefacts.get("pretrain")
    if "evaluate" in artefacts and model is None:
        model = load_artefact(artefacts["evaluate"]).inputs.get("model", {}).get("uri")
    metrics = []
    if "evaluate" in artefacts:
        metrics = _file_of(load_artefact(artefacts["evaluate"]), "metrics.json")
    return {"model": model, "artefacts": artefacts, "metrics": metrics, "workspace": workspace.uri}


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
    if found["model"]:
        lines.append(f"model       {found['model']}")
    else:
        lines += [f"{stage:<11} {uri}" for stage, uri in found["artefacts"].items()]
    return "\n".join(lines)


def where_to_look(workspace: Workspace) -> str:
    """How to open the pages of Prefect and MLflow on what this run left."""
    chosen = os.environ.get("MLFLOW_TRACKING_URI", "")
    option = "" if os.environ.get("BMFM_WORKSPACE", "workspace") == "workspace" else f" --workspace {workspace.uri}"
    lines = [f"pages       bmfm ui{option}    (Prefect at http://127.0.0.1:4200, MLflow at http://127.0.0.1:5000)"]
    if is_http(chosen):
        lines.append(f"MLflow      {chosen}")
    return "\n".join(lines)
