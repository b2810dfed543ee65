"""Callbacks of a training child that watch: history, progress for the parent, patience."""

import json
import math
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from bmfm_pipeline.storage import write_text_atomic
from bmfm_pipeline.training.keeping import Position, between_steps
from bmfm_pipeline.training.schedule import planned_steps
from bmfm_pipeline.training.stopping import emit

PROGRESS_EVERY = 0.5  # seconds


class History(pl.Callback):
    """history.jsonl: one line per logged step (the first, and every n-th) and per validation."""

    def __init__(self, file: Path, every: int, position: Position):
        self.file, self.every, self.position = file, every, position
        self._rate = 0.0

    def cut(self, step: int, validated_step: int) -> None:
        """Leave what a checkpoint at `step` knows of: the rest will be trained again."""
        if not self.file.exists():
            return
        kept = []
        for line in self.file.read_text().splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:  # the end of a process that was killed while it wrote
                continue
            if entry["step"] <= (validated_step if "validation/loss" in entry else step):
                kept.append(line + "\n")
        write_text_atomic(self.file, "".join(kept))

    def _write(self, trainer, values: dict[str, float]) -> None:
        if trainer.is_global_zero:
            with open(self.file, "a") as stream:
                entry = {"step": trainer.global_step, "epoch": self.position.epochs, **values}
                stream.write(json.dumps(entry) + "\n")

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        self._rate = trainer.optimizers[0].param_groups[0]["lr"]  # the step ends with the rate of the next one

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if between_steps(trainer) or not (trainer.global_step % self.every == 0 or trainer.global_step == 1):
            return
        values = {f"train/{name}": value for name, value in module.training_values().items()}
        self._write(trainer, {**values, "learning_rate": self._rate})

    def on_validation_end(self, trainer, module) -> None:
        if module.validation and not trainer.sanity_checking:
            self._write(trainer, module.validation)


class Progress(pl.Callback):
    """One JSON object per line on stdout, at most twice a second, for the parent to relay."""

    def __init__(self, stage: str, started: float, position: Position, observed: str = "cells"):
        self.stage, self.started, self.position, self.observed = stage, started, position, observed
        self._reported = 0.0
        self._cells = 0
        self._waited = self._worked = 0.0
        self._mark: float | None = None
        self._last_step = -1
        self.first_batch_after: float | None = None

    @property
    def cells_per_s(self) -> float:
        """Cells trained on in a second of training, without validations and checkpoints."""
        return self._cells / max(self._waited + self._worked, 1e-9)

    @property
    def loader_wait(self) -> float:
        """Share of training time spent waiting for batches; the first batch, which starts everything up, is told apart."""
        return self._waited / max(self._waited + self._worked, 1e-9)

    def on_train_start(self, trainer, module) -> None:
        self._start, self._first_step = time.monotonic(), trainer.global_step

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        now = time.monotonic()
        if self.first_batch_after is None:
            self.first_batch_after = time.time() - self.started
        if self._mark is not None:
            self._waited += now - self._mark
        self._mark = now

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        now = time.monotonic()
        self._worked += now - self._mark
        self._mark = now
        self._cells += len(batch["cell_name"]) * trainer.world_size
        if now - self._reported > PROGRESS_EVERY and not between_steps(trainer):
            self._report(trainer, module, now)

    # Time that is neither work nor waiting.
    def on_save_checkpoint(self, trainer, module, checkpoint: dict[str, Any]) -> None:
        self._mark = None

    def on_validation_start(self, trainer, module) -> None:
        self._mark = None

    def on_validation_end(self, trainer, module) -> None:
        if module.validation and not trainer.sanity_checking:
            emit({"kind": "validation", "stage": self.stage, "step": trainer.global_step, "metrics": module.validation})

    def on_train_end(self, trainer, module) -> None:
        if self._cells and trainer.global_step != self._last_step:
            self._report(trainer, module, time.monotonic())

    def _report(self, trainer, module, now: float) -> None:
        self._reported, self._last_step = now, trainer.global_step
        if not trainer.is_global_zero:
            return
        total = total_steps(trainer)
        steps = trainer.global_step - self._first_step
        eta = (now - self._start) / steps * (total - trainer.global_step) if steps and total else None
        emit(
            {
                "kind": "progress",
                "stage": self.stage,
                "step": trainer.global_step,
                "max_steps": total,
                "epoch": self.position.last_epoch,
                "loss": module.training_values()["loss"],
                "cells_per_s": round(self.cells_per_s, 1),
                "observed": self.observed,
                "eta_s": None if eta is None else round(eta, 1),
                "loader_wait_share": round(self.loader_wait, 3),
            }
        )


class Patience(pl.Callback):
    """Ends training after `patience` validations without a better validation/loss."""

    def __init__(self, patience: int):
        self.patience, self.best, self.waited = patience, math.inf, 0

    def _stop_if_tired(self, trainer) -> None:
        if self.waited >= self.patience:
            trainer.should_stop = True

    def on_train_start(self, trainer, module) -> None:
        self._stop_if_tired(trainer)  # a resumed run may have ended already

    def on_validation_end(self, trainer, module) -> None:
        if trainer.sanity_checking:
            return
        score = module.validation.get("validation/loss", math.inf)
        self.best, self.waited = (score, 0) if score < self.best else (self.best, self.waited + 1)
        self._stop_if_tired(trainer)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.waited = state["best"], state["waited"]


def total_steps(trainer) -> int | None:
    """How many optimiser steps the training will take, when that is known."""
    try:
        steps = planned_steps(trainer)
    except Exception:
        return None
    return int(steps) if math.isfinite(steps) else None
