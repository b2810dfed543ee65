"""From a model's scores to stored rows at masked positions, batch by batch; and what is known of them without a model."""

import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bmfm_pipeline.config.losses import IGNORED_LABEL
from bmfm_pipeline.evaluation.field_predictions import Baseline, FieldWriter, Kind
from bmfm_pipeline.objectives.compute import Objectives
from bmfm_pipeline.objectives.constants import Constant, class_task, tasks_by_key, token_targets, value_tasks
from bmfm_pipeline.objectives.losses import linked, valid_mask
from bmfm_pipeline.objectives.tasks import LossTask

SCORES_AT_ONCE = 1 << 22  # of logarithms of probabilities: what is held beside the scores themselves


class GenePlaces:
    """Which gene stands at each position. `inputs` names the input fields in order, `others` the fields that are none; positions of a
    model without genes have none."""

    def __init__(self, inputs: list[str], others: list[str] = (), field: str = "genes"):
        self.inputs, self.others, self.field = inputs, others, field
        self._row = inputs.index(field) if field in inputs else None

    def at(self, batch: Mapping[str, Any]) -> np.ndarray | None:
        """(B, L) gene tokens, those that were hidden too."""
        if self._row is None:
            return None
        ids = batch["input_ids"][:, self._row].to(torch.int64)
        labels = batch.get("labels", {}).get(self.field)
        if isinstance(labels, Tensor) and labels.shape == ids.shape:
            ids = torch.where(labels != IGNORED_LABEL, labels.to(torch.int64), ids)
        return ids.numpy()

    def shows(self, field: str) -> bool:
        """Whether the input holds, where nothing is hidden, what is predicted of the field."""
        return field in self.inputs and f"label_{field}" not in self.others


