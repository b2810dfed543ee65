"""The evaluate flow."""

from typing import Any

from prefect import flow

from flows.parameters import EvaluateParameters
from flows.running import readable_name, run_stage_flow


@flow(name="evaluate", flow_run_name=readable_name)
def evaluate(parameters: EvaluateParameters = EvaluateParameters()) -> Any:  # noqa: B008 - the form shows the defaults
    """Test a fine-tuned model: metrics with confidence intervals beside simple controls."""
    return run_stage_flow("evaluate", parameters)
