"""Controls as artefacts of their own: computed once, and used by every evaluation on the same split."""

import logging
import shutil
import time
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from bmfm_pipeline.config import RunConfig
from bmfm_pipeline.errors import ConfigError
from bmfm_pipeline.evaluation.controls import ControlCells, control_predictions
from bmfm_pipeline.evaluation.controls.choice import READS, described
from bmfm_pipeline.evaluation.controls.files import read_control, write_control
from bmfm_pipeline.evaluation.predictions import LabelPredictions, read_embeddings
from bmfm_pipeline.evaluation.several_classes import by_class
from bmfm_pipeline.stages.controls_passes import (
    MOST_EMBEDDED,
    predictions_beside,
    reading_view,
    sampled,
    training_embeddings,
)
from bmfm_pipeline.stages.controls_plan import ROLE
from bmfm_pipeline.stages.held_out_plan import TRAINING
from bmfm_pipeline.stages.jobs import KEY_LENGTH, Job
from bmfm_pipeline.stages.running import Progress
from bmfm_pipeline.storage import Artefact, code_version, find_artefact, hash_bytes, hash_json, publish, read_json
from bmfm_pipeline.training.prepared import PreparedData

logger = logging.getLogger(__name__)
STAGE = "control"
# What computes a control: its transitive imports are the control's code version.
MODULE = "bmfm_pipeline.evaluation.controls.running"
MODULES = {"model": "bmfm_pipeline.stages.controls_passes"}
LIBRARIES = ("scikit-learn", "scipy")


@dataclass(frozen=True)
class Column:
    """A label column: its values in all cells, (cells,) or (cells, classes), and its class names in id order, none for numbers."""

    name: str
    values: np.ndarray
    class_names: list[str]

    @cached_property
    def targets(self) -> dict[str, tuple[np.ndarray, list[str]]]:
        """{target: (values of all cells, class names)}: the column itself, or each of its scored classes."""
        values, names = by_class({self.name: self.values}, {self.name: self.class_names} if self.class_names else {})
        return {target: (values[target], names.get(target, [])) for target in values}

    def known(self, rows: np.ndarray) -> np.ndarray:
        """Which of the rows have a label."""
        own = self.values[rows]
        if own.ndim == 2:
            return (own >= 0).any(axis=1)
        return own >= 0 if self.class_names else np.isfinite(own)


