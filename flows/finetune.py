"""The finetune flow."""

from typing import Any

from prefect import flow

from flows.parameters import FinetuneParameters
from flows.running import readable_name, run_stage_flow


@flow(name="finetune", flow_run_name=readable_name)
def finetune(parameters: FinetuneParameters = FinetuneParameters()) -> Any:  # noqa: B008 - the form shows the defaults
    """Fine-tune a model on the labels of a dataset."""
    return run_stage_flow("finetune", parameters)
