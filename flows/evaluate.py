"""The evaluate flow."""

from typing import Annotated, Any

from prefect import flow

from flows.parameters import EvaluateParameters, shown_as
from flows.running import readable_name, run_stage_flow


@flow(name="evaluate", flow_run_name=readable_name)
def evaluate(
    parameters: Annotated[EvaluateParameters, shown_as("Evaluation")] = EvaluateParameters(),  # noqa: B008 - defaults of the form
) -> Any:
    """Test a fine-tuned model: metrics with confidence intervals beside simple controls."""
    return run_stage_flow("evaluate", parameters)
