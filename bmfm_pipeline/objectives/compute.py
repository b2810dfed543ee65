"""From logits and labels to the loss of a batch, the values that are logged, and the predictions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bmfm_pipeline.config.losses import IGNORED_LABEL
from bmfm_pipeline.errors import ConfigError
from bmfm_pipeline.models.heads import PATHS
from bmfm_pipeline.objectives.losses import FUNCTIONS, count_targets, linked, valid_mask
from bmfm_pipeline.objectives.options import ClassTables, loss_options
from bmfm_pipeline.objectives.tasks import LossTask, read_tasks

Positions = Mapping[str, Tensor]


@dataclass
class LossResult:
    """The loss of one batch.

    `total` keeps its graph. `values`, `sums` and `counts` are detached scalars by loss key (`genes_cross_entropy_loss`): a loss
    is its sum over its count, so sums and counts may be added over batches and all-reduced over processes. `contributes` is 1
    where the loss has a value and its weight counts in the total.
    """

    total: Tensor
    values: dict[str, Tensor]
    sums: dict[str, Tensor]
    counts: dict[str, Tensor]
    contributes: dict[str, Tensor]

    @property
    def parts(self) -> dict[str, Tensor]:
        """The losses that have a value. Reading it waits for the device, so read it where values are logged."""
        return {key: value for key, value in self.values.items() if bool(self.contributes[key])}


class Objectives:
    """The weighted losses of a run.

    The total is sum(w l) / sum(w) over the losses that have a target in the batch. A batch without any target of a loss leaves that
    loss and its weight out; for mse, mae, is_zero_bce the loss is then 0 and its weight still counts, as in bmfm_targets, unless
    `empty_loss_counts` is False. A total without any loss is 0 and still has a graph (zero gradients), so that no process of a
    group is left waiting. A NaN score is not hidden: the total becomes NaN. A loss of weight 0 is computed and logged, and that
    is all: nothing is learned from it, and NaN in it does not reach the total.

    Build it with `build_objectives`. Not a module: its tables follow the scores to their device.
    """

    def __init__(
        self,
        tasks: Sequence[LossTask],
        token_values: Mapping[str, Tensor],
        tokenised: set[str],
        empty_loss_counts: bool = True,
        options: Mapping[str, Mapping[str, Any]] | None = None,
    ):
        self.tasks = list(tasks)
        self.empty_loss_counts = empty_loss_counts
        self._token_values = dict(token_values)
        self._tokenised = tokenised
        given = options if options is not None else {task.loss_key: task.arguments for task in self.tasks}
        self._options = {key: dict(values) for key, values in given.items()}

    @property
    def names(self) -> list[str]:
        return [task.name for task in self.tasks]

    @property
    def metric_keys(self) -> list[str]:
        return [task.metric_key for task in self.tasks]

    @property
    def loss_keys(self) -> list[str]:
        return [task.loss_key for task in self.tasks]

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
        scores, targets = _scores(task, logits).float(), self.targets(task, labels, positions)
        if task.target is not None:
            return scores, targets
        shape = FUNCTIONS[task.objective].shape
        if shape in ("classes", "token_values"):
            scores = scores.reshape(-1, scores.shape[-1])
        elif shape == "values":
            scores = scores.squeeze(-1)
            targets = targets.reshape(scores.shape)
        return scores, targets

    def targets(self, task: LossTask, labels: Mapping[str, Any], positions: Positions | None = None) -> Tensor:
        """The targets of one task, flat where they are class ids, as its loss function takes them; at `positions` where given."""
        targets = _labels_of(labels, task.source)
        if task.target is not None:
            return targets[task.target]
        if task.is_field and positions is not None:
            targets = targets.reshape(-1).index_select(0, positions[task.source].to(targets.device))
        shape = FUNCTIONS[task.objective].shape
        if shape in ("classes", "token_values"):
            targets = targets.reshape(-1)
        if task.is_field and shape != "classes" and task.source in self._tokenised:
            targets = self._values_of_tokens(task, targets)
        if shape == "classes" and targets.is_floating_point():
            targets = targets.nan_to_num(IGNORED_LABEL).to(torch.int64)
        return targets

    def _values_of_tokens(self, task: LossTask, targets: Tensor) -> Tensor:
        """The number each target token stands for; tokens without one are ignored. Without a table, ids are taken as values."""
        table = self._token_values.get(task.source)
        if table is None:
            return targets
        table = table.to(targets.device)
        self._token_values[task.source] = table
        values = table[targets.clamp(min=0)]
        return torch.where(targets == IGNORED_LABEL, torch.full_like(values, IGNORED_LABEL), values)

    def options(self, task: LossTask, device: torch.device, epoch: int | None = None) -> dict[str, Any]:
        """Keyword arguments of a task's loss function, tensors on `device`, in an epoch of training (None: not in training)."""
        kept = self._options[task.loss_key]
        for name, value in kept.items():
            if isinstance(value, Tensor) and value.device != device:
                kept[name] = value.to(device)
        found = {name: value for name, value in kept.items() if name != "weights_from_epoch"}
        if epoch is not None and epoch < kept.get("weights_from_epoch", 0):
            found["weights"] = None
        return found

    def measure(
        self,
        logits: Mapping[str, Tensor],
        labels: Mapping[str, Any],
        positions: Positions | None = None,
        epoch: int | None = None,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Sums, with their graph, and counts of the losses by loss key; the arguments are those of `compute`."""
        sums, counts = {}, {}
        device = next(iter(logits.values())).device
        with torch.autocast(device.type, enabled=False):
            for task in self.tasks:
                scores, targets = self.select(task, logits, labels, positions)
                options = self.options(task, scores.device, epoch)
                learned_from = [part if task.weight else part.detach() for part in _paths(task, logits) or (scores,)]
                parts = [FUNCTIONS[task.objective].compute(part, targets, **options) for part in learned_from]
                total, count = sum(part for part, _ in parts) / len(parts), parts[0][1]
                sums[task.loss_key], counts[task.loss_key] = total if task.weight else total + _untouched(scores), count
        return sums, counts

    def counts(
        self, labels: Mapping[str, Any], positions: Positions | None = None, epoch: int | None = None
    ) -> dict[str, Tensor]:
        """The counts that `measure` returns, from the labels alone: what a batch weighs is known before it is computed."""
        found = {}
        for task in self.tasks:
            targets = self.targets(task, labels, positions)
            options = self.options(task, targets.device, epoch)
            found[task.loss_key] = count_targets(task.objective, targets, options)
        return found

    def combine(self, sums: Mapping[str, Tensor], counts: Mapping[str, Tensor]) -> LossResult:
        """The loss from sums and counts. With the counts of several batches or processes, the part that these sums add to it."""
        values, contributes = {}, {}
        weighted, weights = [], []
        for task in self.tasks:
            function, key = FUNCTIONS[task.objective], task.loss_key
            total, count = sums[key], counts[key]
            counted = count > 0
            if function.zero_when_empty and self.empty_loss_counts:
                counted = torch.ones_like(counted)
            value = total / (_or_one(count) + function.epsilon)
            values[key], contributes[key] = value.detach(), counted
            learned = counted if task.weight else torch.zeros_like(counted)
            weighted.append(torch.where(learned, task.weight * value, torch.zeros_like(value)))
            weights.append(counted.to(torch.float32) * task.weight)
        total = torch.stack(weighted).sum() / _or_one(torch.stack(weights).sum())
        detached = {key: value.detach() for key, value in sums.items()}
        return LossResult(total, values, detached, dict(counts), contributes)

    def compute(
        self,
        logits: Mapping[str, Tensor],
        labels: Mapping[str, Any],
        positions: Positions | None = None,
        epoch: int | None = None,
    ) -> LossResult:
        """The loss of a batch.

        `logits` as the model returns them; `labels` (B, L) per field, (B,) or (B, C) per label column, {set: (B, V)} per field
        for whole-cell losses; `positions` what was handed to the model, if anything was; `epoch` in training, for losses that change
        on the way (ldam with drw_epochs): without it they are what they end as, so that validations can be compared.
        """
        return self.combine(*self.measure(logits, labels, positions, epoch))

    def pool(self, sums: Mapping[str, float], counts: Mapping[str, float]) -> dict[str, float]:
        """Loss values and `loss`, the weighted total, from sums and counts added over batches or processes."""
        values: dict[str, float] = {}
        top = bottom = 0.0
        for task in self.tasks:
            function, key = FUNCTIONS[task.objective], task.loss_key
            count = float(counts[key])
            if not count and not (function.zero_when_empty and self.empty_loss_counts):
                continue
            values[key] = float(sums[key]) / ((count or 1.0) + function.epsilon)
            if task.weight:
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
        for name in ("cross_entropy", "focal", "ldam", "token_value", "hce"):
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


def _or_one(count: Tensor) -> Tensor:
    """A count to divide by."""
    return torch.where(count > 0, count, torch.ones_like(count))


def _untouched(scores: Tensor) -> Tensor:
    """0, whatever the scores are, with zero gradients: processes of a group wait for gradients of all parameters."""
    never = torch.zeros((), dtype=torch.bool, device=scores.device)
    return torch.where(never, scores, torch.zeros_like(scores)).sum()


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


def _paths(task: LossTask, logits: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """The scores of each path where the scores are the mean of several: each learns as if it were alone."""
    found = logits.get(task.logits_key + PATHS)
    if found is None or task.is_field:
        return ()
    squeeze = FUNCTIONS[task.objective].shape == "values"
    return tuple((part.squeeze(-1) if squeeze else part).float() for part in found.unbind(0))


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
    class_tables: Mapping[str, ClassTables] | None = None,
    empty_loss_counts: bool = True,
) -> Objectives:
    """Objectives from a configuration's loss entries.

    `token_values` {field: (V,) number of each token, NaN for none} lets numeric losses on a tokenised field compare values rather
    than token ids. `class_tables` {label column: sizes of its classes in training, what an ontology allows} is what weighted losses,
    ldam and hce need. Raises ConfigError.
    """
    tasks = read_tasks(losses, fields, label_columns)
    tables = {
        name: torch.as_tensor(np.asarray(values, dtype=np.float64), dtype=torch.float32)
        for name, values in (token_values or {}).items()
        if values is not None
    }
    tokenised = {
        entry["field_name"] for entry in fields if entry.get("tokenization_strategy", "tokenize") in (None, "tokenize")
    }
    units = {entry["label_column_name"]: entry.get("value_scale") or 1.0 for entry in label_columns}
    options = {
        task.loss_key: loss_options(
            task,
            tables.get(task.source),
            (class_tables or {}).get(task.source),
            1.0 if task.is_field else units[task.source],
        )
        for task in tasks
    }
    return Objectives(tasks, tables, tokenised, empty_loss_counts, options)
