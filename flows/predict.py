"""The predict flow: one task over one file, with its progress; a run that was stopped goes on where it was."""

from typing import Annotated, Any

from prefect import flow, runtime, task
from prefect.cache_policies import NO_CACHE
from prefect.states import Failed
from pydantic import Field

from bmfm_pipeline.errors import PipelineError
from flows import local
from flows.pages import artifact_key, label_run, show_links, show_table
from flows.prediction_parameters import PredictParameters
from flows.progress import ProgressPage
from flows.running import relayed_logs, run_context, short


def _name() -> str:
    parameters = runtime.flow_run.parameters.get("parameters")
    return "-".join(part for part in ("predict", short(getattr(parameters, "input", None))) if part)


@flow(name="predict", flow_run_name=_name)
def predict(
    parameters: Annotated[PredictParameters, Field(json_schema_extra={"title": "Prediction"})],
) -> Any:
    """Labels, probabilities and embeddings for the cells of an h5ad file."""
    with relayed_logs():
        try:
            found = _predict_cells(parameters, run_context({}))
        except PipelineError as error:
            return Failed(message=str(error), data=error)
    label_run("stage:predict")
    numbers = {"cells": found["cells"], "unusable": found["unusable"], **found["reasons"]}
    if found["genes"] is not None:
        numbers |= {"genes known": found["genes"]["known"], "genes": found["genes"]["genes"]}
    numbers |= {name: entry["value"] for name, entry in found.get("integration", {}).items()}
    rows = [{"name": name, "value": value} for name, value in numbers.items()]
    show_table(artifact_key("predict", "summary"), rows, f"predict: {short(parameters.input)}")
    show_links("predict", {file.rsplit("/", 1)[-1]: file for file in found["files"]})
    return found


@task(name="predict", cache_policy=NO_CACHE, persist_result=False, tags=["predict"])
def _predict_cells(parameters: PredictParameters, context: dict[str, str]) -> dict[str, Any]:
    from bmfm_pipeline.stages.predict import predict_file

    return predict_file(
        parameters.model,
        parameters.input,
        parameters.output,
        layer=parameters.layer,
        batch_size=parameters.batch_size,
        asked=parameters.asked(),
        windows=parameters.windows,
        workspace=parameters.workspace,
        context=context,
        on_progress=ProgressPage("predict", local.tell),
    )
