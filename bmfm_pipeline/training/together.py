"""Sums over the processes that train together, and steps that are made of several batches and processes."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed

from bmfm_pipeline.batching.loading import CellLoader
from bmfm_pipeline.config.losses import IGNORED_LABEL


def several_processes() -> bool:
    """Whether this process trains together with others."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


@functools.cache
def host_group():
    """The group of all processes for what lies in host memory: nothing on an accelerator has to wait for it."""
    return distributed.new_group(backend="gloo")


def summed(values: Mapping[str, Tensor | float]) -> dict[str, Tensor]:
    """Each value added over all processes, float64 on the host; every process must have the same names and shapes."""
    found = {name: torch.as_tensor(value, dtype=torch.float64).cpu() for name, value in values.items()}
    if not several_processes() or not found:
        return found
    names = sorted(found)
    flat = torch.cat([found[name].reshape(-1) for name in names])
    distributed.all_reduce(flat, group=host_group())
    parts = flat.split([found[name].numel() for name in names])
    return {name: part.reshape(found[name].shape) for name, part in zip(names, parts, strict=True)}


class StepLoader:
    """The batches of a process's loader, told what the optimiser steps are made of that they belong to.

    `gather` batches make a step, the last of an epoch (of its first `limit` batches) perhaps fewer. Every batch gets `step_counts`,
    float32 (losses,): what `count` finds in the labels of all batches of its step. They are read ahead for that, so that `gather` of
    them are held on the host. Where the cells of an epoch do not share out evenly, some processes get one cell a second time, so that
    all have equally many batches; its labels are taken away here, so that it has no influence.
    """

    def __init__(
        self,
        loader: CellLoader,
        count: Callable[[Mapping[str, Any]], Mapping[str, Tensor]] | None,
        gather: int = 1,
        limit: int | None = None,
    ):
        self.loader, self.count, self.gather = loader, count, gather
        self.last = len(loader) if limit is None else min(limit, len(loader))

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        sampler = self.loader.batch_sampler
        step: list[dict[str, Any]] = []
        for number, batch in enumerate(self.loader, start=sampler.position + 1):
            if number == len(self.loader) and sampler.rank >= sampler.n % sampler.num_replicas > 0:
                batch = {**batch, "labels": _without_last(batch["labels"])}
            step.append(batch)
            if number % self.gather == 0 or number in (self.last, len(self.loader)):
                yield from self._counted(step)
                step = []

    def _counted(self, step: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        if self.count is None:
            yield from step
            return
        counts = sum(torch.stack(list(self.count(batch["labels"]).values())) for batch in step)
        for batch in step:
            yield {**batch, "step_counts": counts}


def _without_last(labels: Any) -> Any:
    """Labels of a batch, of which the last cell has none."""
    if isinstance(labels, Mapping):
        return {name: _without_last(value) for name, value in labels.items()}
    labels = labels.clone()
    labels[-1] = IGNORED_LABEL
    return labels
