"""A model of the workspace on cells of other data: which are tested, what their labels mean, and the training cells beside them."""

import logging
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from bmfm_pipeline.config import RunConfig
from bmfm_pipeline.data.label_flags import with_gathered_columns
from bmfm_pipeline.data.label_values import encode_members
from bmfm_pipeline.data.stores import JoinedStore
from bmfm_pipeline.data.stores.joined import JoinedMatrix
from bmfm_pipeline.errors import DataError
from bmfm_pipeline.evaluation.common_classes import CommonClasses, count_labels, notes_of
from bmfm_pipeline.evaluation.seen_cells import SeenCells, find_seen
from bmfm_pipeline.stages.held_out_labels import chosen_cells, relate_column
from bmfm_pipeline.stages.held_out_plan import EARLIER, TRAINING, UNKNOWN_START, refuse_missing_column
from bmfm_pipeline.stages.inputs import input_folder
from bmfm_pipeline.stages.jobs import Job
from bmfm_pipeline.stages.sequences.held_out import BothSequences, find_seen_sequences, notes_of_sequences
from bmfm_pipeline.storage import hash_json, read_json, write_json_atomic
from bmfm_pipeline.training.prepared import PreparedData

logger = logging.getLogger(__name__)
FILE, ROWS = "held_out.json", "held_out_rows.npy"
# Below this part of the share of counts in known genes that training had, values are on another scale.
LESS = 0.7


def is_held_out_job(job: Job) -> bool:
    """Whether an evaluation tests its model on data that it does not come from."""
    return TRAINING in job.inputs


class NewCells(PreparedData):
    """Other data as the model reads them: genes in the order of its vocabulary, its class ids, no label known to it.

    `tested` are the rows of the test cells; without them all are.
    """

    def __init__(self, folder: str | Path, label_dict: dict[str, dict[str, int]]):
        super().__init__(folder)
        self.own_classes, self.tested = label_dict, None

    @cached_property
    def store(self):
        store = PreparedData(self.folder).store
        if getattr(store, "sequences", None) is not None:
            return store
        # As in training, where the vocabulary was made of the data: the same cell is cut and shuffled alike, here and in prediction.
        order = np.argsort(self.vocabularies["genes"].ids(store.var_names), kind="stable")
        if np.array_equal(order, np.arange(len(order))):
            return store
        return JoinedStore([store], [store.var_names[place] for place in order])

    @property
    def label_dict(self) -> dict[str, dict[str, int]]:
        return self.own_classes

    def rows(self, split: str) -> np.ndarray:
        if split != "test":
            return np.zeros(0, dtype=np.int64)
        return np.arange(self.store.n_cells, dtype=np.int64) if self.tested is None else self.tested

    def labels(self, run: RunConfig) -> dict[str, np.ndarray]:
        found, n = {}, self.store.n_cells
        for column in run.label_columns:
            name = column.label_column_name
            if column.is_regression_label:
                found[name] = np.full(n, np.nan, dtype=np.float32)
            elif column.is_multilabel:
                found[name] = np.full((n, len(self.own_classes[name])), -100, dtype=np.float32)
            else:
                found[name] = np.full(n, -100, dtype=np.int64)
        return found


class _BothStores:
    """Training cells, then the others, over the genes that both have; what controls and confused pairs read."""

    def __init__(self, stores: list):
        first, second = stores
        own = set(second.var_names)
        self.var_names = [gene for gene in first.var_names if gene in own]
        place = {gene: column for column, gene in enumerate(self.var_names)}
        tables = [np.array([place.get(gene, -1) for gene in store.var_names], dtype=np.int32) for store in stores]
        width = len(self.var_names)
        self.matrix = JoinedMatrix([store.matrix for store in stores], tables, width)
        counted = all(store.counts is not None for store in stores)
        self.counts = JoinedMatrix([store.counts for store in stores], tables, width) if counted else None
        logged = all(store.log_values is not None for store in stores)
        self.log_values = JoinedMatrix([store.log_values for store in stores], tables, width) if logged else None
        self.n_cells, self.n_genes = self.matrix.shape
        # A name that both have is that of the other data's cell: these are looked up by name, training cells never.
        self.obs_names = np.concatenate([store.obs_names for store in stores])


