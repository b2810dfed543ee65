"""Training whose cells grow longer and batches smaller (or the other way round) from epoch to epoch."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bmfm_pipeline.batching import BatchBuilder, CellDataset, EpochBatchSampler


class Schedule:
    """Length and batch size of each epoch; after the last scheduled epoch its sizes go on.

    `entries` have max_length, batch_size and n_epochs, as data_module.batch_schedule of a checked training run has.
    """

    def __init__(self, entries: Sequence[Any]):
        self._sizes = [(e.max_length, e.batch_size) for e in entries for _ in range(e.n_epochs or 1)]

    @property
    def epochs(self) -> int:
        return len(self._sizes)

    def max_length(self, epoch: int) -> int:
        return self._sizes[min(epoch, len(self._sizes) - 1)][0]

    def batch_size(self, epoch: int) -> int:
        return self._sizes[min(epoch, len(self._sizes) - 1)][1]


class ScheduledSampler(EpochBatchSampler):
    """An EpochBatchSampler whose batch size is that of the epoch it stands in; the order of cells does not depend on it."""

    def __init__(self, n: int, schedule: Schedule, **options: Any):
        self.schedule = schedule
        super().__init__(n, schedule.batch_size(0), **options)

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        self.batch_size = self.schedule.batch_size(self.epoch)

    def load_state_dict(self, state: dict[str, int]) -> None:
        super().load_state_dict(state)
        self.batch_size = self.schedule.batch_size(self.epoch)

    def batches(self, epoch: int) -> int:
        """How many batches one process has in `epoch`."""
        return math.ceil(math.ceil(self.n / self.num_replicas) / self.schedule.batch_size(epoch))


class ScheduledCells(CellDataset):
    """Cells cut to the length of the epoch that the sampler asks for; `builders` has one by length."""

    def __init__(self, builders: Mapping[int, BatchBuilder], schedule: Schedule, rows: np.ndarray):
        self.builders, self.schedule = dict(builders), schedule
        super().__init__(self.builders[schedule.max_length(0)], rows)

    def __getitems__(self, keys: list[tuple[int, int]]) -> dict[str, Any]:
        epoch = keys[0][0]
        rows = self.rows[np.fromiter((index for _, index in keys), dtype=np.int64, count=len(keys))]
        return self.builders[self.schedule.max_length(epoch)].build(rows, epoch)


def planned_steps(trainer) -> float:
    """Optimiser steps of the whole training, `inf` when it has no end that can be counted; knows that epochs differ in batches."""
    sampler = getattr(trainer.datamodule, "train_sampler", None)
    if not isinstance(sampler, ScheduledSampler):
        return trainer.estimated_stepping_batches
    limit = trainer.limit_train_batches if isinstance(trainer.limit_train_batches, int) else math.inf
    steps = math.inf
    if trainer.max_epochs > 0:
        batches = (min(sampler.batches(epoch), limit) for epoch in range(trainer.max_epochs))
        steps = sum(math.ceil(count / trainer.accumulate_grad_batches) for count in batches)
    return min(steps, trainer.max_steps) if trainer.max_steps > 0 else steps
