"""The best constant guess at masked values, fitted to the targets of training cells: what a score has to beat to mean anything."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bmfm_pipeline.config.losses import IGNORED_LABEL
from bmfm_pipeline.objectives.compute import Objectives
from bmfm_pipeline.objectives.losses import FUNCTIONS, valid_mask
from bmfm_pipeline.objectives.tasks import LossTask

MOST_TARGETS = 2_000_000


@dataclass(frozen=True)
class Constant:
    """What one metric key's targets are best guessed by; None where there is no such target.

    `token`: the commonest token, `shares` (V,) float64 the share of each token (one of every kind added, so that none is impossible);
    `mean` and `median` of the numbers; `zero`: whether more than half of the numbers are zero.
    """

    token: int | None = None
    shares: Tensor | None = None
    mean: float | None = None
    median: float | None = None
    zero: bool | None = None


def tasks_by_key(objectives: Objectives) -> dict[str, list[LossTask]]:
    """The losses of each metric key."""
    found: dict[str, list[LossTask]] = {}
    for task in objectives.tasks:
        found.setdefault(task.metric_key, []).append(task)
    return found


def class_task(tasks: list[LossTask]) -> LossTask | None:
    """The loss whose scores say the class, of those that share a metric key."""
    return next((task for task in tasks if FUNCTIONS[task.objective].shape in ("classes", "token_values")), None)


def value_tasks(tasks: list[LossTask]) -> tuple[LossTask | None, LossTask | None]:
    """The loss whose score is a number, and the one whose score says that it is zero, of those that share a metric key."""
    by_name = {task.objective: task for task in tasks}
    return by_name.get("mse") or by_name.get("mae"), by_name.get("is_zero_bce") or by_name.get("is_zero_focal")


def token_targets(objectives: Objectives, task: LossTask, labels: Mapping[str, Any], positions=None) -> Tensor:
    """(N,) class ids of a task that scores classes."""
    if task.objective != "token_value":
        return objectives.targets(task, labels, positions)
    # The true token is not the value: read the labels as they came.
    raw = labels[task.source].reshape(-1)
    return raw if positions is None else raw.index_select(0, positions[task.source].to(raw.device))


def counted_values(targets: Tensor, number: LossTask, zero: LossTask | None) -> Tensor:
    """Where a number is scored: without the zeros when the loss leaves them out and nothing else says what is zero."""
    mask = valid_mask(targets)
    return mask & (targets != 0) if number.arguments["ignore_zero"] and zero is None else mask


def fit_constants(objectives: Objectives, labels: Iterable[Mapping[str, Any]]) -> dict[str, Constant]:
    """The constant of every metric key of a field, from batches of labels in host memory: those of training cells.

    Reading ends once two million targets have been seen.
    """
    keys = {key: tasks for key, tasks in tasks_by_key(objectives).items() if tasks[0].is_field}
    tokens: dict[str, np.ndarray] = {}
    numbers: dict[str, list[np.ndarray]] = {}
    zeros: dict[str, np.ndarray] = {}
    seen = 0
    for batch in labels if keys else ():
        for key, tasks in keys.items():
            if (task := class_task(tasks)) is not None:
                ids = token_targets(objectives, task, batch).numpy()
                found = np.bincount(ids[ids != IGNORED_LABEL])
                tokens[key] = _added(tokens.get(key), found)
                seen += int(found.sum())
            number, zero = value_tasks(tasks)
            if number is not None or zero is not None:
                targets = objectives.targets(number or zero, batch)
                valid = targets[valid_mask(targets)].numpy()
                zeros[key] = _added(zeros.get(key), np.bincount(valid == 0, minlength=2))
                if number is not None:
                    numbers.setdefault(key, []).append(targets[counted_values(targets, number, zero)].numpy())
                seen += len(valid)
        if seen >= MOST_TARGETS:
            break
    return {key: _constant(tokens.get(key), numbers.get(key), zeros.get(key)) for key in keys}


def _added(before: np.ndarray | None, found: np.ndarray) -> np.ndarray:
    if before is None:
        return found
    size = max(len(before), len(found))
    return np.pad(before, (0, size - len(before))) + np.pad(found, (0, size - len(found)))


def _constant(tokens: np.ndarray | None, numbers: list[np.ndarray] | None, zeros: np.ndarray | None) -> Constant:
    found: dict[str, Any] = {}
    if tokens is not None and tokens.sum():
        found |= {"token": int(tokens.argmax()), "shares": torch.as_tensor(tokens, dtype=torch.float64)}
    values = np.concatenate(numbers).astype(np.float64) if numbers else np.empty(0)
    if len(values):
        found |= {"mean": float(values.mean()), "median": float(np.median(values))}
    if zeros is not None and zeros.sum():
        found["zero"] = bool(zeros[1] * 2 > zeros.sum())
    return Constant(**found)