class FieldRecorder:
    """Stores what the losses on fields are about: hand `objectives.positions` of a batch to the model, then its scores to `add`.

    Parameters
    ----------
    objectives : the losses of the run; those on label columns are left alone.
    writer : where rows go.
    places : which gene stands where.
    shares : {metric key: share of its positions that are stored}, 1 where not named. Which ones is a function of `seed`, of the cell
        and of the position, so that neither batches nor other cells matter.
    keys : (cells,) int64, what makes a cell's draws its own, by its number in the store; None takes the number.
    """

    def __init__(
        self,
        objectives: Objectives,
        writer: FieldWriter,
        places: GenePlaces,
        shares: Mapping[str, float] | None = None,
        keys: np.ndarray | None = None,
        seed: int = 0,
    ):
        self.objectives, self._writer, self._places = objectives, writer, places
        self._tasks = field_tasks(objectives)
        self._shares, self._keys, self._seed = dict(shares or {}), keys, seed

    @torch.inference_mode()
    def add(self, batch: Mapping[str, Any], positions: Mapping[str, Tensor], logits: Mapping[str, Tensor]) -> None:
        """Store one batch: as the data module gives it, the positions handed to the model, what the model returned."""
        labels, genes = batch.get("labels", {}), self._places.at(batch)
        for name, tasks in self._tasks.items():
            chosen = self._chosen(name, tasks[0], batch, positions)
            if (leading := class_task(tasks)) is not None:
                self._add_tokens(name, leading, chosen, batch, genes, logits, labels, positions)
            number, zero = value_tasks(tasks)
            if number is not None or zero is not None:
                self._add_numbers(name, number, zero, chosen, batch, genes, logits, labels, positions)

    def _chosen(self, name: str, task: LossTask, batch, positions) -> np.ndarray:
        """(N,) flat numbers into cells x places of the targets to store; places are positions, or tokens for a whole cell."""
        targets = batch["labels"][task.source]
        targets = targets[task.target] if task.target is not None else targets
        flat = np.flatnonzero(valid_mask(targets).reshape(-1).numpy())
        share = self._shares.get(name, 1.0)
        if share >= 1:
            return flat
        cell, place = np.divmod(flat, targets.shape[-1])
        keys = batch["cell_index"].numpy() if self._keys is None else self._keys[batch["cell_index"].numpy()]
        return flat[uniform(self._seed, zlib.crc32(name.encode()), keys[cell], place) < share]

    def _add_tokens(self, name, task, chosen, batch, genes, logits, labels, positions) -> None:
        scores, _ = self.objectives.select(task, logits, labels, positions)
        targets = token_targets(self.objectives, task, labels, positions)
        rows, targets = self._rows(task, chosen, batch, positions, targets)
        tokens, sizes = targets.numpy(), scores.shape[-1]
        said, sure = np.empty(len(tokens), np.int64), np.empty(len(tokens), np.float32)
        step = max(1, SCORES_AT_ONCE // sizes)
        for start in range(0, len(tokens), step):
            part = slice(start, start + step)
            own = scores.index_select(0, rows[part].to(scores.device))
            said[part] = own.argmax(dim=-1).cpu().numpy()
            true = own.gather(1, targets[part].to(own.device)[:, None]).squeeze(1)
            sure[part] = (true - own.logsumexp(dim=-1)).cpu().numpy()
        self._write(name, "token", task, chosen, batch, genes, label=tokens, prediction=said, log_probability=sure)

    def _add_numbers(self, name, number, zero, chosen, batch, genes, logits, labels, positions) -> None:
        task, found = number or zero, {}
        said_zero = None
        if zero is not None:
            scores, targets = self.objectives.select(zero, logits, labels, positions)
            rows, targets = self._rows(zero, chosen, batch, positions, targets)
            said_zero = scores.reshape(-1).index_select(0, rows.to(scores.device)).cpu()
            found["zero_probability"] = torch.sigmoid(said_zero).numpy()
        if number is not None:
            scores, targets = self.objectives.select(number, logits, labels, positions)
            rows, targets = self._rows(number, chosen, batch, positions, targets)
            values = scores.reshape(-1).index_select(0, rows.to(scores.device))
            values = linked(values, number.arguments["link_function"]).cpu()
            found["prediction"] = (values if said_zero is None else values.masked_fill(said_zero > 0, 0.0)).numpy()
        else:
            found["prediction"] = np.where(said_zero.numpy() > 0, 0.0, np.nan)
        # Tokens that stand for no number are no targets of a loss on numbers.
        known = valid_mask(targets).numpy()
        found = {"label": targets.float().numpy(), **found}
        self._write(
            name, "number", task, chosen[known], batch, genes, **{key: value[known] for key, value in found.items()}
        )

    def _rows(self, task: LossTask, chosen: np.ndarray, batch, positions, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(rows of the scores that belong to `chosen`, their targets)."""
        rows = torch.from_numpy(chosen)
        if task.target is None and positions and task.source in positions:
            rows = torch.searchsorted(positions[task.source], rows)
        return rows, targets.reshape(-1).index_select(0, rows)

    def _write(self, name: str, kind: Kind, task: LossTask, chosen: np.ndarray, batch, genes, **numbers) -> None:
        labels = batch["labels"][task.source]
        width = (labels if task.target is None else labels[task.target]).shape[-1]
        cell, place = np.divmod(chosen, width)
        if task.target is not None:
            gene = place  # a whole cell is predicted token by token
        else:
            gene = np.full(len(chosen), -1) if genes is None else genes[cell, place]
        names = np.asarray(batch["cell_name"], dtype=object)[cell]
        self._writer.add(name, kind, names, gene, **numbers)


def field_tasks(objectives: Objectives) -> dict[str, list[LossTask]]:
    """The losses on fields, by metric key."""
    return {key: tasks for key, tasks in tasks_by_key(objectives).items() if tasks[0].is_field}


_GAMMA, _MIX1, _MIX2 = (np.uint64(x) for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def uniform(seed: int, purpose: int, keys: np.ndarray, places: np.ndarray) -> np.ndarray:
    """(N,) numbers in [0, 1), a function of the arguments (SplitMix64, Steele, Lea and Flood 2014)."""
    state = np.full(len(keys), seed & 0xFFFFFFFFFFFFFFFF, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for part in (np.uint64(purpose), keys.astype(np.int64).view(np.uint64), places.astype(np.uint64)):
            state = (state + _GAMMA) ^ part
            state = (state ^ (state >> np.uint64(30))) * _MIX1
            state = (state ^ (state >> np.uint64(27))) * _MIX2
            state = state ^ (state >> np.uint64(31))
    return (state >> np.uint64(11)) * 2.0**-53


def shares_to_store(
    objectives: Objectives, batches: Iterable[Mapping[str, Any]], cells: int, most: int
) -> dict[str, float]:
    """{metric key: share of its positions to store} so that about `most` rows are stored of `cells` cells, those of `batches`.

    Fields with few positions keep them all; the others share what is left. Batches are read only where it could be too many.
    """
    tasks = field_tasks(objectives)
    counts = dict.fromkeys(tasks, 0)
    for number, batch in enumerate(batches):
        targets = {name: _targets(batch, own[0]) for name, own in tasks.items()}
        if not number and cells * sum(labels.shape[-1] for labels in targets.values()) <= most:
            return {}
        for name, labels in targets.items():
            counts[name] += int(valid_mask(labels).sum())
    shares, left = {}, most
    for place, name in enumerate(sorted(counts, key=counts.get)):
        own = min(counts[name], left // (len(counts) - place))
        left -= own
        shares[name] = own / counts[name] if counts[name] else 1.0
    return shares


def _targets(batch: Mapping[str, Any], task: LossTask) -> Tensor:
    labels = batch["labels"][task.source]
    return labels if task.target is None else labels[task.target]


def baselines(
    objectives: Objectives,
    constants: Mapping[str, Constant],
    shares: Mapping[str, float],
    gene_means: Mapping[str, dict[str, float]],
    token_values: Mapping[str, np.ndarray],
) -> dict[tuple[str, Kind], Baseline]:
    """What is known of every field without the model, by metric key and by how it is scored."""
    found: dict[tuple[str, Kind], Baseline] = {}
    for name, tasks in field_tasks(objectives).items():
        constant, share = constants.get(name, Constant()), shares.get(name, 1.0)
        leading, (number, zero) = class_task(tasks), value_tasks(tasks)
        if leading is not None:
            counts = None if constant.shares is None else constant.shares.numpy().astype(np.float64)
            found[name, "token"] = Baseline(
                token=constant.token,
                token_counts=counts,
                token_values=token_values.get(leading.source),
                gene_means=gene_means.get(name, {}),
                share=share,
            )
        if number is not None or zero is not None:
            found[name, "number"] = Baseline(
                mean=constant.mean,
                median=constant.median,
                zero=constant.zero,
                gene_means=gene_means.get(name, {}),
                ignores_zero=number is not None and zero is None and number.arguments["ignore_zero"],
                says_zero=zero is not None,
                has_number=number is not None,
                share=share,
            )
    return found


def mean_by_gene(
    objectives: Objectives,
    batches: Iterable[Mapping[str, Any]],
    places: GenePlaces,
    genes: list[str],
    token_values: Mapping[str, np.ndarray],
) -> dict[str, dict[str, float]]:
    """{metric key: {gene: mean of its numbers}} over the cells of `batches`, training cells: hidden values and values shown alike."""
    tasks = {name: own[0] for name, own in field_tasks(objectives).items()}
    tasks = {name: task for name, task in tasks.items() if _has_numbers(name, task, objectives, token_values)}
    sums = {name: np.zeros((2, len(genes))) for name in tasks}
    for batch in batches if tasks else ():
        at = places.at(batch)
        for name, task in tasks.items():
            for gene, values in _numbers_of(batch, task, at, places, token_values.get(task.source)):
                sums[name][0] += np.bincount(gene, values, minlength=len(genes))[: len(genes)]
                sums[name][1] += np.bincount(gene, minlength=len(genes))[: len(genes)]
    return {
        name: {genes[token]: float(total[token] / count[token]) for token in np.flatnonzero(count)}
        for name, (total, count) in sums.items()
    }


def _has_numbers(name: str, task: LossTask, objectives: Objectives, token_values) -> bool:
    return task.source in token_values or any(value_tasks(field_tasks(objectives)[name]))


def _numbers_of(batch, task: LossTask, genes, places: GenePlaces, table) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(gene tokens, numbers) of one field in a batch."""
    labels = _targets(batch, task)
    known = valid_mask(labels)
    if task.target is not None:
        yield np.nonzero(known.numpy())[1], labels[known].numpy().astype(np.float64)
        return
    if genes is None:
        return
    raw = torch.where(known, labels.double(), -1.0)
    if places.shows(task.source):
        raw = torch.where(known, raw, batch["input_ids"][:, places.inputs.index(task.source)].double())
    values = raw.numpy()
    # Special tokens are negative among numbers, and tokens without a number.
    values = np.where(values < 0, np.nan, values) if table is None else _looked_up(values, table)
    there = np.isfinite(values)
    yield genes[there], values[there]


def _looked_up(tokens: np.ndarray, table: np.ndarray) -> np.ndarray:
    inside = (tokens >= 0) & (tokens < len(table))
    return np.where(inside, table[np.where(inside, tokens, 0).astype(np.int64)], np.nan)
