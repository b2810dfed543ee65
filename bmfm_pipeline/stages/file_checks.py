"""One file after the other in the check step: what it holds, what becomes of its genes, and why it cannot be used."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bmfm_pipeline.config import RunConfig
from bmfm_pipeline.data.gene_report import GeneReport, report_genes
from bmfm_pipeline.data.sources import CellSource, check_source
from bmfm_pipeline.data.sources.checks import SHOWN, UNUSABLE
from bmfm_pipeline.data.transforms import Chain
from bmfm_pipeline.errors import DataError
from bmfm_pipeline.stages.gene_names import advice, check_gene_names, compared_with, has_floor, merges_genes
from bmfm_pipeline.stages.parts import Origins

_LOSSES = 5
# What reading a file raises whose parts are missing or do not fit.
_DAMAGED = (OSError, KeyError, ValueError)


@dataclass
class Looked:
    """What was found in some files: those that can be used, opened, with a row of numbers each and what `values` they hold together."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    set_aside: list[dict[str, Any]] = field(default_factory=list)
    sources: dict[str, CellSource] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Look:
    """Looks at some files one by one. `fitted`: the chain is that of a model; `alone`: the inputs of a run of one file, whose error is raised."""

    run: RunConfig
    chain: Chain
    fitted: bool
    need_counts: bool
    scratch: Path
    alone: Mapping[str, Any] | None = None

    def __call__(self, files: tuple[Sequence[tuple[str, Path | DataError]], Origins], out: Path) -> Looked:
        """Look at files, {name: h5ad, or why there is none}; their gene totals are written to `out`, as GeneTotals reads them."""
        known, origins = files
        reports = _GeneReports(self.chain, *compared_with(self.run))
        looked, totals = Looked(), {}
        for name, path in known:
            row: dict[str, Any] = {"file": name, "path": str(origins.uris[name])}
            try:
                cells, found, genes = self._look_at(name, path, origins, reports, row)
            except (DataError, *_DAMAGED) as error:
                if self.alone is not None:
                    raise
                reason = _reason(error, origins.uris[name], path)
                looked.set_aside.append({**row, "reason": reason, "largest_losses": [], "advice": []})
                continue
            row |= _numbers(found, genes)
            floor = self.run.data_module.transform_kwargs.gene_names.min_share_of_counts
            short = genes.shortfall(floor) if has_floor(self.run, self.chain) else None
            if short is not None:
                tips = advice(self.run, genes, cells)
                looked.set_aside.append({**row, "reason": _gene_reason(short, genes), "advice": tips})
            else:
                totals[str(len(looked.rows))] = found["gene_totals"]
                _add_up(looked.values, found)
                looked.rows.append(row)
                looked.sources[name] = cells
            cells.forget_tables()
        np.savez(out, **totals)
        return looked

    def _look_at(
        self, name: str, path: Path | DataError, origins: Origins, reports: "_GeneReports", row: dict[str, Any]
    ):
        if isinstance(path, DataError):
            raise path
        cells = origins.open(name, path, self.scratch)
        row |= {"cells": cells.n_cells, "genes": cells.n_genes}
        if not self.fitted:
            for _, step in self.chain.steps:
                if step.gives_names:
                    step.look_at(cells)
        settings = self.run.data_module.transform_kwargs
        duplicates = "sum" if merges_genes(self.chain) else settings.duplicate_genes
        logs = not self.need_counts and settings.input_values == "log_normalised"
        found = check_source(cells, need_counts=self.need_counts, log_normalised=logs, duplicate_genes=duplicates)
        if self.alone is not None:
            check_gene_names(self.run, self.chain, cells, found["gene_totals"], self.alone)
        return cells, found, reports.of(cells, found["gene_totals"])


class GeneTotals:
    """float64 (genes of the file,) of each file that can be used, read one after the other from (file, how many it holds)."""

    def __init__(self, parts: list[tuple[Path, int]]):
        self._parts = parts

    def __iter__(self) -> Iterator[np.ndarray]:
        for path, size in self._parts:
            with np.load(path) as stored:
                for number in range(size):
                    yield stored[str(number)]


def joined_values(found: list[dict[str, Any]]) -> dict[str, Any]:
    """What groups of files hold as what all of them hold."""
    values: dict[str, Any] = {}
    for one in found:
        _add_up(values, one)
    return values


class _GeneReports:
    """Gene reports of one file after another. Files with the same names have the same fates, unless counts decide."""

    def __init__(self, chain: Chain, vocabulary: str, known: list[str] | None):
        self.chain, self.vocabulary, self.known = chain, vocabulary, known
        self._counts_decide = any(step.gives_names and step.needs_pass for _, step in chain.steps)
        self._last: tuple[list[str], str, GeneReport] | None = None

    def of(self, cells: CellSource, totals: np.ndarray) -> GeneReport:
        names, maps = list(cells.var_names), self._maps()
        if self._last is None or self._counts_decide or self._last[:2] != (names, maps):
            self._last = names, maps, report_genes(self.chain, names, totals, self.vocabulary, self.known)
        return self._last[2].recount(totals)

    def _maps(self) -> str:
        """What steps took from the var table of the file that they looked at last."""
        return repr([getattr(step, "map_", None) for _, step in self.chain.steps])


def _numbers(found: dict[str, Any], genes: GeneReport) -> dict[str, Any]:
    return {
        **{key: found[key] for key in ("matrix", "whole_values", "cells_without_counts", "max", "total")},
        "naming": str(genes.naming),
        "name_kind": genes.naming.kind,
        "genes_known": len({fate.target for fate in genes.known}),
        "share_of_counts_kept": genes.share_of_counts,
        "gene_names": dict(Counter(fate.category for fate in genes.fates)),
        "largest_losses": genes.largest_losses(_LOSSES),
    }


def _add_up(values: dict[str, Any], found: dict[str, Any]) -> None:
    """Take what a file holds into what all hold, in place."""
    for key in ("cells_without_counts", "total"):
        values[key] = values.get(key, 0) + found[key]
    examples = values.get("cells_without_counts_examples", []) + found["cells_without_counts_examples"]
    values["cells_without_counts_examples"] = examples[:SHOWN]
    values["max"] = max(values.get("max", 0.0), found["max"])
    values["whole_values"] = values.get("whole_values", True) and found["whole_values"]


def _reason(error: Exception, *places: str | Path) -> str:
    """What is wrong with a file in one line, without its own name, as `places` spell it."""
    if isinstance(error, _DAMAGED):
        return f"could not be read ({type(error).__name__}: {error}); write the file again"
    text = str(error)
    for place in places:
        text = text.removeprefix(f"{place}")
    text = text.removeprefix(UNUSABLE).removeprefix(":")
    return "; ".join(line.strip().removeprefix("- ") for line in text.splitlines() if line.strip())


def _gene_reason(short: str, genes: GeneReport) -> str:
    losses = ", ".join(
        f"{fate.name} {fate.counts / genes.total if genes.total else 0:.1%}" for fate in genes.losses[:_LOSSES]
    )
    return f"{short}; its names look like {genes.naming}; largest losses: {losses}"
