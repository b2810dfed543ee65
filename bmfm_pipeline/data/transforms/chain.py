"""Run a chain over a source in chunks: fit what needs a pass, then write the processed file. Memory does not grow with cells."""

import contextlib
import functools
import itertools
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError
from scipy import sparse

from bmfm_pipeline.config.strict import readable
from bmfm_pipeline.data.processed import ProcessedWriter, Spool
from bmfm_pipeline.data.transforms.binning import Bin
from bmfm_pipeline.data.transforms.blocks import Block, StepCount
from bmfm_pipeline.data.transforms.columns import ColumnMap, take_columns
from bmfm_pipeline.data.transforms.parts import (
    Part,
    Spread,
    Writing,
    joined_counts,
    observe_part,
    seen_part,
    write_part,
    write_part_file,
)
from bmfm_pipeline.data.transforms.registry import STEPS
from bmfm_pipeline.data.transforms.steps import Log, NormalizeTotal, Step
from bmfm_pipeline.data.transforms.tpm import TPMNormalization
from bmfm_pipeline.data.transforms.variable_genes import HighlyVariableGenes
from bmfm_pipeline.errors import ConfigError, DataError, did_you_mean
from bmfm_pipeline.storage import disk_errors


@dataclass
class TransformReport:
    """Cells, genes and counts before the chain and after every step."""

    steps: list[StepCount] = field(default_factory=list)
    dropped_cells: dict[str, int] = field(default_factory=dict)
    dropped_examples: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def share_of_counts(self) -> float:
        return self.steps[-1].counts / self.steps[0].counts if self.steps and self.steps[0].counts else 0.0

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "share_of_counts": self.share_of_counts}


@dataclass
class AppliedCells:
    """New cells after a fitted chain: values (cells, genes) CSR, gene names of its columns, and why a cell is unusable."""

    values: sparse.csr_matrix
    gene_names: list[str]
    reasons: list[str | None]


def build_chain(steps: Iterable[dict[str, Any]]) -> "Chain":
    """A chain from `{transform_name, transform_args}` entries; ConfigError names an unknown step or argument."""
    built: list[tuple[str, Step]] = []
    for index, entry in enumerate(steps):
        name = entry["transform_name"]
        if name not in STEPS:
            hint = did_you_mean(name, STEPS, f"known: {', '.join(STEPS)}")
            raise ConfigError(f"transforms.{index}: unknown transform '{name}'; {hint}")
        try:
            built.append((name, STEPS[name].model_validate(dict(entry.get("transform_args") or {}))))
        except ValidationError as error:
            raise readable(error, f"transforms.{index} ({name})") from None
    base = changed = None
    for index, (name, step) in enumerate(built):
        if isinstance(step, HighlyVariableGenes):
            if step.needs_counts and changed:
                raise ConfigError(
                    f"transforms.{index} ({name}): flavor {step.flavor} needs raw counts; put it before {changed}"
                )
            step.log_base = base if step.log_base is None else step.log_base
        base = step.base if isinstance(step, Log) else base
        changed = changed or (name if step.changes_values else None)
    return Chain(built)


