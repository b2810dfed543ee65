"""The cells of a re-evaluation: which count, and what is measured of them to tell whether the data are still those of before."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bmfm_pipeline.config import RunConfig
from bmfm_pipeline.evaluation.comparing import Contender
from bmfm_pipeline.evaluation.drift import CellsOfASide
from bmfm_pipeline.evaluation.predictions import read_embeddings
from bmfm_pipeline.evaluation.promotion import without_cells
from bmfm_pipeline.stages.comparing import contender
from bmfm_pipeline.stages.held_out_plan import EARLIER, TRAINING
from bmfm_pipeline.stages.inputs import input_folder
from bmfm_pipeline.stages.jobs import Job
from bmfm_pipeline.storage import Artefact, read_json
from bmfm_pipeline.training.prepared import PreparedData

_ROWS = 20_000


@dataclass(frozen=True)
class TestedCells:
    """An evaluation, with the embeddings (n, d) of its cells where it has any, and the folder of the data they are of."""

    __test__ = False
    side: Contender
    embeddings: np.ndarray | None
    data: Path

    @classmethod
    def of(cls, test: Artefact, data: Path) -> "TestedCells":
        found = read_embeddings(test.local(), "test")
        return cls(contender(test), None if found is None else found[0], data)

    @property
    def cells(self) -> list[str]:
        return self.side.predictions.cells

    def only(self, keep: np.ndarray) -> "TestedCells":
        embeddings = None if self.embeddings is None else self.embeddings[keep]
        return TestedCells(without_cells(self.side, keep), embeddings, self.data)


def cells_that_count(job: Job, prepared: Path | None) -> tuple[TestedCells, list[str]]:
    """(the cells of a finished evaluation that count, what was left out).

    On changed data of the same dataset these are the cells that its own filters keep (`prepared`, the data as they would be prepared
    for training now), without any whose name a training of the model has seen: a cell that was counted anew is not a new one.
    """
    tested = TestedCells.of(job.artefact(), input_folder(job, "data"))
    if prepared is None:
        return tested, []
    kept, learned = set(PreparedData(prepared).store.obs_names), names_learned(job)
    filtered = np.array([cell not in kept for cell in tested.cells], dtype=bool)
    known = np.array([cell in learned for cell in tested.cells], dtype=bool) & ~filtered
    notes = []
    if filtered.any():
        notes.append(f"{int(filtered.sum()):,} cells that the filters of the dataset leave out do not count")
    if known.any():
        notes.append(
            f"{int(known.sum()):,} cells do not count: the model has learned from cells of the same name with other counts"
        )
    return tested.only(~(filtered | known)), notes


def names_learned(job: Job) -> set[str]:
    """Names of the cells that any training of the tested model has read."""
    names: set[str] = set()
    for role in (TRAINING, *(role for role in job.inputs if role.startswith(EARLIER))):
        if role in job.inputs:
            data = PreparedData(input_folder(job, role))
            names.update(data.store.obs_names[np.concatenate([data.rows("train"), data.rows("dev")])])
    return names


def side_of(tested: TestedCells, run: RunConfig, more_labels: Sequence[str] = ()) -> CellsOfASide:
    """What drift is measured of. `more_labels` are those of cells that could not be tested, because the model has no such class."""
    return CellsOfASide(
        labels=_labels(tested, run, more_labels),
        totals=_totals(tested.data, tested.cells),
        embeddings=tested.embeddings,
        coverage=coverage(tested.data),
    )


def _labels(tested: TestedCells, run: RunConfig, more: Sequence[str]) -> np.ndarray | None:
    """Labels of the first label column with one class a cell."""
    for column in run.label_columns:
        label = tested.side.predictions.labels.get(column.label_column_name)
        if label is None or label.is_regression or label.part_of is not None:
            continue
        names = np.array(label.class_names, dtype=object)[label.truth[label.known]]
        return np.concatenate([names, np.array(list(more), dtype=object)])
    return None


def coverage(data: Path) -> float | None:
    """The share of all counts in genes that are kept, of a preprocessing artefact."""
    file = data / "report.json"
    return (read_json(file) if file.exists() else {}).get("gene_names", {}).get("share_of_counts_kept")


def _totals(data: Path, cells: Iterable[str]) -> np.ndarray | None:
    """Counts of each cell in the genes that the data keep; None where they hold no counts."""
    store = PreparedData(data).store
    if store.counts is None:
        return None
    place = {name: row for row, name in enumerate(store.obs_names)}
    rows = np.array([place[cell] for cell in cells], dtype=np.int64)
    found = np.zeros(len(rows))
    for start in range(0, len(rows), _ROWS):
        indptr, _, values = store.counts.gather(rows[start : start + _ROWS])
        running = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
        found[start : start + _ROWS] = running[indptr[1:]] - running[indptr[:-1]]
    return found


def labels_without_class(job: Job, column: str, left: Iterable[str], prepared: Path | None) -> list[str]:
    """The label of each cell whose label is one of `left`: the model has no such class, so that these cells were not tested."""
    store = PreparedData(input_folder(job, "data")).store
    values, wanted = store.column(column), set(left)
    kept = None if prepared is None else set(PreparedData(prepared).store.obs_names)
    return [
        str(value)
        for name, value in zip(store.obs_names, values, strict=True)
        if str(value) in wanted and (kept is None or name in kept)
    ]
