"""Losses and gradients that are not numbers end a training, and say where they came from."""

import copy
from typing import Any

import torch
from torch import Tensor

from bmfm_pipeline.errors import TrainingError
from bmfm_pipeline.objectives import LossResult

# A scaler halves its factor at each step whose gradients overflow float16; after so many in a row the fault is not the factor.
MOST_SKIPPED = 40
ADVICE = (
    "the last good checkpoint is kept. Lower trainer.learning_rate, set task.gradient_clip_val=1, or use task.precision=32-true; if the "
    "same cells fail again, look at their values"
)


class FiniteCheck:
    """Looks at the losses and the gradients of a step.

    On a host at once, before the weights change. On an accelerator when the next step begins, or before a checkpoint is written, so
    that no step waits. With a scaler (16-mixed) gradients that overflow are a skipped step, which is counted.
    """

    def __init__(self, module):
        self.module = module
        self.skipped = self.skipped_in_a_row = 0
        self._loss: tuple | None = None
        self._norm: tuple | None = None
        self._batches: list[tuple[dict[str, Any], int, int]] = []  # of this step: the batch, its number, its seed

    def loss(self, result: LossResult, batch: dict[str, Any], batch_idx: int, seed: int) -> None:
        """Take note of the loss of a batch."""
        total = result.total.detach()
        self._loss = (total, result.values, batch["cell_name"][:3], self.module.global_step, batch_idx)
        if total.device.type == "cpu":
            self._batches.append((batch, batch_idx, seed))
            self.check()

    def gradients(self, norm: Tensor, scaled: bool) -> None:
        """Take note of the norm of all gradients of a step, before the optimiser uses them."""
        self._norm = (norm, scaled, self.module.objectives.loss_keys, self.module.global_step)
        if norm.device.type == "cpu":
            self.check()
        self._batches = []

    def check(self) -> None:
        """TrainingError when the latest loss or the latest gradients were not numbers, naming batch and loss."""
        loss, self._loss = self._loss, None
        if loss is not None and not torch.isfinite(loss[0]):
            total, values, cells, step, batch_idx = loss
            culprits = [name for name, value in values.items() if not torch.isfinite(value)]
            raise TrainingError(
                f"the loss is {total.item()} at step {step}, batch {batch_idx} (cells {', '.join(cells)}, ...): "
                f"{', '.join(culprits) or 'the total'}; {ADVICE}"
            )
        norm, self._norm = self._norm, None
        if norm is not None:
            self._check_norm(*norm)

    def _check_norm(self, norm: Tensor, scaled: bool, names: list[str], step: int) -> None:
        if torch.isfinite(norm):
            self.skipped_in_a_row = 0
            return
        if scaled and self.skipped_in_a_row < MOST_SKIPPED:
            self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
            return
        again = f" {self.skipped_in_a_row + 1} times in a row" if scaled else ""
        where = self._find() or f"one of {', '.join(names)}"
        raise TrainingError(
            f"the gradients are not numbers at step {step}{again}, although the loss is (norm {norm.item()}): {where}; {ADVICE}"
        )

    def _find(self) -> str | None:
        """Compute each batch of the step again, one loss at a time: which one gives such gradients."""
        module = self.module
        for batch, batch_idx, seed in self._batches:
            for task in module.objectives.tasks:
                alone = copy.copy(module.objectives)
                alone.tasks = [task]
                torch.manual_seed(seed)
                with module.trainer.precision_plugin.forward_context():
                    logits, positions = module.outputs(batch)
                    total = alone.compute(logits, batch["labels"], positions).total
                trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
                found = torch.autograd.grad(total, trained, allow_unused=True)
                if not all(torch.isfinite(part).all() for part in found if part is not None):
                    return f"{task.loss_key} of batch {batch_idx} (cells {', '.join(batch['cell_name'][:3])}, ...)"
        return None
