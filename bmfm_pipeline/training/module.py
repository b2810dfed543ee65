"""TrainingModule: model, objectives, optimiser and schedule for Lightning."""

from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

from bmfm_pipeline.config import RunConfig, TrainerConfig
from bmfm_pipeline.errors import TrainingError
from bmfm_pipeline.objectives import Objectives, RunningMetrics, build_objectives
from bmfm_pipeline.training.prepared import PreparedData


class TrainingModule(pl.LightningModule):
    """Trains `model` on `objectives`. Dropout draws from (seed, step), so a resumed run continues with the same numbers."""

    def __init__(self, model: nn.Module, objectives: Objectives, trainer_config: TrainerConfig, seed: int):
        super().__init__()
        self.model, self.objectives, self.settings, self.seed = model, objectives, trainer_config, seed
        self.metrics = RunningMetrics(objectives)
        self.batches_seen = 0
        self.validation: dict[str, float] = {}
        self.last_parts: dict[str, float] = {}
        self._sums: dict[str, float] = {}
        self._counts: dict[str, float] = {}

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
        logits, positions = self._outputs(batch)
        result = self.objectives.compute(logits, batch["labels"], positions)
        if not torch.isfinite(result.total):
            culprits = [name for name, value in result.values.items() if not torch.isfinite(value)]
            cells = ", ".join(batch["cell_name"][:3])
            raise TrainingError(
                f"the loss is {result.total.item()} at step {self.global_step}, batch {batch_idx} (cells {cells}, ...): "
                f"{', '.join(culprits) or 'the total'}; the last good checkpoint is kept. Lower trainer.learning_rate, set "
                "task.gradient_clip_val=1, or use task.precision=32-true"
            )
        self._latest = result
        return result.total

    def loss_parts(self) -> dict[str, float]:
        """Values of the losses of the latest batch; reading them waits for the accelerator."""
        return {name: float(value) for name, value in self._latest.parts.items()}

    def on_validation_epoch_start(self) -> None:
        self.metrics.reset()
        self._sums, self._counts = {}, {}

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        logits, positions = self._outputs(batch)
        result = self.objectives.compute(logits, batch["labels"], positions)
        for name in result.sums:
            self._sums[name] = self._sums.get(name, 0.0) + float(result.sums[name])
            self._counts[name] = self._counts.get(name, 0.0) + float(result.counts[name])
        self.metrics.update(logits, batch["labels"], positions)

    def on_validation_epoch_end(self) -> None:
        if self._counts:
            values = {**self.objectives.pool(self._sums, self._counts), **self.metrics.compute()}
            self.validation = {f"validation/{name}": float(value) for name, value in values.items()}

    def configure_optimizers(self):
        settings = self.settings
        optimizer = torch.optim.AdamW(
            decay_groups(self.model, settings.weight_decay or 0.0),
            lr=settings.learning_rate,
            betas=settings.betas,
            eps=settings.epsilon,
            fused=True,
        )
        warmup, decay = settings.warmup_steps, settings.lr_decay_steps
        if decay == -1:
            decay = max(1, int(self.trainer.estimated_stepping_batches) - warmup)

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / (warmup + 1)
            return 1.0 if decay is None else max(0.0, 1.0 - (step - warmup) / decay)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


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

    prepared: PreparedData = data_module.prepared
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
