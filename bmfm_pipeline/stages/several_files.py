"""Several files in the check step: each is looked at by itself, what cannot be used is set aside and said, the rest is joined."""

import logging
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bmfm_pipeline.config import RunConfig
from bmfm_pipeline.data.gene_report import GeneReport, report_genes
from bmfm_pipeline.data.sources import CellSource, check_source, open_source
from bmfm_pipeline.data.sources.checks import SHOWN, UNUSABLE
from bmfm_pipeline.data.sources.several import FILE_COLUMN, SeveralFiles
from bmfm_pipeline.data.transforms import Chain, build_chain
from bmfm_pipeline.errors import DataError
from bmfm_pipeline.stages.file_table import selection_in_words
from bmfm_pipeline.stages.gene_names import (
    advice,
    chain_steps,
    check_gene_names,
    compared_with,
    has_floor,
    merges_genes,
)
from bmfm_pipeline.storage import read_json, write_json_atomic

logger = logging.getLogger(__name__)
PLACE = "data_module.transform_kwargs"
LIMIT = f"{PLACE}.max_share_of_files_set_aside"
FILES = "files.json"
# Share of the counts of a file that may be lost because another file has named a column alike.
LOST_BY_JOINING = 0.001
_LOSSES = 5
# What reading a file raises whose parts are missing or do not fit.
_DAMAGED = (OSError, KeyError, ValueError)


@dataclass
class CheckedFiles:
    """Files that were looked at one by one: `cells`, those that stay as one source; what `values` they hold; a row of numbers each."""

    cells: SeveralFiles
    values: dict[str, Any]
    rows: list[dict[str, Any]]
    set_aside: list[dict[str, Any]]
    totals: list[Path]
    notes: list[str] = field(default_factory=list)
    selection: dict[str, Any] = field(default_factory=dict)

    def finish(self, genes: GeneReport, folder: Path) -> None:
        """Complete the rows by what became of each file's genes among those of all, and write files.json in `folder`.

        Raises DataError where a file lost counts because another one has a column of the same new name.
        """
        known = np.array([fate.category in ("matched", "renamed", "merged") for fate in genes.fates])
        lost = []
        for number, row in enumerate(self.rows):
            columns, totals = self.cells.columns_of(number), np.load(self.totals[number])
            share = float(totals[known[columns]].sum() / totals.sum()) if totals.any() else 0.0
            if row["share_of_counts_kept"] - share > LOST_BY_JOINING:
                worst = sorted(np.flatnonzero(~known[columns]), key=lambda at: -totals[at])[:3]
                names = ", ".join(
                    f"{genes.fates[columns[at]].name} ({genes.fates[columns[at]].why})" for at in worst if totals[at]
                )
                lost.append((row["file"], f"{row['share_of_counts_kept'] - share:.1%} of its counts, e.g. {names}"))
            row["share_of_counts_kept"] = share
        if lost:
            shown = "\n".join(f"- {line}" for line in said_once(lost, 10))
            raise DataError(
                f"{self.cells.path}: joined, {len(lost)} files would lose genes that other files call otherwise:\n{shown}\n"
                f"Have the columns of a gene added up: {PLACE}.gene_names.table=hgnc (after `bmfm genes download`) with "
                f"{PLACE}.gene_names.duplicates=sum, or, with RenameGenesTransform, by its argument duplicates: sum"
            )
        write_json_atomic(folder / FILES, self.to_plain())

    def of_genes(self) -> dict[str, Any]:
        """What the gene report says of each file."""
        keys = ("file", "genes", "genes_known", "share_of_counts_kept", "naming", "gene_names", "largest_losses")
        return {
            "files": [{key: row[key] for key in keys} for row in self.rows],
            "files_set_aside": [
                {key: entry[key] for key in (*keys, "reason") if key in entry} for entry in self.set_aside
            ],
        }

    def table(self) -> list[dict[str, Any]]:
        """Rows for a person: files set aside with the reason, and what sets the others apart."""
        rows = [{"what": f"set aside: {entry['file']}", "found": entry["reason"]} for entry in self.set_aside]
        return rows + [{"what": "to know", "found": note} for note in self.notes]

    def to_plain(self) -> dict[str, Any]:
        in_files = np.zeros(self.cells.n_genes, dtype=np.int64)
        for number in range(len(self.rows)):
            in_files[self.cells.columns_of(number)] += 1
        return {
            "files": self.rows,
            "set_aside": self.set_aside,
            "genes_in_all_files": int((in_files == len(self.rows)).sum()),
            "genes_in_one_file": int((in_files == 1).sum()) if len(self.rows) > 1 else 0,
            "notes": self.notes,
            "selection": self.selection,
        }


