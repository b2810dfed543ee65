"""The pretrain flow."""

from typing import Annotated, Any

from prefect import flow

from flows.parameters import PretrainParameters, shown_as
from flows.running import readable_name, run_stage_flow


@flow(name="pretrain", flow_run_name=readable_name)
def pretrain(
    parameters: Annotated[PretrainParameters, shown_as("Pretraining")] = PretrainParameters(),  # noqa: B008 - defaults of the form
) -> Any:
    """Pretrain a model on the training cells of a dataset."""
    return run_stage_flow("pretrain", parameters)
