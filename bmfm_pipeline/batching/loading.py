"""Datasets, samplers and loaders around a BatchBuilder: whole batches at a time, in an order that can be resumed anywhere."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from bmfm_pipeline.batching.builder import BatchBuilder
from bmfm_pipeline.errors import ConfigError, DataError

_SUBSET, _ORDER = 0x5E7, 0xB47C  # keep the draws of the two purposes apart
_MOST_THREADS = 4


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
        return self.builder.build(chosen, 0 if self.evaluation else keys[0][0], training=not self.evaluation)

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
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, found {batch_size}")
        if not 0 <= rank < num_replicas:
            raise ConfigError(f"rank must lie in 0..{num_replicas - 1}, found {rank}")
        if weights is not None and n and (len(weights) != n or np.min(weights) < 0 or not 0 < np.sum(weights) < np.inf):
            raise DataError(
                f"sampling weights must be {n} numbers of at least 0 with a positive sum; found {len(weights)}"
            )
        self.n, self.batch_size, self.shuffle, self.seed, self.drop_last = n, batch_size, shuffle, seed, drop_last
        self.weights = None if weights is None or not n else np.asarray(weights, dtype=np.float64) / np.sum(weights)
        self.num_replicas, self.rank = num_replicas, rank
        self.epoch, self.position = 0, 0

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

    def state_dict(self, done: int | None = None) -> dict[str, int]:
        """Where to continue once the first `done` batches of this epoch were trained on: the next epoch when that is all of them.

        Loader workers ask for batches ahead of training, so only the caller knows `done`; without it, where an iteration would start.
        """
        position = self.position if done is None else done
        if position >= len(self) > 0:
            return {"epoch": self.epoch + 1, "position": 0}
        return {"epoch": self.epoch, "position": position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where `state` says."""
        self.epoch, self.position = int(state["epoch"]), int(state["position"])


def _as_it_is(batch: dict[str, Any]) -> dict[str, Any]:
    return batch


def _pinned(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with its tensors in memory that a GPU reads directly."""
    moved = {}
    for key, value in batch.items():
        if isinstance(value, torch.Tensor):
            value = value.pin_memory()
        elif isinstance(value, dict):
            value = _pinned(value)
        moved[key] = value
    return moved


class CellLoader(DataLoader):
    """A DataLoader that builds batches ahead in threads; with none, when asked.

    Threads and not processes: the kernels run outside the interpreter's lock, while handing a batch from process to process takes
    longer than building it, and needs shared memory that containers lack. The order of batches never depends on the threads.
    """

    def __init__(self, dataset: "CellDataset", sampler: EpochBatchSampler, threads: int, pin: bool):
        super().__init__(
            dataset, batch_sampler=sampler, collate_fn=_as_it_is, num_workers=0, pin_memory=pin and not threads
        )
        self.threads, self._pins = threads, pin

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self._built_ahead() if self.threads else super().__iter__()

    def _built_ahead(self) -> Iterator[dict[str, Any]]:
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="batches")
        waiting: deque = deque()
        try:
            for keys in self.batch_sampler:
                waiting.append(pool.submit(self._batch, keys))
                if len(waiting) > 2 * self.threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _batch(self, keys: list[tuple[int, int]]) -> dict[str, Any]:
        batch = self.dataset.__getitems__(keys)
        return _pinned(batch) if self._pins else batch


def make_loader(
    dataset: CellDataset, sampler: EpochBatchSampler, num_workers: int = 0, *, pin_memory: bool | None = None
) -> CellLoader:
    """A loader of whole batches, built when asked (0) or ahead by threads; more than one is rarely of use, so that 4 is the most.

    Memory is pinned where there is a GPU unless said otherwise.
    """
    pin = torch.cuda.is_available() if pin_memory is None else pin_memory
    return CellLoader(dataset, sampler, min(num_workers, _MOST_THREADS), pin)
