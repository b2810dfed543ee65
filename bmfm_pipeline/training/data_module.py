"""CellDataModule: loaders over a processed artefact for Lightning, with samplers that know epoch and position."""

import os
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
from torch.utils.data import DataLoader

from bmfm_pipeline.batching import BatchBuilder, CellDataset, EpochBatchSampler, choose_rows, make_loader
from bmfm_pipeline.config import RunConfig
from bmfm_pipeline.errors import ConfigError, DataError
from bmfm_pipeline.training.prepared import PreparedData, batching_config


class CellDataModule(pl.LightningDataModule):
    """Batches of a run's cells. `data` is the folder of a preprocess artefact, or None until prepare_data makes it."""

    def __init__(self, run: RunConfig, data: str | Path | None):
        super().__init__()
        self.run = run
        self.prepared = PreparedData(data) if data is not None else None
        self.train_sampler: EpochBatchSampler | None = None

    def setup(self, stage: str | None = None) -> None:
        """Build batch builder, rows of every split and the training sampler."""
        if self.prepared is None:
            raise ConfigError("the data module has no data yet; call prepare_data() first")
        module, seed = self.run.data_module, self.run.seed.seed_value
        self.builder = BatchBuilder(
            self.prepared.store,
            self.prepared.field_specs(self.run),
            batching_config(self.run),
            self.prepared.labels(self.run),
        )
        self.rows = {}
        for split in ("train", "dev", "test"):
            limit = module.limit_dataset_samples
            limit = limit.get(split) if isinstance(limit, dict) else limit
            self.rows[split] = choose_rows(self.prepared.rows(split), limit, seed)
        if not len(self.rows["train"]) and stage == "fit":
            raise DataError(f"{self.prepared.folder}: the split has no training cells")
        self.train_sampler = EpochBatchSampler(
            len(self.rows["train"]),
            module.batch_size,
            shuffle=module.shuffle,
            seed=seed,
            weights=self._weights(),
            num_replicas=int(os.environ.get("WORLD_SIZE", "1")),
            rank=int(os.environ.get("RANK", "0")),
        )

    def _weights(self) -> np.ndarray | None:
        column = self.run.data_module.balancing_label_column
        if column is None:
            return None
        known = self.prepared.label_dict.get(column)
        if known is None:
            raise ConfigError(
                f"data_module.balancing_label_column: '{column}' is not a label column ({', '.join(self.prepared.label_dict)})"
            )
        ids = self.prepared.store.labels(column, known)[self.rows["train"]]
        weights = np.zeros(len(ids))
        labelled = ids >= 0
        weights[labelled] = 1.0 / np.bincount(ids[labelled])[ids[labelled]]
        return weights

    def _loader(self, split: str) -> DataLoader:
        rows = self.rows[split]
        sampler = EpochBatchSampler(len(rows), self.run.data_module.batch_size, shuffle=False)
        return make_loader(CellDataset(self.builder, rows), sampler, self.run.data_module.num_workers)

    def train_dataloader(self) -> DataLoader:
        return make_loader(
            CellDataset(self.builder, self.rows["train"]), self.train_sampler, self.run.data_module.num_workers
        )

    def val_dataloader(self) -> DataLoader | list:
        return self._loader("dev") if len(self.rows["dev"]) else []

    def test_dataloader(self) -> DataLoader:
        return self._loader("test")

    def split_loader(self, split: str) -> DataLoader:
        """A loader over one split in row order, as evaluation reads it."""
        return self._loader(split)


def build_data_module(run: RunConfig, data: str | Path | None = None) -> CellDataModule:
    """The data module of `run` over the preprocess artefact in folder `data`."""
    return CellDataModule(run, data)
