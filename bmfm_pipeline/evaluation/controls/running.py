"""Controls on the cells of a split: values are made once and shared by all that read them."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bmfm_pipeline.errors import ConfigError
from bmfm_pipeline.evaluation.controls.choice import ALL, FULL, READS, VALUES_FULL, which_controls
from bmfm_pipeline.evaluation.controls.fitting import fit_classes, fit_numbers, principal_components
from bmfm_pipeline.evaluation.controls.sequences import gc_content, log_words
from bmfm_pipeline.evaluation.controls.values import as_they_are, log_cp10k
from bmfm_pipeline.evaluation.predictions import LabelPredictions

logger = logging.getLogger(__name__)


class ControlCells:
    """Training and test cells of a split, as controls read them.

    `counts` offers rows(array) -> scipy CSR of raw counts, of genes `genes`, or, with `kind` other than counts, of values that are taken
    as they are. `embeddings` {"train": (array (n, features), rows (n,)),
    "test": the same} are the model's; their rows may be fewer than those of the split. `kind` words: `counts` is a SequenceValues.
    """

    def __init__(
        self,
        counts,
        train_rows: np.ndarray,
        test_rows: np.ndarray,
        seed: int = 0,
        genes: Sequence[str] | None = None,
        embeddings: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = None,
        kind: str = "counts",
    ):
        self._kind, self._scaled = kind, log_cp10k if kind == "counts" else as_they_are
        self.rows = {"train": np.asarray(train_rows), "test": np.asarray(test_rows)}
        self.seed, self.genes, self.embeddings = seed, genes, embeddings
        self._counts = counts
        self._log: dict[str, Any] = {}
        self._components: tuple[bytes, Any] = (b"", None)

    def rows_of(self, control: str, split: str) -> np.ndarray:
        """The rows of the store that a control is fitted to, or asked about."""
        if READS[control] != "embeddings":
            return self.rows[split]
        if self.embeddings is None:
            raise ConfigError(
                f"evaluation.controls: {control} reads the model's embeddings, which were not made for this evaluation"
            )
        return np.asarray(self.embeddings[split][1])

    def values(self, control: str, known: np.ndarray) -> tuple[Any, Any]:
        """(values of the training rows where `known`, values of the test rows), as the control reads them."""
        kind = READS[control]
        if kind == "labels":
            return np.zeros((int(known.sum()), 0)), np.zeros((len(self.rows["test"]), 0))
        if kind == "embeddings":
            return self.embeddings["train"][0][known], self.embeddings["test"][0]
        if kind == "letters":
            train, test = (self._counts.letters(self.rows[split]) for split in ("train", "test"))
        elif kind == "composition":
            train, test = (gc_content(self._counts.rows(self.rows[split])) for split in ("train", "test"))
        else:
            train, test = self._logs("train"), self._logs("test")
        train = train if known.all() else train[known]
        if control != "pca50_logistic":
            return train, test
        if self._components[1] is None or self._components[0] != known.tobytes():
            self._components = (known.tobytes(), principal_components(train, test, self.seed))
        return self._components[1]

    def _logs(self, split: str):
        if self._kind == "words" and not self._log:
            both = log_words(*(self._counts.rows(self.rows[part]) for part in ("train", "test")))
            self._log = dict(zip(("train", "test"), both, strict=True))
        if split not in self._log:
            self._log[split] = self._scaled(self._counts.rows(self.rows[split]))
        return self._log[split]


def control_predictions(
    control: str, cells: ControlCells, values: np.ndarray, class_names: list[str]
) -> LabelPredictions | None:
    """What `control` predicts for the test rows of `cells`; None where no training cell has a known label.

    `values` (all cells of the store,): class ids, -100 where unknown, or numbers, nan where unknown and `class_names` empty.
    """
    fit, truth = values[cells.rows_of(control, "train")], values[cells.rows_of(control, "test")]
    known = fit >= 0 if class_names else np.isfinite(fit)
    if not known.any():
        return None
    train_x, test_x = cells.values(control, known)
    if not class_names:
        return LabelPredictions(truth, fit_numbers(control, train_x, fit[known], test_x, cells.seed))
    if control == "celltypist":
        from bmfm_pipeline.evaluation.controls.celltypist import fit_celltypist

        return LabelPredictions(
            truth, fit_celltypist(train_x, fit[known], test_x, cells.genes, cells.seed), None, class_names
        )
    probabilities = fit_classes(control, train_x, fit[known], test_x, len(class_names), cells.seed)
    return LabelPredictions(truth, probabilities.argmax(axis=1), probabilities, class_names)


def run_controls(
    counts,
    train_rows: np.ndarray,
    test_rows: np.ndarray,
    labels: dict[str, np.ndarray],
    class_names: dict[str, list[str]],
    which: Sequence[str],
    seed: int = 0,
    embeddings: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = None,
) -> dict[str, dict[str, LabelPredictions]]:
    """{control: {label column: predictions of the test rows}}, in memory.

    `counts` offers rows(array) -> scipy CSR of raw counts; `labels` holds class ids (-100 unknown) or values (nan unknown) of all
    cells. Controls are fitted on the training rows with known labels, and on nothing else. Of `which` a column gets those that are
    for classes, or for numbers; `embeddings` as ControlCells takes them, for those that read them.
    """
    if unknown := sorted(set(which) - set(ALL)):
        raise ConfigError(f"evaluation.controls: unknown control {', '.join(unknown)}; known: {', '.join(ALL)}")
    cells = ControlCells(counts, train_rows, test_rows, seed, embeddings=embeddings)
    found: dict[str, dict[str, LabelPredictions]] = {}
    for name, values in labels.items():
        names = class_names.get(name) or []
        own = FULL if names else VALUES_FULL
        chosen = [control for control in which if control in own] or which_controls([], numbers=not names)
        for control in chosen:
            predictions = control_predictions(control, cells, values, names)
            if predictions is None:
                logger.warning("controls: no training cell has a known %s, so there is nothing to fit them on", name)
                break
            found.setdefault(control, {})[name] = predictions
    return found
