"""The preprocess flow."""

from typing import Any

from prefect import flow

from flows.parameters import PreprocessParameters
from flows.running import readable_name, run_stage_flow


@flow(name="preprocess", flow_run_name=readable_name)
def preprocess(parameters: PreprocessParameters = PreprocessParameters()) -> Any:  # noqa: B008 - the form shows the defaults
    """Check, split and transform a dataset into an artefact that training reads."""
    return run_stage_flow("preprocess", parameters)
