"""task.auto_batch_size: by trial, the largest batches that fit into memory, with as many cells to an optimiser step as were written."""

import contextlib
import gc
import json
import math
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bmfm_pipeline.config import RunConfig
from bmfm_pipeline.errors import ConfigError, TrainingError, is_out_of_memory, out_of_memory_message
from bmfm_pipeline.training.memory import GB, CudaMemory, HostMemory, give_back_to_system
from bmfm_pipeline.training.stopping import note

# A step of a large model takes long on a CPU: after these seconds the last trial is extrapolated.
TRIAL_SECONDS = 30.0
_COUNTS_OF_BATCHES = ("limit_train_batches", "overfit_batches", "val_check_interval")


@dataclass(frozen=True)
class Batches:
    """Cells of a batch, by entry of the batch schedule (one where there is none), and batches of an optimiser step.

    `fits` are the largest batches that memory holds, as far as they were looked for, `limit` the bytes that one process may hold.
    """

    sizes: tuple[int, ...]
    accumulate: int
    fits: tuple[int, ...] = ()
    limit: int = 0

    def summary(self) -> dict[str, float]:
        """Numbers for the summary of a training."""
        found = {"batch_size": self.sizes[0], "accumulate_grad_batches": self.accumulate}
        return {**found, "largest_batch_that_fits": self.fits[0], "memory_limit_gb": round(self.limit / GB, 2)}

    def to_dict(self) -> dict[str, Any]:
        return {"sizes": list(self.sizes), "accumulate": self.accumulate, "fits": list(self.fits), "limit": self.limit}

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> "Batches":
        return cls(tuple(stored["sizes"]), stored["accumulate"], tuple(stored["fits"]), stored["limit"])


