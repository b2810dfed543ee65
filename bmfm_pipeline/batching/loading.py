"""Datasets, samplers and loaders around a BatchBuilder: whole batches at a time, in an order that can be resumed anywhere."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from bmfm_pipeline.batching.builder import BatchBuilder
from bmfm_pipeline.errors import ConfigError, DataError

_SUBSET, _ORDER = 0x5E7, 0xB47C  # keep the draws of the two purposes apart


def choose_rows(rows: np.ndarray, limit: int | None, seed: int) -> np.ndarray:
    """A seeded random subset of `limit` of the rows, in their order; all of them when limit is None or not smaller."""
    if limit is not None and limit < 1:
        raise ConfigError(f"limit_dataset_samples must be at least 1 or null, found {limit}")
    if limit is None or limit >= len(rows):
        return rows
    chosen = np.random.default_rng([seed & 0xFFFFFFFF, _SUBSET]).choice(len(rows), size=limit, replace=False)
    return rows[np.sort(chosen)]


def balancing_weights(classes: np.ndarray) -> np.ndarray:
    """Sampling weights float64 (cells,): 1 / size of the cell's class, 0 where the label is missing (negative)."""
    classes = np.asarray(classes)
    known = classes >= 0
    if not known.any():
        raise DataError("balancing_label_column: no cell of the training split has a label")
    sizes = np.bincount(classes[known])
    weights = np.zeros(len(classes), dtype=np.float64)
    weights[known] = 1.0 / sizes[classes[known]]
    return weights


class CellDataset(Dataset):
    """Rows of a store as ready batches: a DataLoader hands over a list of (epoch, index) and gets the batch.

    With `evaluation` the epoch is always 0, so that order and masks of a cell are the same every time.
    """

    def __init__(self, builder: BatchBuilder, rows: np.ndarray, evaluation: bool = False):
        self.builder, self.evaluation = builder, evaluation
        self.rows = np.ascontiguousarray(rows, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, keys: list[tuple[int, int]]) -> dict[str, Any]:
        chosen = self.rows[np.fromiter((index for _, index in keys), dtype=np.int64, count=len(keys))]
        return self.builder.build(chosen, 0 if self.evaluation else keys[0][0])

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        """The batch of one cell, in epoch 0 unless (epoch, index) is given."""
        return self.__getitems__([key if isinstance(key, tuple) else (0, int(key))])


class EpochBatchSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index), in an order that (seed, epoch) fixes; `position` is the first batch still to come.

    `weights` (n,) samples with replacement, an epoch being n draws. Of several replicas each takes every num_replicas-th cell of
    the same order, which is padded from its start so that all have equally many batches. `set_epoch` starts another epoch at its
    first batch; after `load_state_dict` the next iteration starts at the loaded position, later ones at 0.
    """

    def __init__(
        self,
        n: int,
        batch_size: int,
        *,
        shuffle: bool,
        seed: int = 0,
        drop_last: bool = False,
        weights: np.ndarray | None = None,
        num_replicas: int = 1,
        rank: int = 0,
    ):
        if n < 1:
            raise DataError("no cells to take batches from: the split is empty")
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, found {batch_size}")
        if not 0 <= rank < num_replicas:
            raise ConfigError(f"rank must lie in 0..{num_replicas - 1}, found {rank}")
        if weights is not None and (len(weights) != n or np.min(weights) < 0 or not 0 < np.sum(weights) < np.inf):
            raise DataError(
                f"sampling weights must be {n} numbers of at least 0 with a positive sum; found {len(weights)}"
            )
        self.n, self.batch_size, self.shuffle, self.seed, self.drop_last = n, batch_size, shuffle, seed, drop_last
        self.weights = None if weights is None else np.asarray(weights, dtype=np.float64) / np.sum(weights)
        self.num_replicas, self.rank = num_replicas, rank
        self.epoch, self.position = 0, 0

    @property
    def sampler(self) -> "EpochBatchSampler":
        """Itself: where Lightning looks for `set_epoch`."""
        return self

    def order(self, epoch: int) -> np.ndarray:
        """The indices of this replica's cells in `epoch`, int64."""
        generator = np.random.default_rng([self.seed & 0xFFFFFFFF, epoch, _ORDER])
        if self.weights is not None:
            order = generator.choice(self.n, size=self.n, p=self.weights)
        elif self.shuffle:
            order = generator.permutation(self.n)
        else:
            order = np.arange(self.n)
        if self.num_replicas > 1:
            padded = -(-self.n // self.num_replicas) * self.num_replicas
            order = np.resize(order, padded)[self.rank :: self.num_replicas]
        return order

    def __len__(self) -> int:
        """Batches of a whole epoch, wherever this one starts."""
        n = -(-self.n // self.num_replicas)
        return n // self.batch_size if self.drop_last else -(-n // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, first, size = self.epoch, self.position, self.batch_size
        order = self.order(epoch).tolist()
        self.position = 0
        for batch in range(first, len(self)):
            yield [(epoch, index) for index in order[batch * size : (batch + 1) * size]]

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of `epoch`; a position loaded for this very epoch stays."""
        if epoch != self.epoch:
            self.epoch, self.position = epoch, 0

    def state_dict(self) -> dict[str, int]:
        """Where the next iteration would start."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where `state` says."""
        self.epoch, self.position = int(state["epoch"]), int(state["position"])


class CellLoader(DataLoader):
    """A DataLoader that knows how many batches were handed out (not merely prefetched), so that training resumes mid-epoch."""

    _handed_out: tuple[int, int] | None = None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        epoch, position = self.batch_sampler.epoch, self.batch_sampler.position
        self._handed_out = (epoch, position)
        for batch in super().__iter__():
            position += 1
            self._handed_out = (epoch, position)
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Epoch, and the first batch of it that was not handed out yet."""
        if self._handed_out is None or self._handed_out[0] != self.batch_sampler.epoch:
            return self.batch_sampler.state_dict()
        return dict(zip(("epoch", "position"), self._handed_out, strict=True))

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where `state` says: the next iteration yields the rest of that epoch."""
        self._handed_out = None
        self.batch_sampler.load_state_dict(state)


def _as_it_is(batch: dict[str, Any]) -> dict[str, Any]:
    return batch


def make_loader(
    dataset: CellDataset,
    sampler: EpochBatchSampler,
    num_workers: int = 0,
    *,
    pin_memory: bool | None = None,
    context: str | None = None,
) -> CellLoader:
    """A loader whose dataset builds whole batches; workers stay alive between epochs.

    Memory is pinned where there is a GPU unless said otherwise. `context` is the start method of workers (None: the platform's).
    """
    if num_workers > 0:
        dataset.builder.report.share()
        # Compiled once here rather than in every worker at once.
        dataset.builder.build(dataset.rows[:1], 0)
    return CellLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=num_workers,
        collate_fn=_as_it_is,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available() if pin_memory is None else pin_memory,
        prefetch_factor=4 if num_workers > 0 else None,
        multiprocessing_context=context if num_workers > 0 else None,
    )