class KeptControls:
    """The controls of one evaluation, found in the workspace or computed and published there.

    `values` is the matrix they read and `kind` where it comes from (see values_for_controls); `rows` are those of the test cells of the
    evaluation. What was done is in `done`, one row each.
    """

    def __init__(
        self,
        job: Job,
        run: RunConfig,
        prepared: PreparedData,
        values,
        rows: np.ndarray,
        columns: list[Column],
        on_progress: Progress,
        kind: str = "counts",
    ):
        self.job, self.run, self.prepared, self.rows, self.columns = job, run, prepared, rows, columns
        self.on_progress = on_progress
        self.done: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.split = read_json(prepared.folder / "split.json")
        # Of the split, not of the training: models of other seeds share their controls.
        seed = self.split.get("seed", self.split.get("made_as", {}).get("seed"))
        self.seed = seed if isinstance(seed, int) else 0
        self._values, self._kind = values, kind

    @property
    def of_sequences(self) -> bool:
        """Whether the rows are nucleotide sequences."""
        return self._kind == "words"

    @cached_property
    def cells(self) -> ControlCells:
        """The cells of the split; their values are read when a control is computed, and not when all are found."""
        test = self.prepared.rows("test")
        if not np.isin(self.rows, test).all():
            test = np.unique(self.rows)
        genes = self.prepared.store.var_names
        train = self.prepared.training_rows(self.run)
        return ControlCells(self._values, train, test, self.seed, genes, kind=self._kind)

    @cached_property
    def _embeddings(self) -> Artefact:
        """Embeddings of training cells, put beside those of the test cells."""
        rows = self.cells.rows["train"]
        labelled = np.zeros(len(rows), dtype=bool)
        for column in self.columns:
            labelled |= column.known(rows)
        rows, labelled = sampled(rows[labelled], self.seed), int(labelled.sum())
        if labelled > len(rows):
            self.notes.append(
                f"linear_probe and knn are fitted to the embeddings of {len(rows):,} of {labelled:,} labelled training cells, drawn at random "
                f"(seed {self.seed}); above {MOST_EMBEDDED:,} a pass over all would cost more than they are worth"
            )
        began = time.monotonic()
        artefact, there = training_embeddings(self.job, self.run, rows, self.on_progress)
        self._record("embeddings", "", there, time.monotonic() - began, artefact)
        own = {split: read_embeddings(self.job.staging, split) for split in ("train", "test")}
        self.cells.embeddings = own
        return artefact

    def get(self, control: str, column: Column) -> dict[str, LabelPredictions]:
        """{target: predictions of the evaluation's test cells} of a control of one label column."""
        key, made_of = self.key_of(control, column)
        artefact, began = find_artefact(self.job.place, STAGE, key), time.monotonic()
        there = artefact is not None
        if artefact is None:
            staging = self.job.run_dir / "controls" / key
            shutil.rmtree(staging, ignore_errors=True)
            found = self._compute(control, column)
            about = {"control": control, "column": column.name, "description": described(control, self._kind)}
            write_control(staging, self._asked(control), found, about)
            seconds = round(time.monotonic() - began, 3)
            summary = {"name": self.job.name, "control": control, "column": column.name, "seconds": seconds}
            artefact = publish(staging, self.job.place, STAGE, key, **made_of, summary=summary)
        self._record(control, column.name, there, time.monotonic() - began, artefact)
        truth = {target: values[self.rows] for target, (values, _) in column.targets.items()}
        return read_control(artefact.local(), self.rows, truth)

    def key_of(self, control: str, column: Column) -> tuple[str, dict[str, Any]]:
        """(the key of a control's artefact, what it is the hash of: inputs, config, code_version)."""
        inputs, view = self._inputs(control), self._view(control, column)
        code = code_version(MODULES.get(READS[control], MODULE))
        ids = {role: entry["id"] for role, entry in inputs.items()}
        key = hash_json({"stage": STAGE, "inputs": ids, "config": view, "code": code})[:KEY_LENGTH]
        return key, {"inputs": inputs, "config": view, "code_version": code}

    def _asked(self, control: str) -> np.ndarray:
        """The rows whose predictions are kept: all test cells, unless those of a model are read."""
        return self.rows if READS[control] == "model" else self.cells.rows_of(control, "test")

    def _compute(self, control: str, column: Column) -> dict[str, LabelPredictions]:
        if READS[control] == "model":
            return predictions_beside(
                self.job, self.run, ROLE, column.name, column.class_names, column.values, self.rows, self.on_progress
            )
        found = {
            target: control_predictions(control, self.cells, values, names)
            for target, (values, names) in column.targets.items()
        }
        return {target: predictions for target, predictions in found.items() if predictions is not None}

    def _inputs(self, control: str) -> dict[str, dict[str, Any]]:
        own = {role: self.job.inputs[role] for role in ("data", TRAINING) if role in self.job.inputs}
        if READS[control] == "embeddings":
            artefact = self._embeddings
            own |= {"embeddings": {"id": artefact.key, "uri": artefact.uri, "stage": artefact.stage}}
            own |= {"model": self.job.inputs["model"]}
        if READS[control] == "model":
            if ROLE not in self.job.inputs:
                raise ConfigError(
                    f"evaluation.controls: {control} needs a second model, which this evaluation was planned without; run `bmfm evaluate` again"
                )
            own |= {"model": self.job.inputs[ROLE]}
        return own

    def _view(self, control: str, column: Column) -> dict[str, Any]:
        """What a control is made from, beyond its inputs."""
        asked = self._asked(control)
        view = {
            "control": control,
            "description": described(control, self._kind),
            "column": column.name,
            "targets": {target: names for target, (_, names) in column.targets.items()},
            "split": self.split["hash"],
            "test_rows": hash_bytes(np.ascontiguousarray(asked).tobytes()),
        }
        if READS[control] == "model":
            return view | {"reading": reading_view(self.run)}
        fit = self.cells.rows_of(control, "train")
        return view | {
            "train_rows": hash_bytes(np.ascontiguousarray(fit).tobytes()),
            "labels": hash_bytes(np.ascontiguousarray(column.values[fit]).tobytes()),
            "values": self._kind,
            "seed": self.seed,
            "libraries": _versions(control),
        }

    def _record(self, control: str, column: str, there: bool, seconds: float, artefact: Artefact) -> None:
        state = "reused" if there else f"computed in {seconds:.1f} s"
        several = len(self.columns) > 1 and column
        logger.info("%s: %s", f"{control} of {column}" if several else control, state)
        row = {"control": control, "label": column, "state": "reused" if there else "computed"}
        self.done.append({**row, "seconds": round(seconds, 2), "artefact": artefact.uri})


def _versions(control: str) -> dict[str, str]:
    found = {}
    for name in (*LIBRARIES, "celltypist") if control == "celltypist" else LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found
