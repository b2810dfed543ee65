"""What the optimiser is given: groups of parameters by weight decay and learning rate, and the course of the rate over the steps."""

import math
import re
from collections.abc import Callable
from typing import Any

from torch import nn

from bmfm_pipeline.config import TrainerConfig
from bmfm_pipeline.errors import ConfigError

_LAYER = re.compile(r"\.(?:layer|layers|blocks)\.(\d+)\.")
# What comes before the first layer.
_INPUT = re.compile(r"\.(?:embeddings|aux_\w+)\b")


def decay_groups(
    model: nn.Module, weight_decay: float, learning_rate: float | None = None, layerwise_lr_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Groups of trained parameters for an optimiser: weights of Linear layers decay; biases, norms, embeddings and all else do not.

    With `learning_rate` every group has a `lr`: that of `layer_heights` steps below the heads is multiplied by `layerwise_lr_decay`
    as often. The group with the highest rate comes first.
    """
    modules = list(model.modules())
    embedded = {id(module.weight) for module in modules if isinstance(module, nn.Embedding)}
    linear = {id(module.weight) for module in modules if isinstance(module, nn.Linear)} - embedded
    heights = layer_heights(model) if layerwise_lr_decay != 1.0 else {}
    top = max(heights.values(), default=0)
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        below, decays = top - heights.get(name, top), id(parameter) in linear
        group = groups.setdefault((below, decays), {"params": [], "weight_decay": weight_decay if decays else 0.0})
        if learning_rate is not None:
            group["lr"] = learning_rate * layerwise_lr_decay**below
        group["params"].append(parameter)
    return [groups[key] for key in sorted(groups, key=lambda key: (key[0], not key[1]))]


def layer_heights(model: nn.Module) -> dict[str, int]:
    """How high each parameter stands, by name: embeddings 0, layer i of the encoder i + 1, pooler, last norm and heads above all layers.

    Raises ConfigError for a model without numbered layers.
    """
    inside = f"{getattr(model, 'base_model_prefix', '')}."
    layers: dict[str, int | None] = {}
    for name, _ in model.named_parameters():
        bare = name.replace("base_model.model.", "", 1)  # as adapters wrap a model
        found = _LAYER.search(bare) if bare.startswith(inside) else None
        if found:
            layers[name] = int(found[1]) + 1
        else:
            layers[name] = 0 if bare.startswith(inside) and _INPUT.search(bare) else None
    top = 1 + max((height for height in layers.values() if height is not None), default=0)
    if top == 1:
        raise ConfigError("trainer.layerwise_lr_decay: the model has no numbered layers; set it to null")
    return {name: top if height is None else height for name, height in layers.items()}


def rate_factor(settings: TrainerConfig, planned: float) -> Callable[[int], float]:
    """The factor of the learning rates by optimiser step: linear warm-up, then the schedule down to `min_lr_ratio`.

    `planned` is the number of steps of the whole training, inf where it has no end that can be counted. Raises ConfigError.
    """
    warmup, decay, shape = settings.warmup_steps, settings.lr_decay_steps, settings.schedule
    if decay == 0:
        raise ConfigError(
            "trainer.lr_decay_steps is 0, so learning would end with the warm-up; use null for a constant rate, -1 to "
            "decay until the end of training, or a number of steps"
        )
    if shape != "constant" and decay in (None, -1):
        if not math.isfinite(planned):
            asked = "lr_decay_steps is -1" if decay == -1 else f"lr_schedule is {shape} without lr_decay_steps"
            raise ConfigError(
                f"trainer.{asked}, which needs an end to decay to; set task.max_steps or task.max_epochs, or a number of "
                "trainer.lr_decay_steps"
            )
        decay = max(1, int(planned) - warmup)
    least = settings.min_lr_ratio

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if shape == "constant":
            return 1.0
        done = min(1.0, (step - warmup) / decay)
        left = 1.0 - done if shape == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
        return least + (1.0 - least) * left

    return factor
