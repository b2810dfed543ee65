"""The preprocess flow."""

from typing import Annotated, Any

from prefect import flow

from flows.parameters import PreprocessParameters, shown_as
from flows.running import readable_name, run_stage_flow


@flow(name="preprocess", flow_run_name=readable_name)
def preprocess(
    parameters: Annotated[PreprocessParameters, shown_as("Preprocessing")] = PreprocessParameters(),  # noqa: B008 - defaults of the form
) -> Any:
    """Check, split and transform a dataset into an artefact that training reads."""
    return run_stage_flow("preprocess", parameters)
