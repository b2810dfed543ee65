"""What losses derive from the class sizes of the training cells: weights, margins, weights of positives. NumPy only."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ClassTables:
    """What is known of the classes of a label column.

    `counts`: training cells of each class (C,); where a cell may have several, (2, C): cells without and with each class. `allowed`:
    bool (C, C), by row the classes that a label stands for, itself among them.
    """

    counts: np.ndarray | None = None
    allowed: np.ndarray | None = None


def class_weights(counts: np.ndarray, method: str, beta: float = 0.999) -> np.ndarray:
    """Weights float64 (classes,) with mean 1 over the classes that have cells; 0 for a class without any.

    `balanced`: proportional to 1 / n. `effective_number`: to (1 - beta) / (1 - beta^n), where n cells count as that many distinct
    ones (Cui et al. 2019, Class-Balanced Loss Based on Effective Number of Samples): beta 0 weighs all classes alike, beta near 1
    as `balanced`.
    """
    counts = np.asarray(counts, dtype=np.float64)
    present = counts > 0
    sizes = np.where(present, counts, 1.0)
    if method == "balanced":
        weights = 1.0 / sizes
    else:
        # 1 - beta^n by expm1: at beta near 1 the difference would lose its digits.
        weights = np.ones_like(sizes) if beta == 0 else (1.0 - beta) / -np.expm1(sizes * np.log(beta))
    weights = np.where(present, weights, 0.0)
    return weights * (present.sum() / weights.sum()) if present.any() else weights


def class_margins(counts: np.ndarray, max_margin: float) -> np.ndarray:
    """Margins float64 (classes,), proportional to n^(-1/4), the largest being `max_margin` (Cao et al. 2019).

    A class without cells has the largest: it is no target in training.
    """
    counts = np.asarray(counts, dtype=np.float64)
    present = counts > 0
    if not present.any():
        return np.full(len(counts), float(max_margin))
    return max_margin * (counts[present].min() / np.where(present, counts, counts[present].min())) ** 0.25


def positive_weights(counts: np.ndarray) -> np.ndarray:
    """Weights float64 (classes,) of the cells that have a class, from counts (2, classes) of cells without and with it.

    Cells without over cells with, so that both sides weigh the same; 1 for a class that no cell, or every cell, has.
    """
    without, having = np.asarray(counts, dtype=np.float64)
    usable = (without > 0) & (having > 0)
    return np.where(usable, without / np.where(having > 0, having, 1.0), 1.0)