def look_at_files(
    run: RunConfig,
    files: Mapping[str, Path | DataError],
    inputs: dict[str, Any],
    source,
    scratch: Path,
    need_counts: bool,
    fitted: Chain | None = None,
) -> CheckedFiles:
    """Check every file of {name: h5ad, or why there is none} of `source` alone and join those that can be used.

    `fitted`: the chain of the model that cells are prepared for, in place of the config's.
    Raises DataError that lists the files set aside when they are more than the share that the config allows. With one file its
    own error is raised.
    """
    settings = run.data_module.transform_kwargs
    chain = fitted or build_chain(chain_steps(run))
    reports = _GeneReports(chain, *compared_with(run))
    stays: dict[str, CellSource] = {}
    rows, aside, totals = [], [], []
    values: dict[str, Any] = {}
    scratch.mkdir(parents=True, exist_ok=True)
    for number, (name, path) in enumerate(files.items()):
        row: dict[str, Any] = {"file": name, "path": str(source.files[name])}
        try:
            if isinstance(path, DataError):
                raise path
            cells = open_source(path, settings.layer, settings.duplicate_genes, scratch)
            row |= {"cells": cells.n_cells, "genes": cells.n_genes}
            if fitted is None:
                _show_tables(cells, chain)
            found = _look_at(run, cells, chain, need_counts)
            if len(files) == 1:
                check_gene_names(run, chain, cells, found["gene_totals"], inputs)
            genes = reports.of(cells, found["gene_totals"])
        except (DataError, *_DAMAGED) as error:
            if len(files) == 1:
                raise
            aside.append(
                {**row, "reason": _reason(error, source.files[name], path), "largest_losses": [], "advice": []}
            )
            continue
        row |= _numbers(found, genes)
        short = genes.shortfall(settings.gene_names.min_share_of_counts) if has_floor(run, chain) else None
        if short is not None:
            aside.append({**row, "reason": _gene_reason(short, genes), "advice": advice(run, genes, cells)})
        else:
            totals.append(scratch / f"totals-{number}.npy")
            np.save(totals[-1], found["gene_totals"])
            _add_up(values, found)
            rows.append(row)
            stays[name] = cells
        cells.forget_tables()
    _refuse_too_many(aside, len(files), settings.max_share_of_files_set_aside, source.place)
    for entry in aside:
        entry.pop("advice")
    for line in said_once([(entry["file"], entry["reason"]) for entry in aside]):
        logger.warning("set aside with all of its cells: %s", line)
    joined = SeveralFiles(stays, settings.cell_names, source.place, source.about)
    values["gene_totals"] = np.zeros(joined.n_genes)
    for number, path in enumerate(totals):
        values["gene_totals"] += np.bincount(joined.columns_of(number), np.load(path), joined.n_genes)
    notes = _differences(rows, chain)
    notes += selection_in_words(source.selection) if source.selection else []
    for note in notes:
        logger.warning("%s", note)
    return CheckedFiles(joined, values, rows, aside, totals, notes, source.selection)


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


def _show_tables(cells: CellSource, chain: Chain) -> None:
    for _, step in chain.steps:
        if step.gives_names:
            step.look_at(cells)


