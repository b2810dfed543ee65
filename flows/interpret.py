"""The interpret flow."""

from typing import Annotated, Any

from prefect import flow

from flows.parameters import InterpretParameters, shown_as
from flows.running import readable_name, run_stage_flow


@flow(name="interpret", flow_run_name=readable_name)
def interpret(
    parameters: Annotated[InterpretParameters, shown_as("Attributions")] = InterpretParameters(),  # noqa: B008 - defaults of the form
) -> Any:
    """Which genes a fine-tuned model's predictions come from, with intervals over cells and a null by permutation."""
    return run_stage_flow("interpret", parameters)
