"""A moving average of the weights, which validation and the exported model use in place of the last ones (Polyak averaging)."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from bmfm_pipeline.training.keeping import between_steps


class WeightAverage(pl.Callback):
    """After each optimiser step n: average = d x average + (1 - d) x weights, with d = min(decay, (1 + n) / (10 + n)).

    So the first weights, which are random, are soon forgotten. The averages stand in the model's place while it validates; a
    checkpoint has both, the trained weights in `state_dict` and the averages here. Stands before the callback that saves.
    """

    def __init__(self, module, decay: float):
        self.module, self.decay = module, decay
        self.steps = 0
        self.averages = {name: _precise(value).clone() for name, value in self._trained()}
        self._weights: dict[str, Tensor] = {}  # while the averages are in their place

    def _trained(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, value) for name, value in self.module.named_parameters() if value.requires_grad)

    @torch.no_grad()
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if between_steps(trainer):
            return
        self.steps += 1
        kept = min(self.decay, (1 + self.steps) / (10 + self.steps))
        self._follow_device()
        names, weights = zip(*self._trained(), strict=True)
        torch._foreach_lerp_([self.averages[name] for name in names], [_precise(value) for value in weights], 1 - kept)

    def _follow_device(self) -> None:
        for name, value in self._trained():
            self.averages[name] = self.averages[name].to(value.device)

    @torch.no_grad()
    def _put_in(self) -> None:
        """Copied, so that nothing that refers to the model's tensors has to notice."""
        self._follow_device()
        self._weights = {name: value.detach().clone() for name, value in self._trained()}
        for name, value in self._trained():
            value.copy_(self.averages[name])

    @torch.no_grad()
    def _take_out(self) -> None:
        for name, value in self._trained():
            value.copy_(self._weights[name])
        self._weights = {}

    def on_validation_start(self, trainer, module) -> None:
        self._put_in()

    def on_validation_end(self, trainer, module) -> None:
        self._take_out()

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """The averages stand in the model's place within."""
        self._put_in()
        try:
            yield
        finally:
            self._take_out()

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "averages": {name: value.cpu() for name, value in self.averages.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps, self.averages = int(state["steps"]), dict(state["averages"])

    def on_save_checkpoint(self, trainer, module, checkpoint) -> None:
        if self._weights:  # stopped in the middle of a validation
            checkpoint["state_dict"] = {**checkpoint["state_dict"], **self._weights}


def _precise(value: Tensor) -> Tensor:
    """At least float32: the small steps of an average are lost in less."""
    return value.detach().to(torch.promote_types(value.dtype, torch.float32))


def averaged_weights(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """The weights of a checkpoint that validation scored: averages where it has them, by the names of its state_dict."""
    return checkpoint["state_dict"] | checkpoint["callbacks"].get(WeightAverage.__qualname__, {}).get("averages", {})
