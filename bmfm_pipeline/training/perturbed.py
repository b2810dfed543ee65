"""The perturbed cells of a processed artefact, made into the pairs that batches are built of."""

import logging
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from bmfm_pipeline.batching.pairs import PairTable
from bmfm_pipeline.config import RunConfig
from bmfm_pipeline.data.perturbations import COLUMN, CONTROL, Profiles, read_profiles, read_record
from bmfm_pipeline.data.perturbations.records import RECORD
from bmfm_pipeline.data.splits import read_split_info
from bmfm_pipeline.errors import DataError

logger = logging.getLogger(__name__)


class PerturbedCells:
    """Which cells are perturbed, by what, and which are controls."""

    def __init__(self, folder: Path, store):
        self.folder, self.store, self.record = folder, store, read_record(folder)
        self.split_column = read_split_info(folder)["column"]

    @classmethod
    def of(cls, folder: Path, store) -> "PerturbedCells | None":
        """None where the artefact was not made of perturbed cells."""
        return cls(folder, store) if (Path(folder) / RECORD).exists() else None

    @property
    def unmeasured(self) -> list[str]:
        """Target genes without a column."""
        return self.record["unmeasured"]

    @property
    def perturbations(self) -> dict[str, dict[str, Any]]:
        """{name: {"targets": genes, "cells": {split: cells}}}."""
        return self.record["perturbations"]

    @cached_property
    def names(self) -> np.ndarray:
        """The perturbation of every cell, object (cells,): Control, or "" for none."""
        return np.array([name if isinstance(name, str) else "" for name in self.store.column(COLUMN)], dtype=object)

    @cached_property
    def numbers(self) -> np.ndarray:
        """The number of every cell's perturbation among `perturbations`, int64 (cells,); -1 for controls and none."""
        place = {name: number for number, name in enumerate(self.perturbations)}
        return np.array([place.get(name, -1) for name in self.names], dtype=np.int64)

    @property
    def controls(self) -> np.ndarray:
        """Rows of control cells."""
        return np.flatnonzero(self.names == CONTROL).astype(np.int64)

    def only(self, rows: np.ndarray) -> np.ndarray:
        """Those of `rows` that are perturbed."""
        return rows[self.numbers[rows] >= 0]

    def profiles(self, split: str) -> Profiles:
        return read_profiles(self.folder, split)

    def table(self, run: RunConfig) -> PairTable:
        """Who may be paired with whom, for a batch builder. Raises DataError when there is no control cell."""
        settings = run.data_module.perturbation
        place = {gene: column for column, gene in enumerate([*self.store.var_names, *self.unmeasured])}
        targets = [
            np.array(sorted(place[gene] for gene in entry["targets"]), dtype=np.int32)
            for entry in self.perturbations.values()
        ]
        groups = None
        if settings.match_column is not None:
            values = self.store.column(settings.match_column)
            groups = np.unique(np.array([str(value) for value in values]), return_inverse=True)[1].astype(np.int64)
        profiles = {}
        if settings.labels == "means":
            profiles = dict(zip(("profiles", "profile_of"), self._profiles_of_cells(), strict=True))
        shown = run.data_module.dataset_kwargs.expose_zeros
        return PairTable(
            names=list(self.perturbations),
            perturbations=self.numbers,
            targets=targets,
            measured=len(self.store.var_names),
            controls=self.controls,
            groups=groups,
            train_mean=self.profiles("train").train_mean,
            show="label_nonzeros" if shown == "label_nonzeros" else "no_zeros",
            **profiles,
        )

    def _profiles_of_cells(self) -> tuple[np.ndarray, np.ndarray]:
        """The mean profiles (N, genes) of all perturbations in all splits, and which of them is of each cell, -1 for none (cells,)."""
        splits = self.store.column(self.split_column)
        found, place = [], {}
        for split in ("train", "dev", "test"):
            own = self.profiles(split)
            place |= {(split, name): len(place) + row for row, name in enumerate(own.names)}
            found.append(own.means)
        rows = [place.get(key, -1) for key in zip(splits, self.names, strict=True)]
        return np.concatenate(found).astype(np.float32), np.array(rows, dtype=np.int64)

    def for_model(self) -> dict[str, Any]:
        """What a model needs for cells of another file: what its differences are from, and which targets it was trained on."""
        known = self.profiles("train")
        trained = {gene for name in known.names for gene in self.perturbations[name]["targets"]}
        return {
            "column": self.record["column"],
            "genes": known.genes,
            "train_mean": [float(value) for value in known.train_mean],
            "unmeasured": self.unmeasured,
            "trained_targets": sorted(trained),
        }

    def sentence(self) -> str:
        """How many perturbations, and for how many of them the target was not measured, in words."""
        record = self.record
        return (
            f"{record['singles']} perturbations of single genes and {record['combinations']} of several, {record['perturbed_cells']} cells; "
            f"{len(record['unmeasured'])} of {len(record['targets'])} target genes were not measured, which concerns "
            f"{record['share_with_unmeasured_target']:.0%} of the perturbed cells: there the model sees the target without a value"
        )


def check_matched(table: PairTable, pairs) -> None:
    """Say how many cells found no control cell with the same value to be paired with."""
    alone = pairs.without_partner_in_group()
    total = int(np.sum(table.perturbations >= 0))
    if alone == total and total:
        raise DataError(
            "data_module.perturbation.match_column: no perturbed cell shares its value with a control cell; choose another column, or "
            "pairing=random"
        )
    if alone:
        logger.warning(
            "%d of %d perturbed cells have no control cell with the same value, and are paired with any", alone, total
        )
