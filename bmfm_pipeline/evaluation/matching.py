"""Which test cells two evaluations share, and so how their scores may be compared."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bmfm_pipeline.errors import DataError
from bmfm_pipeline.evaluation.predictions import LabelPredictions

# Fewer shared cells than this say less, paired, than all of both sides do unpaired.
FEWEST_SHARED = 20
# Names of cells such as 0, 1, 2 are those of other cells elsewhere: then their labels disagree.
MOST_DIFFERING = 0.05
_LISTED = 5


@dataclass(frozen=True)
class Matched:
    """Rows of both sides that are compared: of the same cells in the same order where `paired`, else all that are known.

    `sentence` says which; `notes` what is not compared.
    """

    rows_a: np.ndarray
    rows_b: np.ndarray
    paired: bool
    sentence: str
    notes: tuple[str, ...] = ()


def match_cells(
    cells_a: Sequence[str], a: LabelPredictions, cells_b: Sequence[str], b: LabelPredictions
) -> Matched | None:
    """Match cells by name and truth; `a` and `b` number classes alike. None where a side has no cell with a known label."""
    known_a, known_b = np.flatnonzero(a.known), np.flatnonzero(b.known)
    if not len(known_a) or not len(known_b):
        return None
    place = {cells_b[row]: row for row in known_b}
    shared = [(row, place[cells_a[row]]) for row in known_a if cells_a[row] in place]
    rows_a, rows_b = np.array(shared, dtype=np.int64).reshape(-1, 2).T
    same = _same(a.truth[rows_a], b.truth[rows_b], a.is_regression)
    differing, n_shared = int((~same).sum()), len(rows_a)
    counts = f"{len(known_a):,} of A and {len(known_b):,} of B"
    if n_shared and differing > MOST_DIFFERING * n_shared:
        why = (
            f"{differing:,} of {n_shared:,} cells of the same name have other labels, so they are taken for other cells"
        )
        return _unpaired(known_a, known_b, counts, why)
    rows_a, rows_b = rows_a[same], rows_b[same]
    if not n_shared:
        return _unpaired(known_a, known_b, counts, "they share no cell")
    if len(rows_a) < min(FEWEST_SHARED, len(known_a), len(known_b)):
        return _unpaired(known_a, known_b, counts, f"they share only {len(rows_a)}")
    notes = (f"{differing:,} shared cells have another label in B than in A and are left out",) if differing else ()
    if len(rows_a) == len(known_a) == len(known_b):
        return Matched(rows_a, rows_b, True, f"paired: the same {len(rows_a):,} test cells for both", notes)
    sentence = f"paired on the {len(rows_a):,} test cells that both have ({counts}); the others are left out"
    return Matched(rows_a, rows_b, True, sentence, notes)


def _unpaired(known_a: np.ndarray, known_b: np.ndarray, counts: str, why: str) -> Matched:
    sentence = (
        f"unpaired: the test cells are not the same ({counts}; {why}), so each side is resampled by itself, and part of a difference may "
        "be that of the cells"
    )
    return Matched(known_a, known_b, False, sentence)


def _same(truth: np.ndarray, other: np.ndarray, numbers: bool) -> np.ndarray:
    return np.isclose(truth, other, rtol=1e-5, atol=0) if numbers else truth == other


def numbered_alike(target: str, a: LabelPredictions, b: LabelPredictions) -> LabelPredictions:
    """`b` with the class ids of `a`. Raises DataError where their label dictionaries hold other classes."""
    if a.is_regression != b.is_regression:
        kinds = ["numbers" if label.is_regression else "classes" for label in (a, b)]
        raise DataError(f"{target}: A predicts {kinds[0]}, B {kinds[1]}; there is nothing in common to compare")
    if a.class_names == b.class_names:
        return b
    only_a, only_b = (
        [name for name in names if name not in others]
        for names, others in ((a.class_names, b.class_names), (b.class_names, a.class_names))
    )
    if only_a or only_b:
        listed = "; ".join(
            f"only {side} has {', '.join(names[:_LISTED])}{f' and {len(names) - _LISTED} more' if len(names) > _LISTED else ''}"
            for side, names in (("A", only_a), ("B", only_b))
            if names
        )
        raise DataError(
            f"{target}: the label dictionaries of A ({len(a.class_names)} classes) and B ({len(b.class_names)}) differ: {listed}. "
            "Scores over other classes cannot be compared; evaluate both models on data of the same labels"
        )
    ids = np.array([a.class_names.index(name) for name in b.class_names], dtype=np.int64)
    back = np.argsort(ids)
    return LabelPredictions(
        np.where(b.truth >= 0, ids[np.maximum(b.truth, 0)], b.truth),
        ids[b.predicted],
        None if b.probabilities is None else b.probabilities[:, back],
        list(a.class_names),
        only_top=b.only_top,
    )
