"""TrainingModule: model, objectives, optimiser and schedule for Lightning."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import GradClipAlgorithmType
from torch import nn

from bmfm_pipeline.config import RunConfig, TrainerConfig
from bmfm_pipeline.errors import ConfigError, TrainingError
from bmfm_pipeline.objectives import LossResult, Objectives, RunningMetrics, build_objectives
from bmfm_pipeline.training.prepared import PreparedData
from bmfm_pipeline.training.schedule import planned_steps


class TrainingModule(pl.LightningModule):
    """Trains `model` on `objectives`. Dropout draws from (seed, step), so a resumed run continues with the same numbers."""

    def __init__(self, model: nn.Module, objectives: Objectives, trainer_config: TrainerConfig, seed: int):
        super().__init__()
        self.model, self.objectives, self.settings, self.seed = model, objectives, trainer_config, seed
        self.metrics = RunningMetrics(objectives)
        self.batches_seen = 0
        self.validation: dict[str, float] = {}
        self._sums: dict[str, float] = {}
        self._counts: dict[str, float] = {}
        self._gathered: list[LossResult] = []  # of the batches of one optimiser step
        self._step_ends = False
        self._unchecked: tuple | None = None

    def _outputs(self, batch: dict[str, Any]):
        positions = batch.get("positions")
        return self.model(batch["input_ids"], batch["attention_mask"], positions=positions).logits, positions

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        # Finding the predicted positions here, on the host, spares the accelerator a wait.
        if isinstance(batch, dict) and "labels" in batch:
            batch = {**batch, "positions": self.objectives.positions(batch["labels"])}
        return batch

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        torch.manual_seed((self.seed * 1_000_003 + self.batches_seen * 97 + self.global_rank) % (2**63))
        self.batches_seen += 1
        self.check_loss()
        logits, positions = self._outputs(batch)
        result = self.objectives.compute(logits, batch["labels"], positions)
        if self._step_ends:
            self._gathered, self._step_ends = [], False
        total = result.total.detach()
        self._gathered.append(dataclasses.replace(result, total=total))
        self._unchecked = (total, result.values, batch["cell_name"][:3], self.global_step, batch_idx)
        if total.device.type == "cpu":
            self.check_loss()
        return result.total

    def check_loss(self) -> None:
        """TrainingError when the latest loss was not a number, naming its batch.

        On an accelerator it is looked at when the next step begins, or before a checkpoint is written, so that no step waits.
        """
        if self._unchecked is None:
            return
        (total, values, cells, step, batch_idx), self._unchecked = self._unchecked, None
        if torch.isfinite(total):
            return
        culprits = [name for name, value in values.items() if not torch.isfinite(value)]
        raise TrainingError(
            f"the loss is {total.item()} at step {step}, batch {batch_idx} (cells {', '.join(cells)}, ...): "
            f"{', '.join(culprits) or 'the total'}; the last good checkpoint is kept. Lower trainer.learning_rate, set "
            "task.gradient_clip_val=1, or use task.precision=32-true"
        )

    def on_before_optimizer_step(self, optimizer) -> None:
        self._step_ends = True

    def training_values(self) -> dict[str, float]:
        """Loss and its parts over the batches of the latest optimiser step; reading them waits for the accelerator."""
        results = self._gathered
        parts: dict[str, float] = {}
        for name in dict.fromkeys(name for result in results for name in result.parts):
            values = [float(result.values[name]) for result in results if bool(result.contributes[name])]
            parts[name] = sum(values) / len(values)
        return {"loss": float(sum(result.total for result in results)) / len(results), **parts}

    def on_validation_epoch_start(self) -> None:
        self.metrics.reset()
        self._sums, self._counts = {}, {}

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, torch.Tensor]:
        """Score one batch; the logits are for callbacks that look closer."""
        logits, positions = self._outputs(batch)
        result = self.objectives.compute(logits, batch["labels"], positions)
        for name in result.sums:
            self._sums[name] = self._sums.get(name, 0.0) + float(result.sums[name])
            self._counts[name] = self._counts.get(name, 0.0) + float(result.counts[name])
        self.metrics.update(logits, batch["labels"], positions)
        return logits

    def on_validation_epoch_end(self) -> None:
        if self._counts:
            values = {**self.objectives.pool(self._sums, self._counts), **self.metrics.compute()}
            found = {f"validation/{name}": float(value) for name, value in values.items()}
            # Every process validates all cells; one speaks for all where the last digits decide.
            self.validation = self.trainer.strategy.broadcast(found) if self.trainer.world_size > 1 else found

    def configure_optimizers(self):
        groups = decay_groups(self.model, self.settings.weight_decay or 0.0)
        if not groups:
            raise ConfigError("task.freeze_layers freezes every parameter of the model, so nothing would be trained")
        optimizer = torch.optim.AdamW(
            groups,
            lr=self.settings.learning_rate,
            betas=self.settings.betas,
            eps=self.settings.epsilon,
            # Gradients of float16 are scaled; the fused one scales them back after the place where they have to be clipped.
            fused=getattr(self.trainer.precision_plugin, "scaler", None) is None,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._schedule())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        """As Lightning clips, but also where it refuses a fused optimiser although no gradient is scaled (bf16-mixed)."""
        if not gradient_clip_val or getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_algorithm == GradClipAlgorithmType.VALUE:
            torch.nn.utils.clip_grad_value_(self.parameters(), gradient_clip_val)
        else:
            torch.nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)

    def _schedule(self) -> Callable[[int], float]:
        """The factor of the learning rate by optimiser step: linear warm-up, then constant or linear decay to 0."""
        warmup, decay = self.settings.warmup_steps, self.settings.lr_decay_steps
        if decay == 0:
            raise ConfigError(
                "trainer.lr_decay_steps is 0, so learning would end with the warm-up; use null for a constant rate, -1 to "
                "decay until the end of training, or a number of steps"
            )
        if decay == -1:
            total = planned_steps(self.trainer)
            if not math.isfinite(total):
                raise ConfigError(
                    "trainer.lr_decay_steps is -1, which needs an end to decay to; set task.max_steps or task.max_epochs"
                )
            decay = max(1, int(total) - warmup)

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / (warmup + 1)
            return 1.0 if decay is None else max(0.0, 1.0 - (step - warmup) / decay)

        return factor


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two parameter groups: weights of Linear layers decay; biases, norms, embeddings and all else do not."""
    decayed_ids = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in trained if id(parameter) in decayed_ids]
    plain = [parameter for parameter in trained if id(parameter) not in decayed_ids]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_module(run: RunConfig, data_module) -> TrainingModule:
    """The training module of `run`, with a fresh model sized for the data of `data_module` (set up or not)."""
    from bmfm_pipeline.models import build_model

    prepared: PreparedData | None = data_module.prepared
    if prepared is None:
        raise ConfigError("the data module has no data yet; call its prepare_data() first")
    if run.is_training and not run.trainer.losses:
        raise ConfigError(
            "nothing to learn: no field is masked and no label column is set; set label_columns, or data_module.mlm=true with "
            "a field of is_masked=true"
        )
    plain = run.model_dump(mode="json")
    torch.manual_seed(run.seed.seed_value)
    fields = prepared.field_dicts(run)
    settings = {name: value for name, value in plain["model"].items() if name != "checkpoint"}
    labels = plain["label_columns"] if run.predicts_labels else []
    model = build_model(
        settings,
        fields,
        labels,
        label_dict=prepared.label_dict,
        vocabularies={name: vocabulary.tokens for name, vocabulary in prepared.vocabularies.items()},
    )
    objectives = build_objectives(
        run.trainer.losses or [], fields, model.config.label_columns, prepared.token_values(run)
    )
    return TrainingModule(model, objectives, run.trainer, run.seed.seed_value)
