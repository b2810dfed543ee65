"""The pretrain flow."""

from typing import Any

from prefect import flow

from flows.parameters import PretrainParameters
from flows.running import readable_name, run_stage_flow


@flow(name="pretrain", flow_run_name=readable_name)
def pretrain(parameters: PretrainParameters = PretrainParameters()) -> Any:  # noqa: B008 - the form shows the defaults
    """Pretrain a model on the training cells of a dataset."""
    return run_stage_flow("pretrain", parameters)