def settle_batch_size(
    run: RunConfig,
    data_folder: str,
    prepare: Callable[[Any], None],
    stopped: Callable[[], bool],
    stored: dict[str, Any] | None = None,
) -> tuple[RunConfig, Batches] | None:
    """`run` with batches that fit, and what they are; None when stopped meanwhile.

    `prepare` does to a fresh training module what is done before it is trained, such as freezing; `stopped` is asked between
    trials. `stored` are the batches of a checkpoint, which a resumed training takes as they are. Nothing of the trials remains but the numbers they found: they have a
    model and cells of their own, and random numbers go on as if there had been none. Raises ConfigError, TrainingError.
    """
    if stored is not None:
        batches = Batches.from_dict(stored)
        return with_batches(run, batches.sizes, batches.accumulate), batches
    if run.task.strategy.startswith("fsdp"):
        raise ConfigError(
            "task.auto_batch_size cannot try batches of a model that fsdp shares out; set data_module.batch_size"
        )
    with _unnoticed():
        trial = Trial(run, data_folder, prepare)
        try:
            fits = [trial.largest(length, most, stopped) for length, most in _wanted(run)]
        finally:
            trial.close()
    if stopped():
        return None
    fits = _least_of_all_processes(fits)
    if min(fits) < 1:
        raise TrainingError(
            f"task.auto_batch_size: not even a batch of one cell fits into {trial.limit / GB:.2f} GB; "
            + out_of_memory_message(None)
        )
    written = _sizes(run)
    accumulate = split_of_step(
        written, run.task.accumulate_grad_batches, fits, run.task.auto_batch_size == "max", _whole_counts(run)
    )
    cells = [size * run.task.accumulate_grad_batches for size in written]
    batches = Batches(tuple(count // accumulate for count in cells), accumulate, tuple(fits), trial.limit)
    note(_in_words(run, batches))
    return with_batches(run, batches.sizes, accumulate), batches


def _in_words(run: RunConfig, batches: Batches) -> str:
    sizes, fits = (" / ".join(str(count) for count in counts) for counts in (batches.sizes, batches.fits))
    return (
        f"task.auto_batch_size: batches of {sizes} cells, {batches.accumulate} to an optimiser step, so that a step learns from "
        f"as many cells as data_module.batch_size and task.accumulate_grad_batches say; at least {fits} fit into "
        f"{batches.limit / GB:.2f} GB"
    )


def _sizes(run: RunConfig) -> list[int]:
    """Written cells of a batch, by entry of the schedule."""
    module = run.data_module
    return [entry.batch_size for entry in module.batch_schedule] if module.batch_schedule else [module.batch_size]


def _wanted(run: RunConfig) -> list[tuple[int, int]]:
    """(length, the largest batch of use), by entry of the schedule."""
    module, whole_step = run.data_module, run.task.auto_batch_size == "max"
    lengths = [entry.max_length for entry in module.batch_schedule] if module.batch_schedule else [module.max_length]
    times = run.task.accumulate_grad_batches if whole_step else 1
    return [(length, size * times) for length, size in zip(lengths, _sizes(run), strict=True)]


def _whole_counts(run: RunConfig) -> list[int]:
    """Settings that count batches, so that a share of a batch would be left over where these are not split evenly."""
    values = (getattr(run.task, name) for name in _COUNTS_OF_BATCHES)
    return [value for value in values if _is_count(value)]


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def split_of_step(
    sizes: Sequence[int], accumulate: int, fits: Sequence[int], whole_step: bool = False, counts: Sequence[int] = ()
) -> int:
    """Into how few batches an optimiser step can be divided evenly, so that each fits.

    A step has `sizes` x `accumulate` cells, by entry of the schedule, and batches of at most `fits`; larger ones than `sizes` only
    where a `whole_step` may be one batch. `counts` of batches must remain whole numbers. Raises ConfigError.
    """
    cells = [size * accumulate for size in sizes]
    most = [min(fit, count if whole_step else size) for fit, count, size in zip(fits, cells, sizes, strict=True)]
    shared = math.gcd(*cells)
    for split in range(1, shared + 1):
        whole = shared % split == 0 and all(count * split % accumulate == 0 for count in counts)
        if whole and all(count // split <= limit for count, limit in zip(cells, most, strict=True)):
            return split
    raise ConfigError(
        f"task.auto_batch_size: batches of {', '.join(map(str, sizes))} cells have no even division that fits (at most "
        f"{', '.join(map(str, fits))}); write sizes of data_module.batch_schedule that have a larger common divisor"
    )


def with_batches(run: RunConfig, sizes: Sequence[int], accumulate: int) -> RunConfig:
    """`run` with these batches; settings that count batches are changed so that they mean the same cells."""
    module, before = run.data_module, run.task.accumulate_grad_batches
    task: dict[str, Any] = {"accumulate_grad_batches": accumulate}
    for name in _COUNTS_OF_BATCHES:
        if _is_count(value := getattr(run.task, name)):
            task[name] = value * accumulate // before
    changes: dict[str, Any] = {"batch_size": sizes[0]}
    tokens = sizes[0] * module.max_length
    if module.batch_schedule:
        pairs = list(zip(module.batch_schedule, sizes, strict=True))
        tokens = max(entry.max_length * size for entry, size in pairs)
        changes = {"batch_schedule": [entry.model_copy(update={"batch_size": size}) for entry, size in pairs]}
    written = module.evaluation_batch_size
    most = max(1, tokens // module.evaluation_length)
    size = next(count for count in range(min(written, most), 0, -1) if written % count == 0)
    changes["test_batch_size"] = size
    if _is_count(run.task.limit_val_batches):
        task["limit_val_batches"] = run.task.limit_val_batches * written // size
    return run.model_copy(
        update={"task": run.task.model_copy(update=task), "data_module": module.model_copy(update=changes)}
    )


def largest(
    measure: Callable[[int], float | None],
    most: int,
    limit: float,
    floor: Callable[[], float],
    seconds: float = math.inf,
    stopped: Callable[[], bool] = lambda: False,
) -> int:
    """The largest size in 0..most whose measure (bytes; None: it did not fit at all) stays within `limit`.

    No size is tried that may go beyond it: what a size takes above `floor`, which is asked for after a measure, is taken to grow at
    most with the size. After `seconds` the last measure is extrapolated in the same way.
    """
    fits, fails, size, began = 0, most + 1, 1, time.monotonic()
    while not stopped():
        taken = measure(size)
        if taken is None or taken > limit:
            fails, follow = size, (fits + size) // 2
        else:
            fits, room = size, int((limit - taken) / max((taken - floor()) / size, 1.0))
            if time.monotonic() - began > seconds:
                return min(fits + room, fails - 1)
            follow = min(2 * fits, fits + room, fails - 1)
        if follow - fits <= fits // 16:
            break
        size = follow
    return fits


class Trial:
    """A model like the one to be trained, that takes steps on the longest training cells."""

    def __init__(self, run: RunConfig, data_folder: str, prepare: Callable[[Any], None]):
        from bmfm_pipeline.training.data_module import build_data_module
        from bmfm_pipeline.training.module import build_module

        # The weights stay as they are, so that no trial ends with weights that are not numbers.
        still = run.trainer.model_copy(update={"learning_rate": 0.0})
        self.run = run.model_copy(update={"trainer": still})
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self.memory = self._memory(run)
        self.kept = 0
        self.data = build_data_module(self.run, data_folder)
        self.data.setup("fit")
        self.module = build_module(self.run, self.data)
        prepare(self.module)
        store, rows = self.data.prepared.store, self.data.rows["train"]
        self.longest = rows[np.argsort(-np.diff(store.indptr)[rows], kind="stable")]
        self.limit = self._limit(run)
        self.memory.allow(self.limit if run.task.accelerator == "gpu" else None)

    def _memory(self, run: RunConfig) -> HostMemory | CudaMemory:
        from bmfm_pipeline.models.host_memory import keep_freed_memory

        if run.task.accelerator not in ("cpu", "gpu"):
            raise ConfigError(
                f"task.auto_batch_size measures memory on a CPU or an NVIDIA GPU, not on {run.task.accelerator}; set "
                "data_module.batch_size"
            )
        if run.task.accelerator == "cpu":
            keep_freed_memory()  # as training does
            return HostMemory()
        import torch

        torch.cuda.set_device(self.local_rank)
        return CudaMemory()

    def _limit(self, run: RunConfig) -> int:
        """Bytes that this process may hold."""
        self.memory.start()
        if run.task.memory_limit is not None:
            return int(run.task.memory_limit * GB)
        free = self.memory.free() * self.memory.share
        if run.task.accelerator == "cpu":
            free /= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return int(self.memory.held() + free)

    def _bytes(self) -> tuple[int, int]:
        """Of all parameters, and of those that are trained."""
        sizes = [(value.numel() * value.element_size(), value.requires_grad) for value in self.module.parameters()]
        return sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained)

    def largest(self, length: int, most: int, stopped: Callable[[], bool]) -> int:
        """The largest batch of cells cut to `length` that fits, at most `most`; 0 where not even one cell does."""
        self.memory.start()
        weights, trained = self._bytes()
        empty = self.memory.held() + (weights if self.run.task.accelerator == "gpu" else 0)
        # Processes that train together keep the gradients a second time, for each other; averages are weights once more.
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        limit = self.limit - trained * ((processes > 1) + bool(self.run.trainer.ema_decay))
        seconds = TRIAL_SECONDS if self.run.task.accelerator == "cpu" else math.inf
        cells = min(most, -(-len(self.longest) // processes))
        found = largest(
            lambda size: self.measure(length, size), cells, limit, lambda: empty + self.kept, seconds, stopped
        )
        return most if found == cells else found

    def measure(self, length: int, cells: int) -> float | None:
        """Peak bytes of two optimiser steps on a batch of `cells`; None when memory ran out."""
        weighted = self.data.train_sampler.weights is not None
        rows = np.resize(self.longest[: 1 if weighted else cells], cells)  # weighted draws may repeat a cell
        try:
            self.memory.start()
            batch = self.data.builders[length].build(rows, 0)
            kept, missing = self._step_twice(batch)
            taken = self.memory.peak() + missing
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return None
        finally:
            self.module.zero_grad(set_to_none=True)
            self.module.to("cpu")
            self.module.trainer = None
        self.kept = kept
        return taken

    def _step_twice(self, batch: dict[str, Any]) -> tuple[int, int]:
        """Train on the batch twice: bytes of gradients and optimiser, which any batch needs, and those of them still to come."""
        import pytorch_lightning as pl
        from lightning_fabric.plugins.environments import LightningEnvironment
        from torch.utils.data import DataLoader

        from bmfm_pipeline.training.options import trainer_options

        alone = {
            "devices": 1,
            "strategy": "auto",
            "max_epochs": 1,
            "min_epochs": None,
            "max_steps": 2,
            "min_steps": None,
        }
        alone |= {"max_time": None, "accumulate_grad_batches": 1, "val_check_interval": None, "num_sanity_val_steps": 0}
        alone |= {"fast_dev_run": False, "overfit_batches": 0, "limit_train_batches": None, "limit_val_batches": 0}
        options, _ = trainer_options(self.run.task.model_copy(update=alone), 2, 0, 1)
        if self.run.task.accelerator == "gpu":
            options["devices"] = [self.local_rank]
        trainer = pl.Trainer(**options, plugins=[LightningEnvironment()], default_root_dir=os.devnull)
        trainer.fit(self.module, DataLoader([batch, batch], batch_size=None, collate_fn=lambda given: given))
        gradients = sum(value.grad.nbytes for value in self.module.parameters() if value.grad is not None)
        states = (state for optimizer in trainer.optimizers for state in optimizer.state.values())
        held = sum(value.nbytes for state in states for value in state.values() if hasattr(value, "nbytes"))
        # Steps that a scaler skips, because gradients overflow, leave the optimiser without what it will keep: two numbers a weight.
        missing = 0 if held else 2 * gradients
        return gradients + held + missing, missing

    def close(self) -> None:
        """Give everything back."""
        self.memory.allow(self.limit if self.run.task.memory_limit is not None else None)
        self.module = self.data = None
        gc.collect()
        self.memory.start()
        give_back_to_system()


@contextlib.contextmanager
def _unnoticed() -> Iterator[None]:
    """Random numbers go on afterwards as if nothing had been drawn within; collecting garbage within looks at new objects only."""
    import torch

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    on_devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if on_devices is not None:
            torch.cuda.set_rng_state_all(on_devices)


def _least_of_all_processes(fits: Sequence[int]) -> list[int]:
    """What fits in every process that trains; all must ask."""
    count, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if count == 1:
        return list(fits)
    from torch.distributed import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store = PrefixStore("auto_batch_size", next(rendezvous("env://"))[0])
    store.set(str(rank), json.dumps(list(fits)))
    found = [json.loads(store.get(str(other))) for other in range(count)]
    return [min(values) for values in zip(*found, strict=True)]
