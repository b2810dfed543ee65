"""Keyword arguments of the loss functions: those of the configuration, and tensors made from class sizes, ontology, token values."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from bmfm_pipeline.errors import ConfigError
from bmfm_pipeline.objectives.balancing import ClassTables, class_margins, class_weights, positive_weights
from bmfm_pipeline.objectives.tasks import LossTask


def loss_options(
    task: LossTask, token_values: Tensor | None, tables: ClassTables | None, unit: float = 1.0
) -> dict[str, Any]:
    """Arguments of the task's loss function. `weights_from_epoch`, where there, says when its `weights` begin; `unit` is what errors of
    numbers are measured in.

    Raises ConfigError where a table is needed and is not there.
    """
    found = {name: value for name, value in task.arguments.items() if name not in _RESOLVED}
    if task.objective in ("mse", "mae") and unit != 1.0:
        return found | {"unit": unit}
    if task.objective == "token_value":
        if token_values is None:
            raise ConfigError(
                f"loss {task.name}: needs the values of the tokens of {task.source}, which must be a tokenised numeric field"
            )
        numeric = torch.nonzero(~torch.isnan(token_values)).squeeze(-1)
        return found | {"token_ids": numeric, "token_values": token_values[numeric]}
    if task.objective == "hce":
        if tables is None:  # the targets themselves say what is allowed, row by row
            return found
        if tables.allowed is None:
            raise ConfigError(
                f"loss {task.name}: the data do not say which classes of {task.source} lie under which; preprocess them with "
                "label_ontology set for that label column"
            )
        return found | {"allowed": _bool(tables.allowed)}
    if task.objective == "ldam":
        counts = _counts(task, tables)
        found["margins"] = _float(class_margins(counts, task.arguments["max_margin"]))
        if task.arguments["drw_epochs"] is not None:
            found["weights"] = _float(class_weights(counts, "effective_number", task.arguments["beta"]))
            found["weights_from_epoch"] = task.arguments["drw_epochs"]
        return found
    if method := task.arguments.get("class_weights"):
        found["weights"] = _float(class_weights(_counts(task, tables), method, task.arguments["beta"]))
    if weight := task.arguments.get("pos_weight"):
        found["pos_weight"] = _float(positive_weights(_counts(task, tables)) if weight == "balanced" else [weight])
    return found


# Arguments that become tensors.
_RESOLVED = ("class_weights", "beta", "pos_weight", "max_margin", "drw_epochs")


def _counts(task: LossTask, tables: ClassTables | None) -> np.ndarray:
    if tables is None or tables.counts is None:
        raise ConfigError(
            f"loss {task.name}: needs the number of training cells of each class of {task.source}; hand them to build_objectives as "
            "class_tables"
        )
    return tables.counts


def _float(values: Any) -> Tensor:
    return torch.as_tensor(np.asarray(values, dtype=np.float64), dtype=torch.float32)


def _bool(values: Any) -> Tensor:
    return torch.as_tensor(np.asarray(values, dtype=bool))