class Chain:
    """Steps in order. `fit` settles what needs to see data, `run` writes a processed file, `apply` serves prediction."""

    def __init__(self, steps: list[tuple[str, Step]]):
        self.steps = steps

    @property
    def n_values(self) -> int | None:
        """How many values the expressions can take, when the chain ends in bins."""
        bins = [step for _, step in self.steps if isinstance(step, Bin)]
        return bins[-1].n_values if bins else None

    @property
    def needs_counts(self) -> bool:
        """Whether the values must be raw counts: a step normalises them by the cell's total, or looks at their variance."""
        return any(
            isinstance(step, NormalizeTotal | TPMNormalization)
            or (isinstance(step, HighlyVariableGenes) and step.needs_counts)
            for _, step in self.steps
        )

    def _prepared(
        self, upto: int, names: list[str]
    ) -> list[tuple[Step, list[str], np.ndarray | ColumnMap | None, list[str]]]:
        """For each of the first `upto` steps: (step, gene names it sees, genes that stay, names after it)."""
        prepared = []
        for _, step in self.steps[:upto]:
            after, keep = step.genes(names)
            prepared.append((step, names, keep, after))
            names = after
        return prepared

    def blocks(
        self,
        source,
        upto: int | None = None,
        rows: np.ndarray | None = None,
        counter: list[StepCount] | None = None,
        obs_columns: dict[str, np.ndarray] | None = None,
        row_filters: bool = True,
    ) -> Iterator[Block]:
        """Each chunk of the source, or of some files of one, after the first `upto` steps (None: all).

        `rows`: boolean (cells of the source,), those to keep. What steps leave is added to `counter`, and columns that they add to obs
        to `obs_columns`, (cells of the source,) each.
        """
        prepared = self._prepared(len(self.steps) if upto is None else upto, source.var_names)
        first = source.first_row
        for start, chunk in source.iter_chunks():
            block = Block(start, chunk)
            if rows is not None:
                block.keep(rows[block.numbers - first])
            if counter is not None:
                counter[0].add(block, len(source.var_names))
            for position, (step, seen, columns, after) in enumerate(prepared):
                if row_filters:
                    block.keep(step.keep_cells(block.values, seen))
                if obs_columns is not None:
                    for column, added in step.obs_columns(block.values, seen).items():
                        of_all = obs_columns.setdefault(column, np.full(source.n_cells, np.nan))
                        of_all[block.numbers - first] = added
                if step.changes_values:
                    block.values = step.values(block.own_values(), seen)
                block.take(columns)
                if counter is not None:
                    counter[position + 1].add(block, len(after))
            block.settle()
            yield block

    def look_at(self, source) -> None:
        """Let every step see the source's tables, and the files and packages it needs, before any value is read."""
        for _, step in self.steps:
            step.look_at(source)

    def fit(self, source, rows: np.ndarray | None, spread: Spread | None = None) -> None:
        """Let every step that needs it see the cells `rows` (None: all), after the steps before it; each pass reads the file once.

        `spread`: several files are read in parts, wherever it says. Sums of numbers with fractions are then added up in another order.
        """
        self.look_at(source)
        wanted = None
        if rows is not None:
            wanted = np.zeros(source.n_cells, dtype=bool)
            wanted[rows] = True
        for position, (_, step) in enumerate(self.steps):
            again = step.needs_pass
            while again:
                names = self.names_after(position, source.var_names)
                if spread is None:
                    observe_part(self, position, source, wanted)
                else:
                    for seen in spread.each(functools.partial(seen_part, self, position), wanted):
                        step.add(seen)
                again = bool(step.finish(names))

    def names_after(self, upto: int, names: list[str]) -> list[str]:
        """Gene names after the first `upto` steps."""
        return self._prepared(upto, names)[-1][3] if upto else names

    def gene_names(self, names: list[str]) -> list[str]:
        """Gene names after renaming and keeping, before filters that depend on data."""
        for _, step in self.steps:
            if step.gives_names or not step.needs_pass:
                names, _ = step.genes(names)
        return names

    def vocabulary_genes(self, source, rows: np.ndarray | None, spread: Spread | None = None) -> list[str]:
        """Gene names of the processed file, fitted on `rows` (None: all)."""
        self.fit(source, rows, spread)
        return self.names_after(len(self.steps), source.var_names)

    def fitted_genes(self, names: list[str]) -> list[str]:
        """Gene names that a fitted chain leaves of `names`."""
        return self.names_after(len(self.steps), names)

    def run(
        self,
        source,
        rows: np.ndarray | None,
        out_path: Path,
        obs_extra: dict[str, np.ndarray],
        keep_counts: bool = True,
        layer: str = "counts",
        keep_empty: bool = False,
        fitted: bool = False,
        row_filters: bool = True,
        spread: Spread | None = None,
    ) -> TransformReport:
        """Fit on `rows` (numbers of source rows, None: all) unless `fitted`, then write `out_path` in one pass over the source.

        `obs_extra` are columns to add to obs, one value per source row. Cells without any value left are dropped and counted,
        unless `keep_empty`. `keep_counts` stores the source's values of the kept cells and genes as layers[`layer`]; values
        that are no whole numbers are left out of "counts" and noted. Without `row_filters`, for cells of other data than the chain was fitted to, steps
        leave out no cell, and what was fitted is taken as it is. `spread`: several files are read in parts, wherever it says. Raises
        DataError when nothing is left.
        """
        began = time.perf_counter()
        if fitted:
            if row_filters:
                self.look_at(source)
        else:
            self.fit(source, rows, spread)
        writing = Writing(keep_counts, layer, keep_empty, row_filters)
        with disk_errors(out_path), contextlib.ExitStack() as stack:
            if spread is None:
                spools = [stack.enter_context(Spool(Path(out_path).parent))]
                parts = [write_part(self, writing, source, spools[0])]
            else:
                found = spread.write(functools.partial(write_part_file, self, writing))
                parts = [part for part, _ in found]
                spools = [stack.enter_context(Spool.opened(path)) for _, path in found]
            report = self._write(source, parts, spools, out_path, obs_extra, writing)
        report.seconds = time.perf_counter() - began
        return report

    def _write(
        self, source, parts: list[Part], spools: list[Spool], out_path: Path, obs_extra, writing: Writing
    ) -> TransformReport:
        """Join the parts, each in its spool, into the processed file."""
        names = self.names_after(len(self.steps), source.var_names)
        rows_kept = np.concatenate([part.numbers for part in parts])
        counter = joined_counts(parts)
        report = _report(counter, source, rows_kept)
        if any(part.fractions for part in parts):
            report.notes.append(f"{source.where} holds values that are no counts, so layers['counts'] was left out")
        if source.unused:
            report.notes.append(f"not carried over from the input: {', '.join(source.unused)}")
        if not len(rows_kept) or not names:
            lines = "; ".join(f"{entry.step}: {entry.cells} cells, {entry.genes} genes" for entry in counter)
            raise DataError(
                f"{source.path}: no cell is left after the transforms ({lines}); loosen the filter that removed them"
            )
        obs = source.obs.iloc[rows_kept].copy()
        for name in parts[0].added:
            obs[name] = np.concatenate([part.added[name] for part in parts])
        for name, column in obs_extra.items():
            obs[name] = np.asarray(column)[rows_kept]
        with ProcessedWriter(out_path, obs, names, (len(rows_kept), len(names))) as writer:
            writer.copy("X", [(spool, part.values) for spool, part in zip(spools, parts, strict=True)])
            if all(part.counts is not None for part in parts):
                like = "X" if all(part.same_places for part in parts) else None
                counts = [(spool, part.counts) for spool, part in zip(spools, parts, strict=True)]
                writer.copy(f"layers/{writing.layer}", counts, like=like)
        return report

    def counter(self, keep_empty: bool = False) -> list[StepCount]:
        """Nothing counted yet: the input, every step, and the cells without values that are dropped at last unless `keep_empty`."""
        titles = ["input", *(step_title(name, step) for name, step in self.steps)]
        return [StepCount(title) for title in [*titles, *([] if keep_empty else ["drop cells without values"])]]

    def apply(self, cells: sparse.csr_matrix, names: list[str]) -> tuple[sparse.csr_matrix, list[str]]:
        """Gene mapping and fitted value transforms for new cells (CSR float32), without any row filter: every cell keeps its row."""
        values = cells.copy()
        for _, step in self.steps:
            values = step.values(values, names)
            after, keep = step.genes(names)
            if keep is not None:
                values = take_columns(values, keep)
            names = after
        return values, names

    def apply_genes(self, cells: sparse.csr_matrix, names: list[str]) -> sparse.csr_matrix:
        """The columns that `apply` leaves, with the values the cells came with: raw counts stay counts."""
        values = sparse.csr_matrix(cells, dtype=np.float32)
        for _, step in self.steps:
            names, keep = step.genes(names)
            if keep is not None:
                values = take_columns(values, keep)
        return values

    def apply_to_cells(self, cells: sparse.csr_matrix, names: list[str]) -> "AppliedCells":
        """As `apply`, with a reason for every cell that a model cannot use (None where it can).

        Raises DataError when no gene is left. Fitted gene filters hold, row filters do not: each cell keeps its row.
        """
        cells = sparse.csr_matrix(cells, dtype=np.float32, copy=True)
        bad = ~np.isfinite(cells.data) | (cells.data < 0)
        broken = np.unique(np.repeat(np.arange(cells.shape[0]), np.diff(cells.indptr))[bad])
        cells.data[bad] = 0
        cells.sum_duplicates()
        cells.eliminate_zeros()
        values, kept = self.apply(cells, names)
        if not kept:
            raise DataError(
                f"none of the {len(names)} genes is one the model was made with, e.g. {', '.join(names[:5])}; check the gene names"
            )
        values.eliminate_zeros()
        values.sort_indices()
        reasons: list[str | None] = [None] * cells.shape[0]
        for row in np.flatnonzero(np.diff(values.indptr) == 0):
            reasons[row] = (
                "no expressed gene"
                if cells.indptr[row] == cells.indptr[row + 1]
                else "no gene that the model knows is expressed"
            )
        for row in broken:
            reasons[row] = "holds negative, NaN or infinite values"
        return AppliedCells(values, kept, reasons)

    def to_json(self) -> list[dict[str, Any]]:
        """The chain with what it fitted, as plain values."""
        return [
            {"transform_name": name, "transform_args": step.model_dump(mode="json"), "fitted": step.fitted()}
            for name, step in self.steps
        ]

    @classmethod
    def from_json(cls, stored: list[dict[str, Any]]) -> "Chain":
        chain = build_chain(stored)
        for (_, step), entry in zip(chain.steps, stored, strict=True):
            step.restore(entry.get("fitted") or {})
        return chain


def step_title(name: str, step: Step) -> str:
    arguments = {
        key: value
        for key, value in step.model_dump(exclude_none=True, exclude_defaults=True).items()
        if not isinstance(value, dict | list)
    }
    words = ", ".join(
        f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in arguments.items()
    )
    return name.removesuffix("Transform") + (f"({words})" if words else "")


def _report(counter: list[StepCount], source, rows_kept: np.ndarray) -> TransformReport:
    report = TransformReport(steps=counter)
    for before, after in itertools.pairwise(counter):
        if before.cells > after.cells:
            report.dropped_cells[after.step] = before.cells - after.cells
    gone = np.setdiff1d(np.arange(source.n_cells), rows_kept)
    if len(gone):
        report.dropped_examples["cells"] = [str(name) for name in source.obs.index[gone[:5]]]
    return report
