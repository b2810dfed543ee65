"""From logits and labels to the loss of a batch, the values that are logged, and the predictions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bmfm_pipeline.config.losses import IGNORED_LABEL
from bmfm_pipeline.errors import ConfigError
from bmfm_pipeline.objectives.losses import FUNCTIONS, linked, valid_mask
from bmfm_pipeline.objectives.tasks import LossTask, read_tasks

Positions = Mapping[str, Tensor]


@dataclass
class LossResult:
    """The loss of one batch.

    `total` keeps its graph. `values`, `sums` and `counts` are detached scalars by loss key (`genes_cross_entropy_loss`): a loss
    is its sum over its count, so sums and counts may be added over batches and all-reduced over processes. `contributes` is 1
    where the loss is part of the total.
    """

    total: Tensor
    values: dict[str, Tensor]
    sums: dict[str, Tensor]
    counts: dict[str, Tensor]
    contributes: dict[str, Tensor]

    @property
    def parts(self) -> dict[str, Tensor]:
        """The losses that are part of the total. Reading it waits for the device, so read it where values are logged."""
        return {key: value for key, value in self.values.items() if bool(self.contributes[key])}


class Objectives:
    """The weighted losses of a run.

    The total is sum(w l) / sum(w) over the losses that have a target in the batch. A batch without any target of cross_entropy,
    focal, token_value, is_zero_focal, bce_with_logits or hce leaves that loss and its weight out; for mse, mae, is_zero_bce the loss
    is then 0 and its weight still counts, as in bmfm_targets, unless `empty_loss_counts` is False. A total without any loss is 0
    and still has a graph (zero gradients), so that no process of a group is left waiting. A NaN score is not hidden: the total
    becomes NaN.
    """

    def __init__(
        self,
        tasks: Sequence[LossTask],
        token_values: Mapping[str, Tensor],
        tokenised: set[str],
        empty_loss_counts: bool = True,
    ):
        self.tasks = list(tasks)
        self.empty_loss_counts = empty_loss_counts
        self._token_values = dict(token_values)
        self._tokenised = tokenised

    @property
    def names(self) -> list[str]:
        return [task.name for task in self.tasks]

    @property
    def metric_keys(self) -> list[str]:
        return [task.metric_key for task in self.tasks]

    def positions(self, labels: Mapping[str, Any]) -> dict[str, Tensor]:
        """For each field with a loss per position, the flat indices into B * L that have a target; hand it to the model's forward.

        Call it on labels in host memory: finding indices on an accelerator waits for the device.
        """
        wanted = dict.fromkeys(task.source for task in self.tasks if task.is_field and task.target is None)
        return {name: valid_mask(_labels_of(labels, name)).reshape(-1).nonzero().squeeze(-1) for name in wanted}

    def select(
        self,
        task: LossTask,
        logits: Mapping[str, Tensor],
        labels: Mapping[str, Any],
        positions: Positions | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Scores in float32 and matching targets of one task, as its loss function takes them."""
        scores = _scores(task, logits).float()
        targets = _labels_of(labels, task.source)
        if task.target is not None:
            return scores, targets[task.target]
        if task.is_field and positions is not None:
            targets = targets.reshape(-1).index_select(0, positions[task.source].to(targets.device))
        shape = FUNCTIONS[task.objective].shape
        if shape in ("classes", "token_values"):
            scores, targets = scores.reshape(-1, scores.shape[-1]), targets.reshape(-1)
        elif shape == "values":
            scores = scores.squeeze(-1)
            targets = targets.reshape(scores.shape)
        if task.is_field and shape != "classes" and task.source in self._tokenised:
            targets = self._values_of_tokens(task, targets)
        if shape == "classes" and targets.is_floating_point():
            targets = targets.nan_to_num(IGNORED_LABEL).to(torch.int64)
        return scores, targets

    def _values_of_tokens(self, task: LossTask, targets: Tensor) -> Tensor:
        """The number each target token stands for; tokens without one are ignored. Without a table, ids are taken as values."""
        table = self._token_values.get(task.source)
        if table is None:
            return targets
        table = table.to(targets.device)
        self._token_values[task.source] = table
        values = table[targets.clamp(min=0)]
        return torch.where(targets == IGNORED_LABEL, torch.full_like(values, IGNORED_LABEL), values)

    def compute(
        self, logits: Mapping[str, Tensor], labels: Mapping[str, Any], positions: Positions | None = None
    ) -> LossResult:
        """The loss of a batch.

        `logits` as the model returns them; `labels` (B, L) per field, (B,) or (B, C) per label column, {set: (B, V)} per field
        for whole-cell losses; `positions` what was handed to the model, if anything was.
        """
        values, sums, counts, contributes = {}, {}, {}, {}
        weighted, weights = [], []
        device = next(iter(logits.values())).device
        with torch.autocast(device.type, enabled=False):
            for task in self.tasks:
                function = FUNCTIONS[task.objective]
                scores, targets = self.select(task, logits, labels, positions)
                options = dict(task.arguments)
                if function.shape == "token_values":
                    options["token_values"] = self._token_values[task.source].to(scores.device)
                total, count = function.compute(scores, targets, **options)
                present = count > 0
                value = total / (count.clamp(min=1.0) + function.epsilon)
                counted = torch.ones_like(present) if function.zero_when_empty and self.empty_loss_counts else present
                key = task.loss_key
                values[key], sums[key], counts[key] = value.detach(), total.detach(), count
                contributes[key] = counted
                weighted.append(torch.where(counted, task.weight * value, torch.zeros_like(value)))
                weights.append(counted.to(torch.float32) * task.weight)
            weight = torch.stack(weights).sum()
            total = torch.stack(weighted).sum() / torch.where(weight > 0, weight, torch.ones_like(weight))
        return LossResult(total, values, sums, counts, contributes)

    def pool(self, sums: Mapping[str, float], counts: Mapping[str, float]) -> dict[str, float]:
        """Loss values and `loss`, the weighted total, from sums and counts added over batches or processes."""
        values: dict[str, float] = {}
        top = bottom = 0.0
        for task in self.tasks:
            function, key = FUNCTIONS[task.objective], task.loss_key
            if not counts[key] and not (function.zero_when_empty and self.empty_loss_counts):
                continue
            values[key] = float(sums[key]) / (max(float(counts[key]), 1.0) + function.epsilon)
            top, bottom = top + task.weight * values[key], bottom + task.weight
        return values | {"loss": top / bottom if bottom else 0.0}

    def predictions(self, logits: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Predictions by metric key, shaped like the scores.

        Class ids, numbers (after the link function), 0/1 for "is zero", probabilities for multilabel columns. Losses that share a
        key are read together: a number is 0 where the same position is said to be zero.
        """
        return {key: self.predict(key, logits) for key in dict.fromkeys(self.metric_keys)}

    def predict(self, metric_key: str, logits: Mapping[str, Tensor]) -> Tensor:
        """The prediction of one metric key."""
        tasks = {task.objective: task for task in self.tasks if task.metric_key == metric_key}
        zero = next((tasks[name] for name in ("is_zero_bce", "is_zero_focal") if name in tasks), None)
        for name in ("cross_entropy", "focal", "token_value", "hce"):
            if name in tasks:
                return _scores(tasks[name], logits).argmax(dim=-1)
        if "bce_with_logits" in tasks:
            return torch.sigmoid(_scores(tasks["bce_with_logits"], logits).float())
        number = tasks.get("mse") or tasks.get("mae")
        if number is None:
            return (_scores(zero, logits) > 0).to(torch.int64)
        scores = linked(_scores(number, logits).float(), number.arguments["link_function"])
        if zero is not None:
            scores = torch.where(_scores(zero, logits) > 0, torch.zeros_like(scores), scores)
        return scores if number.is_field else scores.squeeze(-1)


def _scores(task: LossTask, logits: Mapping[str, Tensor]) -> Tensor:
    if task.logits_key not in logits:
        raise ConfigError(
            f"loss {task.name}: the model has no output {task.logits_key!r}; its outputs are {', '.join(logits)}"
        )
    scores = logits[task.logits_key]
    if task.target is None:
        return scores
    # A whole-cell head speaks at position 0 only.
    first = scores[:, 0]
    return first if task.output_index is None else first[..., task.output_index]


def _labels_of(labels: Mapping[str, Any], source: str) -> Any:
    if source not in labels:
        raise ConfigError(
            f"loss on {source!r}: the batch has labels for {', '.join(labels) or 'nothing'}; is the field masked, the column read?"
        )
    return labels[source]


def build_objectives(
    losses: Sequence[Mapping[str, Any]],
    fields: Sequence[Mapping[str, Any]],
    label_columns: Sequence[Mapping[str, Any]] = (),
    token_values: Mapping[str, Any] | None = None,
    *,
    empty_loss_counts: bool = True,
) -> Objectives:
    """Objectives from a configuration's loss entries.

    `token_values` {field: (V,) number of each token, NaN for none} lets numeric losses on a tokenised field compare values rather
    than token ids. Raises ConfigError.
    """
    tasks = read_tasks(losses, fields, label_columns)
    tables = {
        name: torch.as_tensor(np.asarray(values, dtype=np.float64), dtype=torch.float32)
        for name, values in (token_values or {}).items()
        if values is not None
    }
    for task in tasks:
        if task.objective == "token_value" and task.source not in tables:
            raise ConfigError(
                f"loss {task.name}: needs the values of the tokens of {task.source}, which must be a tokenised numeric field"
            )
    tokenised = {
        entry["field_name"] for entry in fields if entry.get("tokenization_strategy", "tokenize") in (None, "tokenize")
    }
    return Objectives(tasks, tables, tokenised, empty_loss_counts)
