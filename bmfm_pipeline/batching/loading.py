"""Datasets, samplers and loaders around a BatchBuilder: whole batches at a time, epochs and positions that can be resumed."""

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler


def choose_rows(rows: np.ndarray, limit: int | None, seed: int) -> np.ndarray:
    """A seeded random subset of `limit` of the rows, in their order; all of them when limit is None or larger."""
    if limit is None or limit >= len(rows):
        return rows
    chosen = np.random.default_rng([seed, 0x5E7]).choice(len(rows), size=limit, replace=False)
    return rows[np.sort(chosen)]


class CellDataset(Dataset):
    """Rows of a store as ready batches: DataLoader hands a list of (epoch, index) and gets the batch."""

    def __init__(self, builder, rows: np.ndarray):
        self.builder = builder
        self.rows = np.ascontiguousarray(rows, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, keys: list[tuple[int, int]]) -> dict:
        epoch = keys[0][0]
        return self.builder.build(
            self.rows[np.fromiter((index for _, index in keys), dtype=np.int64, count=len(keys))], epoch
        )


class EpochBatchSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index), in an order that (seed, epoch) fixes; `position` is the first batch still to come.

    `weights` (n,) samples with replacement, an epoch being n draws. With several replicas each takes every replicas-th batch
    position of the same order, padded from its start so that all have the same number of batches.
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
        self.n, self.batch_size, self.shuffle, self.seed, self.drop_last = n, batch_size, shuffle, seed, drop_last
        self.weights = None if weights is None else np.asarray(weights, dtype=np.float64) / np.sum(weights)
        self.num_replicas, self.rank = num_replicas, rank
        self.epoch, self.position = 0, 0

    def _order(self) -> np.ndarray:
        generator = np.random.default_rng([self.seed & 0xFFFFFFFF, self.epoch, 0xB47C])
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
        n = -(-self.n // self.num_replicas)
        return n // self.batch_size if self.drop_last else -(-n // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order, epoch, first = self._order(), self.epoch, self.position
        self.position = 0
        for batch in range(first, len(self)):
            yield [(epoch, int(index)) for index in order[batch * self.batch_size : (batch + 1) * self.batch_size]]

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position = int(state["epoch"]), int(state["position"])


def _as_it_is(batch: dict) -> dict:
    return batch


def make_loader(dataset: CellDataset, sampler: EpochBatchSampler, num_workers: int = 0) -> DataLoader:
    """A DataLoader whose dataset builds whole batches; workers stay alive between epochs."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=num_workers,
        collate_fn=_as_it_is,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
    )
