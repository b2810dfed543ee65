"""TrainingModule: model, objectives, optimiser and schedule for Lightning."""

import copy
import math
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import ModelParallelStrategy
from pytorch_lightning.utilities import GradClipAlgorithmType
from torch import Tensor, distributed, nn

from bmfm_pipeline.config import RunConfig, TrainerConfig, require_path
from bmfm_pipeline.config.models import WHERE_WEIGHTS_START
from bmfm_pipeline.config.perturbation import DIFFERENCES
from bmfm_pipeline.errors import ConfigError
from bmfm_pipeline.models.packing import Packing
from bmfm_pipeline.objectives import Objectives, RunningMetrics, build_objectives, fit_constants
from bmfm_pipeline.storage import localise, strip_userinfo
from bmfm_pipeline.training.finite import FiniteCheck
from bmfm_pipeline.training.optimiser import decay_groups, rate_factor
from bmfm_pipeline.training.prepared import PreparedData
from bmfm_pipeline.training.schedule import planned_steps
from bmfm_pipeline.training.sharding import shard_layers, whole
from bmfm_pipeline.training.together import summed


class TrainingModule(pl.LightningModule):
    """Trains `model` on `objectives`. Dropout draws from (seed, step), so a resumed run continues with the same numbers."""

    def __init__(self, model: nn.Module, objectives: Objectives, trainer_config: TrainerConfig, seed: int):
        super().__init__()
        self.model, self.objectives, self.settings, self.seed = model, objectives, trainer_config, seed
        self.metrics = RunningMetrics(objectives)
        self.batches_seen = 0
        self.validation: dict[str, float] = {}
        self.finite = FiniteCheck(self)
        self._sums: dict[str, Tensor | float] = {}
        self._counts: dict[str, Tensor | float] = {}
        self._parts: list[tuple[dict[str, Tensor], ...]] = []  # sums and counts of the batches of one optimiser step
        self._step_counts: dict[str, Tensor] = {}
        self._step: tuple[Tensor, Tensor] | None = None  # sums and counts of the latest step
        self._step_ends = False

    def setup(self, stage: str) -> None:
        data = self.trainer.datamodule
        if hasattr(data, "count_targets"):
            on_host = copy.deepcopy(self.objectives)  # the tables of the other follow the model to its device
            data.count_targets = lambda labels: on_host.counts(labels, epoch=self.current_epoch)

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            shard_layers(self.model, self.device_mesh["data_parallel"])

    def outputs(self, batch: dict[str, Any]):
        """The model's scores for a batch, and the positions that they are for."""
        positions = batch.get("positions")
        output = self.model(
            batch["input_ids"], batch["attention_mask"], positions=positions, packing=batch.get("packing")
        )
        return output.logits, positions

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        # Finding the predicted positions and the padding here, on the host, spares the accelerator a wait.
        if isinstance(batch, dict) and "labels" in batch:
            mask, packing = Packing.of(batch["attention_mask"])
            batch = {
                **batch,
                "attention_mask": mask,
                "packing": packing,
                "positions": self.objectives.positions(batch["labels"]),
            }
        return batch

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        seed = (self.seed * 1_000_003 + self.batches_seen * 97 + self.global_rank) % (2**63)
        torch.manual_seed(seed)
        self.batches_seen += 1
        self.finite.check()
        if self._step_ends:
            self._parts, self._step_ends = [], False
        step_counts = self._counts_of_step(batch)
        logits, positions = self.outputs(batch)
        sums, counts = self.objectives.measure(logits, batch["labels"], positions, self.current_epoch)
        result = self.objectives.combine(sums, counts if step_counts is None else step_counts)
        self._parts.append((result.sums, counts))
        self.finite.loss(result, batch, batch_idx, seed)
        if step_counts is None:
            return result.total
        # Gradients are averaged over processes and batches later; here they have to add up.
        gather = self.trainer.accumulate_grad_batches if "step_counts" in batch else 1
        return result.total * (gather * self.trainer.world_size)

    def _counts_of_step(self, batch: dict[str, Any]) -> dict[str, Tensor] | None:
        """Counts by loss over all batches and processes of the optimiser step; None where the batch is the whole step.

        So the step of several is that of one batch which holds all their cells, however the targets are shared out.
        """
        counts, several = batch.get("step_counts"), self.trainer.world_size > 1
        if counts is None and not several:
            return None
        if counts is None or not self._parts:
            if counts is None:
                found = self.objectives.counts(batch["labels"], batch.get("positions"), self.current_epoch)
                counts = torch.stack(list(found.values()))
            if several:
                counts = counts.clone()
                distributed.all_reduce(counts)
            self._step_counts = dict(zip(self.objectives.loss_keys, counts, strict=True))
        return self._step_counts

    def on_before_optimizer_step(self, optimizer) -> None:
        self._step_ends = True
        keys = self.objectives.loss_keys
        step = torch.stack(
            [torch.stack([sum(part[row][key] for part in self._parts).float() for key in keys]) for row in (0, 1)]
        )
        if self.trainer.world_size > 1:
            distributed.all_reduce(step)
        self._step = (step[0], step[1])

    def training_values(self) -> dict[str, float]:
        """Loss and its parts over all batches and processes of the latest optimiser step; reading them waits for the accelerator."""
        keys = self.objectives.loss_keys
        sums, counts = (dict(zip(keys, values.tolist(), strict=True)) for values in self._step)
        values = self.objectives.pool(sums, counts)
        return {"loss": values.pop("loss"), **values}

    def on_validation_epoch_start(self) -> None:
        self.metrics.reset()
        self._sums, self._counts = {}, {}

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, torch.Tensor]:
        """Score one batch; the logits are for callbacks that look closer."""
        logits, positions = self.outputs(batch)
        result = self.objectives.compute(logits, batch["labels"], positions)
        for name in result.sums:
            self._sums[name] = self._sums.get(name, 0.0) + float(result.sums[name])
            self._counts[name] = self._counts.get(name, 0.0) + float(result.counts[name])
        self.metrics.update(logits, batch["labels"], positions)
        return logits

    def on_validation_epoch_end(self) -> None:
        if self._counts:
            # Each process validated its share of the cells.
            sums, counts, self.metrics.states = summed(self._sums), summed(self._counts), summed(self.metrics.states)
            values = {**self.objectives.pool(sums, counts), **self.metrics.compute()}
            self.validation = {f"validation/{name}": float(value) for name, value in values.items()}

    def configure_optimizers(self):
        settings = self.settings
        groups = decay_groups(
            self.model, settings.weight_decay or 0.0, settings.learning_rate, settings.layerwise_lr_decay or 1.0
        )
        if not groups:
            raise ConfigError("task.freeze_layers freezes every parameter of the model, so nothing would be trained")
        optimizer = torch.optim.AdamW(
            groups,
            lr=settings.learning_rate,
            betas=settings.betas,
            eps=settings.epsilon,
            # Gradients of float16 are scaled; the fused one scales them back after the place where they have to be clipped.
            fused=getattr(self.trainer.precision_plugin, "scaler", None) is None,
        )
        planned = planned_steps(self.trainer) if settings.schedule != "constant" else math.inf
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate_factor(settings, planned))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        """Clip, and look whether the gradients are numbers.

        As Lightning clips, but also where it refuses a fused optimiser although no gradient is scaled (bf16-mixed); scaled ones have
        been scaled back by now.
        """
        trained = [parameter for parameter in self.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in trained])
        if gradient_clip_val and gradient_clip_algorithm == GradClipAlgorithmType.VALUE:
            torch.nn.utils.clip_grad_value_(trained, gradient_clip_val)
        elif gradient_clip_val:
            torch.nn.utils.clip_grads_with_norm_(trained, gradient_clip_val, norm)
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        self.finite.gradients(whole(norm.detach()), scaled)


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
    settings = {
        name: value for name, value in plain["model"].items() if name not in (*WHERE_WEIGHTS_START, "path_shares")
    }
    units = prepared.units(run) if run.predicts_labels else {}
    labels = [entry | units.get(entry["label_column_name"], {}) for entry in plain["label_columns"]]
    labels = labels if run.predicts_labels else []
    model = build_model(
        settings,
        [_with_local_vectors(entry) for entry in fields],
        labels,
        label_dict=prepared.label_dict,
        vocabularies={name: vocabulary.tokens for name, vocabulary in prepared.vocabularies.items()},
    )
    for entry, written in zip(model.config.fields, fields, strict=True):
        if entry.get("pretrained_embedding"):  # its address, not the copy of it that was read
            entry["pretrained_embedding"]["filename"] = strip_userinfo(written["pretrained_embedding"]["filename"])
    if run.predicts_pairs:
        start_differences_at_zero(model)
    if run.model.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    objectives = build_objectives(
        run.trainer.losses or [],
        fields,
        model.config.label_columns,
        prepared.token_values(run),
        class_tables=prepared.class_tables(run) if labels else None,
    )
    module = TrainingModule(model, objectives, run.trainer, run.seed.seed_value)
    module.metrics = RunningMetrics(objectives, lambda: fit_constants(objectives, data_module.training_labels()))
    return module


def start_differences_at_zero(model) -> None:
    """Set the last layer of heads that predict differences to 0: before it has learned anything the model says what they are
    differences from, the mean of the training perturbations or the control cell."""
    for entry in model.config.fields:
        for mode in entry.get("decode_modes") or {}:
            if entry["field_name"] in DIFFERENCES and mode.endswith("regression"):
                last = list(model.cls.predictions.predictions.head(f"{entry['field_name']}_{mode}").modules())[-1]
                for weight in last.parameters():
                    torch.nn.init.zeros_(weight)


def _with_local_vectors(entry: dict[str, Any]) -> dict[str, Any]:
    """A field whose file of pretrained vectors lies on this machine."""
    settings = entry.get("pretrained_embedding")
    if not settings:
        return entry
    key = f"fields.{entry['field_name']}.pretrained_embedding.filename"
    file = localise(require_path(settings["filename"], key))
    return entry | {"pretrained_embedding": settings | {"filename": str(file)}}
