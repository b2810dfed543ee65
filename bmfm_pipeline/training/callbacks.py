"""Callbacks of a training child: checkpoints, history, progress, and stopping when asked to."""

import json
import math
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytorch_lightning as pl

from bmfm_pipeline.training.checkpoints import manifest_of, save_checkpoint
from bmfm_pipeline.training.lease import Lease

PROGRESS_EVERY = 0.5  # seconds
LEASE_EVERY = 10.0


class StopRequest:
    """Set by SIGTERM or SIGINT, or when the parent's end of the pipe on stdin closes because the parent is gone."""

    def __init__(self):
        self.reason: str | None = None

    def watch(self) -> None:
        def on_signal(number, frame):
            self.reason = self.reason or signal.Signals(number).name

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, on_signal)

    def watch_parent(self) -> None:
        def read():
            # The descriptor itself: a buffered reader would hold a lock that aborts the interpreter when it shuts down.
            while os.read(0, 4096):
                pass
            self.reason = self.reason or "the parent process is gone"

        threading.Thread(target=read, daemon=True, name="parent-watch").start()


class Checkpointing(pl.Callback):
    """`last.ckpt` at every validation and at the end, the best by validation/loss beside it, and the place to resume from."""

    def __init__(self, folder: Path, every_n_steps: int | None = None):
        self.folder, self.every_n_steps = folder, every_n_steps
        self.best_score, self.best_path = math.inf, None
        self._position = (0, 0)

    @property
    def last(self) -> Path:
        return self.folder / "last.ckpt"

    def state_dict(self) -> dict:
        return {"best_score": self.best_score, "best_path": None if self.best_path is None else self.best_path.name}

    def load_state_dict(self, state: dict) -> None:
        self.best_score = state["best_score"]
        name = state["best_path"]
        self.best_path = self.folder / name if name and (self.folder / name).exists() else None

    def on_save_checkpoint(self, trainer, module, checkpoint) -> None:
        checkpoint["bmfm"] = {
            "epoch": self._position[0],
            "batches": self._position[1],
            "batches_seen": module.batches_seen,
        }
        # Lightning counts a batch as completed only after this hook, and would run it again on resume.
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
        progress["completed"] = progress["processed"]

    def on_load_checkpoint(self, trainer, module, checkpoint) -> None:
        place = checkpoint["bmfm"]
        module.batches_seen = int(place["batches_seen"])
        self._position = (int(place["epoch"]), int(place["batches"]))

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self._position = (trainer.current_epoch, batch_idx + 1)
        if self.every_n_steps and trainer.global_step and trainer.global_step % self.every_n_steps == 0:
            save_checkpoint(trainer, self.last, reason="every n steps")

    def on_validation_end(self, trainer, module) -> None:
        if not trainer.sanity_checking:
            self.keep(trainer, module)

    def keep(self, trainer, module) -> None:
        """Save last, and best when the validation loss improved."""
        score = module.validation.get("validation/loss", math.nan)
        previous = self.best_path
        improved = score < self.best_score
        if improved:
            self.best_score = score
            self.best_path = (
                self.folder / f"epoch={trainer.current_epoch}-step={trainer.global_step}-val_loss={score:.2f}.ckpt"
            )
            save_checkpoint(trainer, self.best_path, validation_loss=score)
        save_checkpoint(trainer, self.last, validation_loss=None if math.isnan(score) else score)
        if improved and previous is not None and previous != self.best_path and trainer.is_global_zero:
            previous.unlink(missing_ok=True)
            manifest_of(previous).unlink(missing_ok=True)


