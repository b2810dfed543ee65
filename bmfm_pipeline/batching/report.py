"""What batches left out: counted, never silent."""

import itertools
import threading
from dataclasses import dataclass, field

import numpy as np
import torch

_OUTSIDE, _EMPTY, _CELLS = range(3)
_THREADS, _WORKERS = 128, 128
_THREAD, _NEXT_ROW = threading.local(), itertools.count()


@dataclass
class BatchReport:
    """What was left out on the way: counted, never silent. Forked loader workers add to them once `share` was called.

    `unknown_genes` are gene columns without a token, `genes_not_allowed` those that limit_genes leaves out although they have one,
    `genes_without_median` and `genes_without_position` the usable ones that a table of medians or gene positions lacks.
    """

    unknown_genes: int = 0
    unknown_gene_examples: list[str] = field(default_factory=list)
    genes_not_allowed: int = 0
    genes_without_median: int = 0
    genes_without_position: int = 0
    _counts: torch.Tensor = field(
        default_factory=lambda: torch.zeros((_THREADS + _WORKERS, 3), dtype=torch.int64), repr=False
    )

    def share(self) -> None:
        """Put the counts into memory that worker processes share."""
        self._counts.share_memory_()

    def add(self, outside: int, empty: int, cells: int) -> None:
        """Count one batch; every thread and worker process has a row of its own, so that none overwrites another's."""
        worker = torch.utils.data.get_worker_info()
        if worker is not None:
            row = _THREADS + worker.id % _WORKERS
        else:
            row = getattr(_THREAD, "row", None)
            if row is None:
                row = _THREAD.row = next(_NEXT_ROW) % _THREADS
        counts = self._counts.numpy()[row]
        counts[_OUTSIDE] += outside
        counts[_EMPTY] += empty
        counts[_CELLS] += cells

    @property
    def values_outside_vocabulary(self) -> int:
        """Tokenised values that became [UNK] because their vocabulary ends before them; counted at every use."""
        return int(self._counts[:, _OUTSIDE].sum())

    @property
    def cells_without_genes(self) -> int:
        """Cells that had no gene with a token, so that only special tokens were left; counted at every use."""
        return int(self._counts[:, _EMPTY].sum())

    @property
    def cells_built(self) -> int:
        """Cells put into batches so far."""
        return int(self._counts[:, _CELLS].sum())


def first_report(ids: np.ndarray, names, tables, usable: np.ndarray, order: str | None) -> BatchReport:
    """What is known before the first batch: how many genes cannot enter one, by their token `ids` (genes,) and tables."""
    unknown, known = np.flatnonzero(ids == 0), ids > 0
    report = BatchReport(
        len(unknown), [str(names[i]) for i in unknown[:10] if i < len(names)] if names is not None else []
    )
    if tables.allowed is not None:
        report.genes_not_allowed = int(np.sum(known & ~tables.allowed))
        known = known & tables.allowed
    if tables.medians is not None:
        report.genes_without_median = int(np.sum(known & ~(tables.medians > 0)))
    if order == "chromosomal":
        report.genes_without_position = int(np.sum((usable > 0) & (tables.places < 0)))
    return report
