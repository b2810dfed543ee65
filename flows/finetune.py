"""The finetune flow."""

from typing import Annotated, Any

from prefect import flow

from flows.parameters import FinetuneParameters, shown_as
from flows.running import readable_name, run_stage_flow


@flow(name="finetune", flow_run_name=readable_name)
def finetune(
    parameters: Annotated[FinetuneParameters, shown_as("Fine-tuning")] = FinetuneParameters(),  # noqa: B008 - defaults of the form
) -> Any:
    """Fine-tune a model on the labels of a dataset."""
    return run_stage_flow("finetune", parameters)