class History(pl.Callback):
    """history.jsonl: one line per logged step and per validation. Lines beyond the resumed step are cut on resume."""

    def __init__(self, file: Path, every: int):
        self.file, self.every = file, every

    def on_train_start(self, trainer, module) -> None:
        if not trainer.is_global_zero or not self.file.exists():
            return
        kept = [line for line in self.file.read_text().splitlines() if json.loads(line)["step"] <= trainer.global_step]
        self.file.write_text("".join(line + "\n" for line in kept))

    def _write(self, trainer, values: dict[str, float]) -> None:
        if trainer.is_global_zero:
            with open(self.file, "a") as stream:
                stream.write(json.dumps({"step": trainer.global_step, "epoch": trainer.current_epoch, **values}) + "\n")

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if trainer.global_step % self.every == 0 and (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            values = {f"train/{name}": value for name, value in module.loss_parts().items()}
            rate = trainer.optimizers[0].param_groups[0]["lr"]
            self._write(trainer, {"train/loss": float(outputs["loss"]), **values, "learning_rate": rate})

    def on_validation_end(self, trainer, module) -> None:
        if module.validation and not trainer.sanity_checking:
            self._write(trainer, module.validation)


class Progress(pl.Callback):
    """One JSON object per line on stdout, at most twice a second, for the parent to relay; renews the lease."""

    def __init__(self, stage: str, lease: Lease, stop: StopRequest, started: float):
        self.stage, self.lease, self.stop, self.started = stage, lease, stop, started
        self._reported = self._renewed = 0.0
        self._cells = 0
        self._waited = self._worked = 0.0
        self._mark: float | None = None
        self.first_batch_after: float | None = None
        self.cells_per_s = 0.0
        self.loader_wait = 0.0
        self.stopped = False

    def on_train_start(self, trainer, module) -> None:
        self.stop.watch()  # after Lightning installed its own handlers
        self._start = self._mark = time.monotonic()
        self._first_step = trainer.global_step

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        now = time.monotonic()
        if self.first_batch_after is None:
            self.first_batch_after = time.time() - self.started
        self._waited += now - (self._mark or now)
        self._mark = now

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        now = time.monotonic()
        self._worked += now - self._mark
        self._mark = now
        self._cells += len(batch["cell_name"]) * trainer.world_size
        self.cells_per_s = self._cells / max(now - self._start, 1e-9)
        self.loader_wait = self._waited / max(self._waited + self._worked, 1e-9)
        if now - self._renewed > LEASE_EVERY and trainer.is_global_zero:
            self._renewed = now
            self.lease.renew()
        finished = trainer.max_steps > 0 and trainer.global_step >= trainer.max_steps
        if trainer.is_global_zero and (now - self._reported > PROGRESS_EVERY or finished):
            self._reported = now
            self._report(trainer, outputs, now)
        if self.stop.reason is not None:
            checkpointing = next(callback for callback in trainer.callbacks if isinstance(callback, Checkpointing))
            save_checkpoint(trainer, checkpointing.last, reason=self.stop.reason)
            self.stopped = True
            trainer.should_stop = True
            raise KeyboardInterrupt  # Lightning's way out of the loop without further validation

    def on_validation_end(self, trainer, module) -> None:
        self._mark = time.monotonic()
        if trainer.is_global_zero and module.validation and not trainer.sanity_checking:
            emit({"kind": "validation", "stage": self.stage, "step": trainer.global_step, "metrics": module.validation})

    def _report(self, trainer, outputs, now: float) -> None:
        total = total_steps(trainer)
        steps = trainer.global_step - self._first_step
        eta = (now - self._start) / steps * (total - trainer.global_step) if steps and total else None
        emit(
            {
                "kind": "progress",
                "stage": self.stage,
                "step": trainer.global_step,
                "max_steps": total,
                "epoch": trainer.current_epoch,
                "loss": float(outputs["loss"]),
                "cells_per_s": round(self.cells_per_s, 1),
                "eta_s": None if eta is None else round(eta, 1),
                "loader_wait_share": round(self.loader_wait, 3),
            }
        )


def total_steps(trainer) -> int | None:
    """How many optimiser steps the training will take, when that is known."""
    try:
        steps = trainer.estimated_stepping_batches
    except Exception:
        return None
    return int(steps) if math.isfinite(steps) else None


def emit(event: dict) -> None:
    """One line to the parent; a parent that is gone is noticed elsewhere."""
    try:
        sys.stdout.write(json.dumps(event) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        pass