def _look_at(run: RunConfig, cells: CellSource, chain: Chain, need_counts: bool) -> dict[str, Any]:
    """What check_source finds in one file."""
    merges = merges_genes(chain)
    duplicates = "sum" if merges else run.data_module.transform_kwargs.duplicate_genes
    logs = not need_counts and run.data_module.transform_kwargs.input_values == "log_normalised"
    return check_source(cells, need_counts=need_counts, log_normalised=logs, duplicate_genes=duplicates)


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


def said_once(found: list[tuple[str, str]], most: int = 20) -> list[str]:
    """(file, what is wrong with it) as lines for a person: files with one trouble in one line, at most `most` lines."""
    files: dict[str, list[str]] = {}
    for file, trouble in found:
        files.setdefault(trouble, []).append(file)
    lines = []
    for trouble, names in list(files.items())[:most]:
        others = f" and {len(names) - 2:,} more files" if len(names) > 2 else ""
        lines.append(f"{', '.join(names[:2])}{others}: {trouble}")
    more = list(files.values())[most:]
    return lines + ([f"and {sum(map(len, more)):,} more files, in {len(more):,} other ways"] if more else [])


def _refuse_too_many(aside: list[dict[str, Any]], n_files: int, limit: float, place: str) -> None:
    if len(aside) < n_files and len(aside) <= limit * n_files + 1e-9:  # 0.29 of 100 is 29
        return
    lines = [f"- {line}" for line in said_once([(entry["file"], entry["reason"]) for entry in aside])]
    tips = list(dict.fromkeys(tip for entry in aside for tip in entry["advice"] if "min_share_of_counts" not in tip))
    cures = [f"Of gene names: {tip}" for tip in tips]
    if len(aside) < n_files:
        needed = math.ceil(100 * len(aside) / n_files) / 100
        cures.append(f"Mend or remove these files, or go on without them: {LIMIT}={needed:g}")
    raise DataError(
        f"{place}: {len(aside)} of {n_files} files cannot be used, and {limit:.0%} may be set aside ({LIMIT}):\n"
        + "\n".join([*lines, *cures])
    )


def _differences(rows: list[dict[str, Any]], chain: Chain) -> list[str]:
    """What sets files apart in a way that a model would learn in place of biology."""
    notes = []
    whole = [row["file"] for row in rows if row["whole_values"]]
    if 0 < len(whole) < len(rows):
        other = next(row["file"] for row in rows if not row["whole_values"])
        notes.append(
            f"{len(whole)} files hold whole counts (e.g. {whole[0]}), {len(rows) - len(whole)} do not (e.g. {other}): their values "
            "do not mean the same"
        )
    elif rows and not whole:
        notes.append(f"none of the {len(rows)} files holds whole counts: all have values with fractions")
    kinds: dict[str, list[str]] = {}
    for row in rows:
        kinds.setdefault(row["name_kind"], []).append(row["file"])
    if len(kinds) > 1 and not merges_genes(chain):
        listed = "; ".join(f"{kind}: {len(names)} files, e.g. {names[0]}" for kind, names in kinds.items())
        notes.append(
            f"files name genes in different ways ({listed}), so that one gene becomes several: run `bmfm genes download` and set "
            f"{PLACE}.gene_names.table=hgnc, or give all files one naming"
        )
    return notes


def usable_files(files: Mapping[str, Any], staging: Path) -> set[str]:
    """The names of `files` that the check step of the same job kept."""
    return {row["file"] for row in read_json(staging / FILES)["files"]} & set(files)


def numbers_by_file(staging: Path, processed: Path) -> dict[str, Any]:
    """files.json, completed by the cells of each file that are in the `processed` file."""
    from bmfm_pipeline.data.store import CellStore

    plain = read_json(staging / FILES)
    cells_kept = Counter(CellStore(processed).column(FILE_COLUMN))
    for row in plain["files"]:
        row["cells_kept"] = int(cells_kept.get(row["file"], 0))
        row["cells_dropped"] = row["cells"] - row["cells_kept"]
    write_json_atomic(staging / FILES, plain)
    return plain
