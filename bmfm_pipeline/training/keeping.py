"""Callbacks that know where a training stands and keep it: position, last and best checkpoint, leaving when asked to stop."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.plugins.io import TorchCheckpointIO

from bmfm_pipeline.training.checkpoints import clear_leftovers, remove_checkpoint, save_checkpoint, write_file
from bmfm_pipeline.training.lease import Lease
from bmfm_pipeline.training.stopping import Agreement, StopRequest

SAVE_EVERY = 900.0  # seconds: what a machine that dies costs at most, however rare validations are


class WholeFiles(TorchCheckpointIO):
    """Lightning's checkpoints, written by `write_file`."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        write_file(checkpoint, Path(path))


class Position(pl.Callback):
    """The batch that training stands at, counted in whole optimiser steps, and the sampler's epoch. The first of the callbacks."""

    def __init__(self, data, most_batches: int | None = None, same_batches: bool = False):
        self.data, self.most_batches, self.same_batches = data, most_batches, same_batches
        self.epoch = self.batches = 0

    @property
    def batches_per_epoch(self) -> int:
        """Batches of the epoch that the sampler stands in, at most as many as an epoch is limited to."""
        batches = len(self.data.train_sampler)
        return batches if self.most_batches is None else min(batches, self.most_batches)

    @property
    def epochs(self) -> float:
        """Epochs trained, with a fraction for the one under way."""
        return round(self.epoch + self.batches / max(self.batches_per_epoch, 1), 4)

    @property
    def last_epoch(self) -> int:
        """Number of the epoch that the last batch belonged to."""
        return self.epoch - 1 if self.batches == 0 and self.epoch else self.epoch

    def restore(self, place: dict[str, Any]) -> None:
        """Go on after the batch that a checkpoint was written at; where other processes than then train, after the cells seen by then.

        Batches are those of one process, so that as many hold more or fewer cells. At most one step's cells are seen again.
        """
        self.epoch, self.batches = int(place["epoch"]), int(place["batches"])
        sampler, epoch = self.data.train_sampler, 0 if self.same_batches else self.epoch
        sampler.load_state_dict({"epoch": epoch, "position": 0})
        before, now = int(place.get("processes", 1)), sampler.num_replicas
        if before != now and self.batches:
            gather = self.data.run.task.accumulate_grad_batches
            seen = min(self.batches * before // now, self.batches_per_epoch - 1)
            self.batches = seen // gather * gather
        sampler.load_state_dict({"epoch": epoch, "position": self.batches})

    def on_load_checkpoint(self, trainer, module, checkpoint) -> None:
        self.settle(checkpoint["loops"])

    def on_train_epoch_start(self, trainer, module) -> None:
        if not self.same_batches:
            self.data.train_sampler.set_epoch(trainer.current_epoch)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if between_steps(trainer):
            return
        if trainer.fit_loop.epoch_loop._num_ready_batches_reached():
            self.epoch, self.batches = trainer.current_epoch + 1, 0
        else:
            self.epoch, self.batches = trainer.current_epoch, batch_idx + 1

    def settle(self, loops: dict[str, Any]) -> None:
        """Write this position into Lightning's counters of a checkpoint.

        As Lightning writes them they depend on the hook that saved, and some of them make a resumed run skip or repeat a batch.
        Only two forms are left here: in the middle of an epoch with its last batch completed, and before the next epoch.
        """
        loop = loops["fit_loop"]
        started = self.epoch + (1 if self.batches else 0)
        counts = {"ready": started, "started": started, "processed": self.epoch, "completed": self.epoch}
        loop["epoch_progress"] = {"total": dict(counts), "current": dict(counts)}
        batches = loop["epoch_loop.batch_progress"]
        total = batches["total"]["ready"]
        batches["total"] = dict.fromkeys(batches["total"], total)
        batches["current"] = dict.fromkeys(batches["current"], self.batches)
        batches["is_last_batch"] = False
        validation = loop["epoch_loop.val_loop.batch_progress"]
        for name in ("total", "current"):
            validation[name] = dict.fromkeys(validation[name], 0)
        validation["is_last_batch"] = False


class Checkpointing(pl.Callback):
    """`last.ckpt` at every validation, every n steps, every quarter of an hour and when stopped; the best by validation/loss beside it.

    Nothing is saved between the batches of one optimiser step, where gradients would be lost. The last of the callbacks, so that
    what the others count is in the checkpoint.
    """

    def __init__(
        self,
        folder: Path,
        position: Position,
        lease: Lease | None,
        stop: StopRequest,
        every_n_steps: int | None = None,
        on_saved: Callable[[int], None] | None = None,
    ):
        """`on_saved` gets the step once all files of a save are in place; in the first process only."""
        self.folder, self.position, self.lease, self.stop, self.every_n_steps = (
            folder,
            position,
            lease,
            stop,
            every_n_steps,
        )
        self.agreement, self.on_saved = Agreement(), on_saved
        self.best_score, self.best_path = math.inf, None
        self.validated_step = self.saved_step = -1
        self.validation_due = self.stopped = False
        self.batches_found: dict[str, Any] | None = (
            None  # by task.auto_batch_size, so that a resumed run takes the same
        )
        self._saved_at = time.monotonic()

    @property
    def last(self) -> Path:
        return self.folder / "last.ckpt"

    def on_save_checkpoint(self, trainer, module, checkpoint) -> None:
        checkpoint["bmfm"] = {
            "step": int(trainer.global_step),
            "epoch": self.position.epoch,
            "batches": self.position.batches,
            "batches_seen": module.batches_seen,
            "processes": trainer.world_size,
            "sharded": trainer.strategy.lightning_restore_optimizer is False,
            "skipped_steps": module.finite.skipped,
            "validation_due": self.validation_due,
            "validated_step": self.validated_step,
            "best_score": self.best_score,
            "best_name": None if self.best_path is None else self.best_path.name,
            "batches_found": self.batches_found,
        }
        self.position.settle(checkpoint["loops"])

    def restore(self, place: dict[str, Any], module) -> None:
        """Go on as a checkpoint says; Lightning restores weights, optimiser and counters."""
        self.position.restore(place)
        module.batches_seen = int(place["batches_seen"])
        module.finite.skipped = int(place.get("skipped_steps", 0))
        self.validation_due, self.validated_step = bool(place["validation_due"]), int(place["validated_step"])
        self.saved_step, self.best_score = int(place["step"]), float(place["best_score"])
        best = self.folder / (place["best_name"] or "none")
        self.best_path = best if best.exists() else None

    def on_train_start(self, trainer, module) -> None:
        self.stop.watch()  # Lightning has installed its own handlers meanwhile
        self._saved_at = time.monotonic()
        if trainer.is_global_zero:
            clear_leftovers(self.folder)
        if self.validation_due:  # the run was stopped between this step and its validation
            loop = trainer.fit_loop.epoch_loop.val_loop
            loop.restarting = False
            trainer.validating = True
            loop.run()
            trainer.training = True

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if self.lease is not None:
            self.lease.renew_if_old()
        if between_steps(trainer):
            return
        self.validation_due = trainer.fit_loop.epoch_loop._should_check_val_fx(trainer.fit_loop._data_fetcher)
        late = time.monotonic() - self._saved_at > SAVE_EVERY
        stop, late = self.agreement.any(self.stop.reason is not None, late)
        if stop:
            self.leave(trainer, module)
        if late or (self.every_n_steps and trainer.global_step % self.every_n_steps == 0):
            self.save(trainer, module, self.last)
            self.tell_saved(trainer)

    def on_validation_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        if trainer.sanity_checking:
            return
        if self.lease is not None:
            self.lease.renew_if_old()
        if self.agreement.any(self.stop.reason is not None)[0]:
            self.validation_due = True
            self.leave(trainer, module)

    def on_validation_end(self, trainer, module) -> None:
        if not trainer.sanity_checking:
            self.keep(trainer, module)

    def leave(self, trainer, module) -> None:
        """Save and end training at once."""
        self.save(trainer, module, self.last, reason=self.stop.reason or "another process was asked to stop")
        self.tell_saved(trainer)
        self.stopped = trainer.should_stop = True
        raise KeyboardInterrupt  # Lightning's way out of its loops without further validation

    def keep(self, trainer, module) -> None:
        """Save last, and best when the validation loss improved."""
        score = module.validation.get("validation/loss", math.nan)
        self.validated_step, self.validation_due = int(trainer.global_step), False
        previous = self.best_path
        improved = score < self.best_score
        if improved:
            name = f"epoch={self.position.last_epoch}-step={trainer.global_step}-val_loss={score:.2f}.ckpt"
            self.best_score, self.best_path = score, self.folder / name
            self.save(trainer, module, self.best_path, validation_loss=score)
            if previous is not None and previous != self.best_path and trainer.is_global_zero:
                remove_checkpoint(previous)
        about = {} if math.isnan(score) else {"validation_loss": score}
        self.save(trainer, module, self.last, self.best_path if improved else None, **about)
        self.tell_saved(trainer)

    def tell_saved(self, trainer) -> None:
        """Say that what lies in the folder belongs together."""
        if self.on_saved is not None and trainer.is_global_zero:
            self.on_saved(self.saved_step)

    def save(self, trainer, module, path: Path, same_as: Path | None = None, **about) -> None:
        module.finite.check()
        if self.lease is not None:
            self.lease.renew()  # whoever lost the folder to another process must not write
        save_checkpoint(trainer, path, same_as, **about)
        self.saved_step, self._saved_at = int(trainer.global_step), time.monotonic()


def between_steps(trainer) -> bool:
    """Whether the gradients of the latest batch still wait for those of further batches."""
    return trainer.fit_loop._should_accumulate()
