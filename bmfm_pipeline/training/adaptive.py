"""Masking that follows the errors: genes whose values a validation predicted worst are masked, or shown, more in the epochs after it."""

from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch

from bmfm_pipeline.errors import ConfigError, DataError
from bmfm_pipeline.training.together import summed

BINS = 100
MASK = 4
WITH_VALUES = ("cross_entropy", "focal", "token_value", "mse", "mae")


def error_weights(
    errors: np.ndarray, seen: np.ndarray, temperature: float | None = None, decreasing: bool = False
) -> np.ndarray:
    """Relative rates float32 (n,) from mean absolute errors (n,): 100 bins of equal width between the least and the largest.

    A gene in bin 0..99 gets (bin + 1) / 101, with `decreasing` after errors were turned round (largest - error); a `temperature`
    puts them through a softmax of weight / temperature, scaled to a mean of 1. Genes not in `seen`, bool (n,), get the mean of the others.
    """
    weights = np.ones(len(errors), dtype=np.float64)
    if not seen.any():
        return weights.astype(np.float32)
    found = np.asarray(errors, dtype=np.float64)[seen]
    if decreasing:
        found = found.max() - found
    # The least value belongs to the first bin; each other one to the bin it ends in or lies in.
    edges = np.linspace(found.min(), found.max(), BINS + 1)
    bins = np.clip(np.searchsorted(edges, found, side="left") - 1, 0, BINS - 1)
    rates = (bins + 1) / (BINS + 1)
    if temperature is not None:
        rates = np.exp((rates - rates.max()) / temperature)
        rates /= rates.mean()
    weights[seen], weights[~seen] = rates, rates.mean()
    return weights.astype(np.float32)


