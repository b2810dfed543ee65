"""CellDataModule: loaders over a processed artefact for Lightning, with samplers that know epoch and position."""

import copy
import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
from torch.utils.data import DataLoader

from bmfm_pipeline.batching import (
    BatchBuilder,
    CellDataset,
    EpochBatchSampler,
    SequenceBuilder,
    balancing_weights,
    choose_rows,
    make_loader,
)
from bmfm_pipeline.config import RunConfig
from bmfm_pipeline.errors import ConfigError, DataError
from bmfm_pipeline.training.perturbed import check_matched
from bmfm_pipeline.training.prepared import PreparedData
from bmfm_pipeline.training.schedule import Schedule, ScheduledCells, ScheduledSampler
from bmfm_pipeline.training.together import StepLoader

SPLITS = ("train", "dev", "test")
# Training cells that the constant guess at masked values is fitted to.
CELLS_FOR_CONSTANTS = 2000


class CellDataModule(pl.LightningDataModule):
    """Batches of a run's cells.

    `data` is the folder of a preprocess artefact; without it `prepare()` makes one and returns where it lies.
    """

    def __init__(self, run: RunConfig, data: str | Path | None, prepare: Callable[[], str | Path] | None = None):
        super().__init__()
        self.run, self._prepare = run, prepare
        self.prepared = PreparedData(data) if data is not None else None
        entries = run.data_module.batch_schedule
        self.schedule = Schedule(entries) if entries else None
        self.builder: BatchBuilder | None = None
        self.builders: dict[int, BatchBuilder] = {}  # by length; `builder` is that of max_length
        self.rows: dict[str, np.ndarray] = {}
        self.train_sampler: EpochBatchSampler | None = None
        self.count_targets: Callable | None = None  # of the objectives, where steps are made of several batches

    def prepare_data(self) -> None:
        """Make the processed data, or find it again."""
        if self.prepared is not None:
            return
        if self._prepare is None:
            raise ConfigError(
                "the data module has neither data nor a way to make it; give `data`, the folder of a preprocess artefact "
                "(`bmfm preprocess` makes one), or `prepare`, a function that returns such a folder"
            )
        self.prepared = PreparedData(self._prepare())

    def setup(self, stage: str | None = None) -> None:
        """Build batch builder, rows of every split and the training sampler, once: a position that was restored stays."""
        if self.builder is None:
            self.prepare_data()  # in the processes where Lightning did not call it
            self._build()
        if stage == "fit" and not len(self.rows["train"]):
            raise DataError(
                f"{self.prepared.folder}: the split has no training cells; set data_module.transform_kwargs.split_weights.train above 0"
            )
        follows = self.trainer is None or self.trainer.reload_dataloaders_every_n_epochs == 1
        if stage == "fit" and self.schedule is not None and not follows:
            raise ConfigError(
                "data_module.batch_schedule gives epochs different numbers of batches, which the Trainer has to count anew: make it "
                "with reload_dataloaders_every_n_epochs=1"
            )

    def _build(self) -> None:
        module, seed = self.run.data_module, self.run.seed.seed_value
        specs, labels = self.prepared.field_specs(self.run), self.prepared.labels(self.run)
        config, options = self.prepared.batching_config(self.run), self.prepared.builder_options(self.run)
        build = BatchBuilder if module.sequences is None else SequenceBuilder
        builders = {
            length: build(self.prepared.store, specs, dataclasses.replace(config, max_length=length), labels, **options)
            for length in module.lengths
        }
        for builder in builders.values():
            builder.report = builders[module.max_length].report  # one account of what was left out
        everyone = np.arange(len(self.prepared.store.obs_names))
        for split in (*SPLITS, "predict"):
            if split == "train":
                self.rows[split] = self.prepared.training_rows(self.run)
                continue
            limit = module.limit_dataset_samples
            limit = limit.get(split) if isinstance(limit, dict) else limit
            rows = everyone if split == "predict" else self.prepared.rows(split)
            self.rows[split] = choose_rows(rows, limit, seed)
        options = dict(shuffle=module.shuffle, seed=seed, weights=self._weights(), **_share())
        cells = len(self.rows["train"])
        if self.schedule is None:
            self.train_sampler = EpochBatchSampler(cells, module.batch_size, **options)
        else:
            self.train_sampler = ScheduledSampler(cells, self.schedule, **options)
        self.builders, self.builder = builders, builders[module.max_length]
        if self.builder.pairs is not None:
            check_matched(self.builder.pairs.table, self.builder.pairs)

    @property
    def most_train_batches(self) -> int:
        """Batches of the longest epoch, in one process."""
        if self.schedule is None:
            return len(self.train_sampler)
        return max(self.train_sampler.batches(epoch) for epoch in range(self.schedule.epochs))

    @property
    def trainer_options(self) -> dict[str, int]:
        """What the Trainer has to be made with so that it follows this data."""
        return {} if self.schedule is None else {"reload_dataloaders_every_n_epochs": 1}

    def _weights(self) -> np.ndarray | None:
        column = self.run.data_module.balancing_label_column
        if column is None or not len(self.rows["train"]):
            return None
        known = self.prepared.label_dict.get(column)
        if known is None:
            raise ConfigError(
                f"data_module.balancing_label_column: '{column}' is not a label column ({', '.join(self.prepared.label_dict)})"
            )
        silent = {entry.label_column_name: entry.silent_label_values for entry in self.run.label_columns}.get(column)
        return balancing_weights(self.prepared.store.labels(column, known, silent)[self.rows["train"]])

    def _loader(self, rows: np.ndarray, **share: int) -> DataLoader:
        module = self.run.data_module
        sampler = EpochBatchSampler(len(rows), module.evaluation_batch_size, shuffle=False, **share)
        cells = CellDataset(self.builders[module.evaluation_length], rows, evaluation=True)
        return make_loader(cells, sampler, module.num_workers)

    def evaluation_loader(self, rows: np.ndarray) -> DataLoader:
        """The cells of `rows`, each once and in this order, read as in validation, by this process alone."""
        return self._loader(rows)

    def train_dataloader(self) -> DataLoader | StepLoader:
        """Training batches in the order, length and size of the epoch that the sampler stands in."""
        if self.schedule is None:
            cells = CellDataset(self.builder, self.rows["train"])
        else:
            cells = ScheduledCells(self.builders, self.schedule, self.rows["train"])
            if self.trainer is not None:  # the loader's length is asked for before the epoch begins
                self.train_sampler.set_epoch(self.trainer.current_epoch)
        loader = make_loader(cells, self.train_sampler, self.run.data_module.num_workers)
        gather = 1 if self.trainer is None else self.trainer.accumulate_grad_batches
        if gather == 1 and self.train_sampler.num_replicas == 1:
            return loader
        limit = None if self.trainer is None else self.trainer.limit_train_batches
        return StepLoader(loader, self.count_targets, gather, limit if isinstance(limit, int) else None)

    def training_labels(self, most_cells: int = CELLS_FOR_CONSTANTS) -> Iterator[dict[str, Any]]:
        """Labels, by batch, that a sample of the training cells would have in validation: masks of the same kind, seeded."""
        rows = choose_rows(self.rows["train"], most_cells, self.run.seed.seed_value)
        for batch in self.batches_beforehand(rows):
            yield batch.get("labels", {})

    def batches_beforehand(self, rows: np.ndarray) -> Iterator[dict[str, Any]]:
        """The batches that these cells would make in validation, built in this process; nothing left out is counted."""
        module = self.run.data_module
        cells = CellDataset(self.uncounted(module.evaluation_length), rows, evaluation=True)
        size = module.evaluation_batch_size
        for start in range(0, len(rows), size):
            yield cells.__getitems__([(0, index) for index in range(start, min(start + size, len(rows)))])

    def uncounted(self, length: int) -> BatchBuilder:
        """The builder of a length for a look at cells beforehand: what is left out is counted when they are trained on."""
        builder = copy.copy(self.builders[length])
        builder.report = type(builder.report)()
        return builder

    def val_dataloader(self) -> DataLoader | StepLoader | list:
        """The cells of the dev split, each once; of several processes each gets its share."""
        if not len(self.rows["dev"]):
            return []
        share = _share()
        loader = self._loader(self.rows["dev"], **share)
        return loader if share["num_replicas"] == 1 else StepLoader(loader, None)

    def test_dataloader(self) -> DataLoader:
        return self._loader(self.rows["test"])

    def predict_dataloader(self) -> DataLoader:
        """Every cell of the data, in the order of the file; a sample of them where limit_dataset_samples says so."""
        return self._loader(self.rows["predict"])

    @property
    def gene_token_ids(self) -> np.ndarray:
        """Token id of each gene column, int32 (genes,); 0 where there is none."""
        return self.prepared.vocabularies["genes"].ids(self.prepared.store.var_names)

    def set_mask_weights(self, weights: np.ndarray | None, from_epoch: int = 0) -> None:
        """Mask genes at these relative rates, float32 (genes,), from an epoch on, whatever length cells are cut to."""
        for builder in self.builders.values():
            builder.set_mask_weights(weights, from_epoch)

    def set_dropout_weights(self, weights: np.ndarray | None) -> None:
        """Drop genes at these relative rates, float32 (genes,), where data_module.selective_dropout drops any."""
        for builder in self.builders.values():
            builder.set_dropout_weights(weights)

    def teardown(self, stage: str | None = None) -> None:
        """Nothing to close: the data stays mapped and can be used again."""


def _share() -> dict[str, int]:
    """Which part of the cells is this process's, as a sampler takes it."""
    return {"num_replicas": int(os.environ.get("WORLD_SIZE", "1")), "rank": int(os.environ.get("RANK", "0"))}


def build_data_module(
    run: RunConfig, data: str | Path | None = None, prepare: Callable[[], str | Path] | None = None
) -> CellDataModule:
    """The data module of `run` over the preprocess artefact in folder `data`, or over the one that `prepare` makes."""
    return CellDataModule(run, data, prepare)
