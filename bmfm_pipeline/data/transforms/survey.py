"""What a chain would keep of a source, in one pass and without writing anything."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bmfm_pipeline.data.transforms.blocks import StepCount
from bmfm_pipeline.data.transforms.chain import Chain, step_title


@dataclass
class Survey:
    """Every cell's totals and every gene's, and what stays after each step of the chain.

    `totals` and `genes_found`: (cells,) sum of values and number of genes above zero. `gene_totals`: (genes,).
    """

    totals: np.ndarray
    genes_found: np.ndarray
    gene_totals: np.ndarray
    steps: list[StepCount] = field(default_factory=list)
    not_followed: list[str] = field(default_factory=list)
    not_finite: int = 0
    negative: int = 0
    fractional: int = 0

    def to_plain(self) -> dict[str, Any]:
        """Plain numbers for a report."""
        empty = self.totals == 0
        plain = {
            "cells": len(self.totals),
            "cells_without_counts": int(empty.sum()),
            "genes_without_counts": int((self.gene_totals == 0).sum()),
            "not_finite": self.not_finite,
            "negative": self.negative,
            "fractional": self.fractional,
        }
        if not empty.all():
            plain["counts_per_cell"] = [
                round(float(value), 1) for value in np.percentile(self.totals[~empty], (0, 50, 100))
            ]
            plain["genes_per_cell"] = [int(value) for value in np.percentile(self.genes_found[~empty], (0, 50, 100))]
        if self.steps:
            first, last = self.steps[0], self.steps[-1]
            plain["kept"] = {
                "cells": last.cells,
                "genes": last.genes,
                "share_of_counts": round(last.counts / first.counts, 4) if first.counts else 0.0,
                "steps": [{"step": entry.step, "cells": entry.cells, "genes": entry.genes} for entry in self.steps],
                "not_followed": self.not_followed,
            }
        return plain


class _Watched:
    """A source whose chunks are looked at as they pass."""

    def __init__(self, source, see):
        self._source, self._see = source, see

    def __getattr__(self, name: str):
        return getattr(self._source, name)

    def iter_chunks(self, rows_per_chunk: int | None = None):
        for start, chunk in self._source.iter_chunks(rows_per_chunk):
            self._see(start, chunk)
            yield start, chunk


def survey(source, chain: Chain | None) -> Survey:
    """Read all cells of `source` once; with a chain, count what its steps leave.

    Statistics of a step that must see the data (such as FilterGenes) are of all cells here, not of training cells; what would
    follow the first such step is named in `not_followed`. Memory grows by 16 bytes a cell.
    """
    found = Survey(np.zeros(source.n_cells), np.zeros(source.n_cells, dtype=np.int64), np.zeros(source.n_genes))

    def see(start: int, chunk) -> None:
        rows = slice(start, start + chunk.shape[0])
        finite = np.isfinite(chunk.data)
        values = np.where(finite, chunk.data, 0)
        found.not_finite += int((~finite).sum())
        found.negative += int((values < 0).sum())
        found.fractional += int((values != np.rint(values)).sum())
        found.genes_found[rows] = np.diff(chunk.indptr)
        ends = np.concatenate(([0], np.cumsum(values, dtype=np.float64)))[chunk.indptr]
        found.totals[rows] = np.diff(ends)
        found.gene_totals += np.bincount(chunk.indices, weights=values, minlength=source.n_genes)

    watched = _Watched(source, see)
    if chain is None:
        for _ in watched.iter_chunks():
            pass
        return found
    _follow(watched, chain, found)
    return found


def _follow(source, chain: Chain, found: Survey) -> None:
    steps = chain.steps
    upto = next((position for position, (_, step) in enumerate(steps) if step.needs_pass), len(steps))
    fitted = steps[upto] if upto < len(steps) else None
    chain.look_at(source)
    counter = chain.counter(keep_empty=True)[: upto + 1]
    gene_counts, names = None, chain.names_after(upto, source.var_names)
    for block in chain.blocks(source, upto, counter=counter):
        if fitted is not None:
            fitted[1].observe_rows(block.values, names, block.numbers)
            seen = np.bincount(block.counts.indices, weights=block.counts.data, minlength=len(names))
            gene_counts = seen if gene_counts is None else gene_counts + seen
    found.steps = counter
    if fitted is None:
        return
    name, step = fitted
    if step.finish(names) or step.filters_cells:  # it needs another look, or would drop cells by what it found
        found.not_followed = [step_title(name, step) for name, step in steps[upto:]]
        return
    after, target = step.column_map(names)
    left = 0.0 if gene_counts is None else float(gene_counts[target >= 0].sum())
    counter.append(StepCount(step_title(name, step), counter[-1].cells, len(after), left))
    found.not_followed = [step_title(name, step) for name, step in steps[upto + 1 :]]