class GeneErrors:
    """Sums of |prediction - label| and counts by gene token, over the positions or whole cells that a field's losses look at."""

    def __init__(
        self, key: str, objectives, field: str, vocab_size: int, genes_row: int, token_values: torch.Tensor | None
    ):
        self.objectives, self.genes_row, self.token_values = objectives, genes_row, token_values
        tasks = [task for task in objectives.tasks if task.is_field and task.source == field]
        self.task = next((task for task in tasks if task.objective in WITH_VALUES), None)
        if self.task is None:
            raise ConfigError(
                f"{key} needs a loss that predicts values of the field '{field}' "
                f"({', '.join(WITH_VALUES)}), found {', '.join(task.objective for task in tasks) or 'none'}"
            )
        self.sums = np.zeros(vocab_size)
        self.counts = np.zeros(vocab_size)

    def reset(self) -> None:
        self.sums[:], self.counts[:] = 0, 0

    @torch.no_grad()
    def add(self, logits: dict[str, torch.Tensor], batch: dict[str, Any]) -> None:
        """Count one validation batch with the model's output for it."""
        task, labels = self.task, batch["labels"]
        predicted = self.objectives.predict(task.metric_key, logits)
        if task.target is not None:
            sets = labels[task.source]
            # In evaluation a model may see every gene of a cell, which leaves nothing in the set of those that it does not see.
            targets = sets.get("all", sets[task.target])
            error = (predicted.float() - targets).abs()
            known = targets != -100
            self.sums += torch.where(known, error, 0).sum(dim=0).double().cpu().numpy()
            self.counts += known.sum(dim=0).cpu().numpy()
            return
        where = batch["positions"][task.source].to(predicted.device)
        targets = labels[task.source].reshape(-1)[where]
        genes = batch["input_ids"][:, self.genes_row].reshape(-1)[where].long()
        if "genes" in labels:  # the gene itself may be hidden
            hidden = labels["genes"].reshape(-1)[where]
            genes = torch.where((genes == MASK) & (hidden >= 0), hidden.long(), genes)
        error = (self._values(predicted.reshape(-1)) - self._values(targets)).abs().double().cpu().numpy()
        genes = genes.cpu().numpy()
        self.sums += np.bincount(genes, error, minlength=len(self.sums))
        self.counts += np.bincount(genes, minlength=len(self.counts))

    def _values(self, found: torch.Tensor) -> torch.Tensor:
        """Numbers, or the numbers that tokens stand for; a special token, which stands for none, counts as 0."""
        if self.token_values is None:
            return found.float()
        return self.token_values.to(found.device)[found.long()].nan_to_num(0.0).float()

    def add_up(self) -> None:
        """Add what the other processes found in their shares of the cells."""
        found = summed({"sums": torch.from_numpy(self.sums), "counts": torch.from_numpy(self.counts)})
        self.sums, self.counts = found["sums"].numpy(), found["counts"].numpy()

    def means(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean absolute error (V,) by gene token, and which tokens were seen, bool (V,)."""
        return self.sums / np.maximum(self.counts, 1), self.counts > 0


class AdaptiveMasking(pl.Callback):
    """Reweighs genes after each validation, for the epochs that begin after it: batches that are built ahead do not depend on when.

    `asked` has temperature and decreasing. With `dropout` the weights say how readily a gene is dropped from the input, else how often
    it is masked; those of the config multiply them. What holds, and what will hold, is
    in every checkpoint. Stands before the callback that saves.
    """

    def __init__(self, data, errors: GeneErrors, position, asked, dropout: bool = False):
        self.data, self.errors, self.position, self.asked, self.dropout = data, errors, position, asked, dropout
        builder = data.builder
        self.own = builder.tables.dropout_weights if dropout else builder.mask_weights
        self.weights: list[tuple[int, torch.Tensor]] = []  # (first epoch, by gene column): what holds, and what will

    @property
    def state_key(self) -> str:
        return f"{type(self).__qualname__}.{'dropout' if self.dropout else 'masking'}"

    def on_validation_start(self, trainer, module) -> None:
        self.errors.reset()

    def on_validation_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        if not trainer.sanity_checking:
            self.errors.add(outputs, batch)

    def on_validation_end(self, trainer, module) -> None:
        if trainer.sanity_checking:
            return
        self.errors.add_up()
        if not self.errors.counts.any():
            return
        means, seen = self.errors.means()
        by_token = error_weights(means, seen, self.asked.temperature, self.asked.decreasing)
        weights = by_token[self.data.gene_token_ids]
        if self.own is not None and len(self.own):
            weights = weights * np.asarray(self.own, dtype=np.float32)
        first = self.position.epoch + (1 if self.position.batches else 0)
        self.weights = [*[entry for entry in self.weights if entry[0] < first][-1:], (first, torch.from_numpy(weights))]
        if not self.dropout:
            self._hand_over(first)

    def on_train_epoch_start(self, trainer, module) -> None:
        self._hand_over(trainer.current_epoch)

    def _hand_over(self, epoch: int) -> None:
        """Masking weights know from which epoch on they hold; dropout weights hold at once, so they wait for their epoch."""
        if not self.dropout:
            for first, weights in self.weights:
                self.data.set_mask_weights(weights.numpy(), first)
        elif due := [weights for first, weights in self.weights if first <= epoch]:
            self.data.set_dropout_weights(due[-1].numpy())

    def state_dict(self) -> dict[str, Any]:
        return {"weights": [[first, weights] for first, weights in self.weights]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weights = [(int(first), weights) for first, weights in state["weights"]]
        self._hand_over(self.position.epoch)


def adaptive_masking(run, data, module, position) -> list[AdaptiveMasking]:
    """The callbacks that a run's masking_strategy and selective_dropout ask for. Raises ConfigError and DataError."""
    settings = run.data_module
    masking, dropping = settings.masking_strategy, settings.selective_dropout
    asked = [("masking_strategy", masking, False)] if masking is not None and masking.kind == "adaptive" else []
    asked += [("selective_dropout", dropping, True)] if dropping is not None and dropping.adaptive else []
    if not asked:
        return []
    key = f"data_module.{asked[0][0]}: adaptive"
    if not len(data.rows["dev"]):
        raise DataError(
            f"{key} follows the errors of validations, and the split has no dev cells; set "
            "data_module.transform_kwargs.split_weights.dev above 0"
        )
    inputs = [entry for entry in run.fields if entry.is_input]
    whole = masking is not None and masking.kind == "wced"
    field = next((e for e in inputs if e.field_name != "genes" and (whole or e.is_masked)), None)
    if field is None or not (whole or run.predicts_fields):
        raise ConfigError(
            f"{key} needs values that are predicted: a masked field, such as expressions, or whole-cell targets"
        )
    table = None if field.continuous else data.prepared.token_values(run)[field.field_name]
    table = None if table is None else torch.as_tensor(np.asarray(table, dtype=np.float32))
    row, tokens = [entry.field_name for entry in inputs].index("genes"), len(data.prepared.vocabularies["genes"])
    return [
        AdaptiveMasking(
            data, GeneErrors(key, module.objectives, field.field_name, tokens, row, table), position, how, drop
        )
        for _, how, drop in asked
    ]