class BothData:
    """PreparedData of the two together, in the classes that are scored: training rows of the model, test rows of the other data."""

    def __init__(self, held: "HeldOut"):
        self._held, self.folder = held, held.new.folder
        self.label_dict = {
            name: {word: place for place, word in enumerate(held.class_names(name))} for name in held.columns
        }

    @cached_property
    def store(self) -> "_BothStores | BothSequences":
        stores = [self._held.training.store, self._held.new.store]
        return BothSequences(stores) if self._held.of_sequences else _BothStores(stores)

    def rows(self, split: str) -> np.ndarray:
        return self._held.rows + self._held.training.store.n_cells if split == "test" else self.training_rows()

    def training_rows(self, run: RunConfig | None = None) -> np.ndarray:
        return self._held.training.training_rows(self._held.trained)

    def labels(self, run: RunConfig | None = None) -> dict[str, np.ndarray]:
        held = self._held
        own = held.training.labels(held.trained)
        found = {}
        for name, values in held.truth.items():
            common = held.common.get(name)
            before = own[name] if common is None else common.of_model_ids(own[name])
            found[name] = np.concatenate([before, values])
        return found


@dataclass
class HeldOut:
    """What an evaluation on other data rests on. `rows` are the test cells among those of `new`, `truth` {label column: of every cell of
    `new` its scored class, or number}; `said` is what held_out.json keeps."""

    job: Job
    run: RunConfig
    trained: RunConfig
    new: NewCells
    training: PreparedData
    common: dict[str, CommonClasses] = field(default_factory=dict)
    rows: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    said: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, job: Job, run: RunConfig) -> "HeldOut":
        model = input_folder(job, "model")
        trained = RunConfig.model_validate(read_json(model / "run_config.json"))
        training = PreparedData(input_folder(job, TRAINING))
        new = NewCells(input_folder(job, "data"), training.label_dict)
        return cls(job, run, trained, new, training)

    @classmethod
    def read(cls, job: Job, run: RunConfig) -> "HeldOut":
        """As `begin` left it in the folder of the evaluation."""
        found = cls.open(job, run)
        found.said = read_json(job.staging / FILE)
        found.common = {name: CommonClasses(**entry) for name, entry in found.said["labels"].items()}
        found.new.tested = found.rows = np.load(job.staging / ROWS, allow_pickle=False)
        return found

    @classmethod
    def begin(cls, job: Job, run: RunConfig) -> "HeldOut":
        """Relate labels, choose the test cells and look for cells that the model has seen; keep it all in held_out.json.

        Raises DataError where labels cannot be scored, where no cell is left, and for cells seen before unless they are wanted.
        """
        found = cls.open(job, run)
        store, notes = found.new.store, []
        chosen = chosen_cells(run.evaluation.only_cells, store.column, store.obs_columns, store.n_cells)
        for column in run.label_columns if run.predicts_labels else []:
            name = column.label_column_name
            refuse_missing_column(found.obs_column(name), store.obs_columns, found.source)
            if column.is_regression_label or column.is_multilabel:
                continue
            values = store.column(found.obs_column(name))[chosen]
            counts = count_labels(values, column.silent_label_values)
            found.common[name] = relate_column(
                run,
                found.training.folder,
                name,
                found.obs_column(name),
                counts,
                found.source,
                many=len(found.columns) > 1,
            )
            notes += notes_of(found.common[name], int(chosen.sum()), int(chosen.sum()) - sum(counts.values()))
        tested = np.flatnonzero(chosen & found.scored())
        if not len(tested):
            raise DataError(
                f"{found.source}: no cell is left to test; see the labels that are left out, and evaluation.only_cells"
            )
        tested, seen, more = found._look_for_seen(tested)
        found.rows = found.new.tested = tested
        found.said = {
            "source": found.source,
            "labels": {name: common.to_dict() for name, common in found.common.items()},
            "cells": store.n_cells,
            "seen": seen,
            "notes": [*found._notes_of_cells(int(chosen.sum())), *notes, *more],
        }
        write_json_atomic(job.staging / FILE, found.said)
        np.save(job.staging / ROWS, tested)
        for note in found.said["notes"]:
            logger.info("%s", note)
        return found

    @property
    def of_sequences(self) -> bool:
        return self.trained.data_module.sequences is not None

    @cached_property
    def source(self) -> str:
        """Where the other data lie, as the run named them."""
        return read_json(self.new.folder / "artefact.json")["inputs"]["source"]["uri"]

    @cached_property
    def new_report(self) -> dict[str, Any]:
        return read_json(self.new.folder / "report.json")

    @property
    def columns(self) -> list[str]:
        return [column.label_column_name for column in self.run.label_columns] if self.run.predicts_labels else []

    def obs_column(self, name: str) -> str:
        return (self.run.evaluation.label_from or {}).get(name, name)

    def class_names(self, name: str) -> list[str]:
        """Scored classes of a label column in id order; none for numbers."""
        if name in self.common:
            return self.common[name].names
        column = next(entry for entry in self.run.label_columns if entry.label_column_name == name)
        known = {} if column.is_regression_label else self.training.label_dict[name]
        return sorted(known, key=known.get)

    @cached_property
    def truth(self) -> dict[str, np.ndarray]:
        found = {}
        for column in self.run.label_columns if self.run.predicts_labels else []:
            name, own = column.label_column_name, self.obs_column(column.label_column_name)
            if name in self.common:
                found[name] = self.common[name].ids(self.new.store.column(own))
                continue
            known = None if column.is_regression_label else self.training.label_dict[name]
            if column.from_columns is not None and own not in self.new.store.obs_columns:
                found[name] = self._gathered(column, known)
                continue
            separator = column.multilabel_str_sep if column.is_multilabel else None
            found[name] = self.new.store.labels(own, known, column.silent_label_values, separator)
        return found

    def _gathered(self, column, known: dict[str, int]) -> np.ndarray:
        store, name = self.new.store, column.label_column_name
        obs = with_gathered_columns(store.obs, [column], store.name)
        return encode_members(obs[name], known, column.silent_label_values, column.multilabel_str_sep, store.name)

    def scored(self) -> np.ndarray:
        """bool (cells of the other data,): those whose label says something of any column; all where none is predicted."""
        if not self.columns:
            return np.ones(self.new.store.n_cells, dtype=bool)
        known = np.zeros(self.new.store.n_cells, dtype=bool)
        for name, values in self.truth.items():
            if name in self.common:
                known |= self.common[name].tested(self.new.store.column(self.obs_column(name)))
            elif values.ndim == 2:
                known |= (values >= 0).any(axis=1)
            else:
                known |= np.isfinite(values)
        return known

    @cached_property
    def both(self) -> BothData:
        return BothData(self)

    @property
    def split_hash(self) -> str:
        """The same for the same test cells of the same data."""
        return hash_json({"data": self.job.inputs["data"]["id"], "rows": self.rows.tolist()})

    def _look_for_seen(self, tested: np.ndarray) -> tuple[np.ndarray, dict[str, Any], list[str]]:
        """(test rows, numbers, notes): which of the rows were among the cells of any training of the model."""
        settings, store = self.run.evaluation, self.new.store
        roles = [TRAINING, *sorted(role for role in self.job.inputs if role.startswith(EARLIER))]
        seen = SeenCells(np.zeros(len(tested), dtype=bool), np.zeros(len(tested), dtype=bool))
        trained = 0
        for role in roles:
            data = self.training if role == TRAINING else PreparedData(input_folder(self.job, role))
            rows = np.concatenate([data.rows("train"), data.rows("dev")])
            trained += len(rows)
            if self.of_sequences:
                seen |= find_seen_sequences(store, tested, data.store, rows)
            else:
                seen |= find_seen(store, tested, data.store, rows, by_counts=settings.seen_cells_by == "counts")
        count, share = int(seen.seen.sum()), float(seen.seen.mean())
        how = "by counts and names" if seen.by_counts else "by name alone"
        if self.of_sequences:
            how = "letter by letter, on both strands"
        said = f"{count} of {len(tested)} test cells ({100 * share:.1f} %) are among the {trained} cells that the model was trained and validated on (compared {how})"  # fmt: skip
        names = [str(store.obs_names[row]) for row in tested[seen.seen][:5]]
        if count and settings.seen_cells == "refuse":
            raise DataError(
                f"{self.source}: {said}, e.g. {', '.join(names)}. Scores on them say nothing about new cells: evaluation.seen_cells=drop leaves "
                "them out, evaluation.seen_cells=keep tests them all the same, and the report says so"
            )
        notes = [f"held-out data: {said}{'; they are left out' if count and settings.seen_cells == 'drop' else ''}"]
        if other := int((seen.same_name & ~seen.seen).sum()):
            notes.append(
                f"held-out data: {other} test cells have the name of a training cell and other counts. Barcodes of studies coincide by chance; "
                "if many do, the same experiment may have been counted anew"
            )
        if UNKNOWN_START in self.job.inputs:
            start = self.job.inputs[UNKNOWN_START]["uri"]
            notes.append(
                f"held-out data: training began from {start}, which was trained elsewhere: whether that had seen these cells is not known"
            )
        numbers = {"cells": count, "share": share, "same_name": int(seen.same_name.sum()), "by_counts": seen.by_counts}
        if settings.seen_cells == "drop":
            tested = tested[~seen.seen]
            if not len(tested):
                raise DataError(
                    f"{self.source}: every test cell was among the cells that the model was trained on; name other data"
                )
        return tested, numbers, notes

    def _notes_of_cells(self, chosen: int) -> list[str]:
        if self.of_sequences:
            return notes_of_sequences(
                self.source, self.new_report["check"], bool(self.columns)
            ) + self._notes_of_choice(chosen)
        cells = self.new_report["check"]["cells"]
        training = self.training.store
        shared = len(set(training.var_names) & set(self.new.store.var_names))
        notes = [
            f"held-out data: {self.source}, which the model does not come from; its cells are prepared as the training cells were, with nothing "
            "fitted to them, and none is filtered out",
            f"held-out data: {shared} of the {training.n_genes} genes of the training cells are there; {self._counts_known()}",
        ]
        if self.columns:
            notes.append(
                f"held-out data: controls are fitted on the model's training cells, over these {shared} genes, and asked about the same test cells"
            )
        if aside := self.new_report["check"].get("files_set_aside"):
            notes.append(
                f"held-out data: {aside} files cannot be used and are left out with all their cells; the report of the data says why"
            )
        if lost := cells - self.new.store.n_cells:
            notes.append(
                f"held-out data: {lost} of {cells} cells express no gene that the model knows and are not tested"
            )
        return notes + self._notes_of_choice(chosen)

    def _notes_of_choice(self, chosen: int) -> list[str]:
        notes = []
        if chosen < self.new.store.n_cells:
            only = "; ".join(f"{name}: {', '.join(values)}" for name, values in self.run.evaluation.only_cells.items())
            notes.append(
                f"held-out data: {chosen} of {self.new.store.n_cells} cells are chosen by evaluation.only_cells ({only})"
            )
        return notes

    def _counts_known(self) -> str:
        """Which share of counts is in genes that the model knows, beside that of its training data."""
        file = self.training.folder / "report.json"
        before = (read_json(file) if file.exists() else {}).get("gene_names", {}).get("share_of_counts_kept")
        share = self.new_report["gene_names"]["share_of_counts_kept"]
        said = f"{100 * share:.1f} % of the counts are in genes that the model knows"
        if before is None:
            return said
        said += f" (of the training data {100 * before:.1f} %)"
        if share < LESS * before:
            said += (
                ". Where values are scaled by a cell's total, they are smaller than in training by as much; a file of the training data's genes "
                "alone would mend that"
            )
        return said
