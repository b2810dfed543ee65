"""Fully sharded training (task.strategy=fsdp): each GPU holds a part of weights, gradients and optimiser state.

Layers are sharded one by one, what is around them together. Checkpoints are gathered into the same plain file that other
strategies write, so that they can be resumed and evaluated on any number of devices.
"""

from typing import Any

from torch import Tensor, nn


def sharding_strategy(processes: int) -> Any:
    """The Lightning strategy that shards over all processes of this machine."""
    from pytorch_lightning.strategies import ModelParallelStrategy

    return ModelParallelStrategy(processes, 1, save_distributed_checkpoint=False)


def shard_layers(model: nn.Module, mesh) -> None:
    """Shard a model in place over the processes of `mesh`; nothing happens where that was done before."""
    from torch.distributed.fsdp import FSDPModule, fully_shard

    if isinstance(model, FSDPModule):
        return
    layers = getattr(model, "_no_split_modules", None) or ()
    for layer in [module for module in model.modules() if type(module).__name__ in layers]:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def whole(value: Tensor) -> Tensor:
    """A tensor that may be shared out over processes, as one."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value
