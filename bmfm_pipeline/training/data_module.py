"""CellDataModule: loaders over a processed artefact for Lightning, with samplers that know epoch and position."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
from torch.utils.data import DataLoader

from bmfm_pipeline.batching import (
    BatchBuilder,
    CellDataset,
    EpochBatchSampler,
    balancing_weights,
    choose_rows,
    make_loader,
)
from bmfm_pipeline.config import RunConfig
from bmfm_pipeline.errors import ConfigError, DataError
from bmfm_pipeline.training.prepared import PreparedData, batching_config

SPLITS = ("train", "dev", "test")


class CellDataModule(pl.LightningDataModule):
    """Batches of a run's cells.

    `data` is the folder of a preprocess artefact; without it `prepare()` makes one and returns where it lies.
    """

    def __init__(self, run: RunConfig, data: str | Path | None, prepare: Callable[[], str | Path] | None = None):
        super().__init__()
        self.run, self._prepare = run, prepare
        self.prepared = PreparedData(data) if data is not None else None
        self.builder: BatchBuilder | None = None
        self.rows: dict[str, np.ndarray] = {}
        self.train_sampler: EpochBatchSampler | None = None

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

    def _build(self) -> None:
        module, seed = self.run.data_module, self.run.seed.seed_value
        builder = BatchBuilder(
            self.prepared.store,
            self.prepared.field_specs(self.run),
            batching_config(self.run),
            self.prepared.labels(self.run),
        )
        for split in SPLITS:
            limit = module.limit_dataset_samples
            limit = limit.get(split) if isinstance(limit, dict) else limit
            self.rows[split] = choose_rows(self.prepared.rows(split), limit, seed)
        self.train_sampler = EpochBatchSampler(
            len(self.rows["train"]),
            module.batch_size,
            shuffle=module.shuffle,
            seed=seed,
            weights=self._weights(),
            num_replicas=int(os.environ.get("WORLD_SIZE", "1")),
            rank=int(os.environ.get("RANK", "0")),
        )
        self.builder = builder

    def _weights(self) -> np.ndarray | None:
        column = self.run.data_module.balancing_label_column
        if column is None or not len(self.rows["train"]):
            return None
        known = self.prepared.label_dict.get(column)
        if known is None:
            raise ConfigError(
                f"data_module.balancing_label_column: '{column}' is not a label column ({', '.join(self.prepared.label_dict)})"
            )
        return balancing_weights(self.prepared.store.labels(column, known)[self.rows["train"]])

    def _loader(self, rows: np.ndarray) -> DataLoader:
        sampler = EpochBatchSampler(len(rows), self.run.data_module.batch_size, shuffle=False)
        return make_loader(CellDataset(self.builder, rows, evaluation=True), sampler, self.run.data_module.num_workers)

    def train_dataloader(self) -> DataLoader:
        return make_loader(
            CellDataset(self.builder, self.rows["train"]), self.train_sampler, self.run.data_module.num_workers
        )

    def val_dataloader(self) -> DataLoader | list:
        return self._loader(self.rows["dev"]) if len(self.rows["dev"]) else []

    def test_dataloader(self) -> DataLoader:
        return self._loader(self.rows["test"])

    def predict_dataloader(self) -> DataLoader:
        """Every cell of the data, in the order of the file."""
        return self._loader(np.arange(len(self.prepared.store.obs_names)))

    def split_loader(self, split: str) -> DataLoader:
        """A loader over one split in row order, as evaluation reads it."""
        return self._loader(self.rows[split])

    def teardown(self, stage: str | None = None) -> None:
        """Nothing to close: the data stays mapped and can be used again."""


def build_data_module(
    run: RunConfig, data: str | Path | None = None, prepare: Callable[[], str | Path] | None = None
) -> CellDataModule:
    """The data module of `run` over the preprocess artefact in folder `data`, or over the one that `prepare` makes."""
    return CellDataModule(run, data, prepare)
