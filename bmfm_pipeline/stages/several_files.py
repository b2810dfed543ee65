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
from bmfm_pipeline.data.gene_report import GeneReport
from bmfm_pipeline.data.sources.several import FILE_COLUMN, MOST_PIECES, SeveralFiles, spans
from bmfm_pipeline.data.transforms import Chain, build_chain
from bmfm_pipeline.errors import DataError
from bmfm_pipeline.stages.fanning import group_name
from bmfm_pipeline.stages.file_checks import GeneTotals, Look, joined_values
from bmfm_pipeline.stages.file_table import selection_in_words
from bmfm_pipeline.stages.gene_names import chain_steps, merges_genes
from bmfm_pipeline.stages.jobs import Job
from bmfm_pipeline.stages.parts import Origins, map_writing
from bmfm_pipeline.storage import read_json, write_json_atomic

logger = logging.getLogger(__name__)
PLACE = "data_module.transform_kwargs"
LIMIT = f"{PLACE}.max_share_of_files_set_aside"
FILES = "files.json"
# Files are looked at in groups of so many bytes at least: each costs the preparation of the chain.
BYTES_PER_GROUP = 16 << 20
# Share of the counts of a file that may be lost because another file has named a column alike.
LOST_BY_JOINING = 0.001


@dataclass
class CheckedFiles:
    """Files that were looked at one by one: `cells`, those that stay as one source; what `values` they hold; a row of numbers each."""

    cells: SeveralFiles
    values: dict[str, Any]
    rows: list[dict[str, Any]]
    set_aside: list[dict[str, Any]]
    totals: GeneTotals
    notes: list[str] = field(default_factory=list)
    selection: dict[str, Any] = field(default_factory=dict)

    def finish(self, genes: GeneReport, folder: Path) -> None:
        """Complete the rows by what became of each file's genes among those of all, and write files.json in `folder`.

        Raises DataError where a file lost counts because another one has a column of the same new name.
        """
        known = np.array([fate.category in ("matched", "renamed", "merged") for fate in genes.fates])
        lost = []
        for number, (row, totals) in enumerate(zip(self.rows, self.totals, strict=True)):
            columns = self.cells.columns_of(number)
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
    job: Job,
    run: RunConfig,
    files: Mapping[str, Path | DataError],
    source,
    origins: Origins,
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
    scratch = job.run_dir / "source"
    scratch.mkdir(parents=True, exist_ok=True)
    alone = job.inputs if len(files) == 1 else None
    look = Look(run, chain, fitted is not None, need_counts, scratch, alone)
    sizes = [path.stat().st_size if isinstance(path, Path) and path.exists() else 0 for path in files.values()]
    groups = [list(files)[start:stop] for start, stop in spans(sizes, MOST_PIECES, BYTES_PER_GROUP)]
    items = [([(name, files[name]) for name in some], origins.of(some)) for some in groups]
    names = [f"check {group_name(list(origin.uris))}" for _, origin in items]
    found = map_writing(job, "totals", look, items, names, settings.num_workers, ".npz")
    rows = [row for looked, _ in found for row in looked.rows]
    aside = [row for looked, _ in found for row in looked.set_aside]
    _refuse_too_many(aside, len(files), settings.max_share_of_files_set_aside, source.place)
    for entry in aside:
        entry.pop("advice")
    for line in said_once([(entry["file"], entry["reason"]) for entry in aside]):
        logger.warning("set aside with all of its cells: %s", line)
    stays = {name: origins.here(name, cells, scratch) for looked, _ in found for name, cells in looked.sources.items()}
    joined = SeveralFiles(stays, settings.cell_names, source.place, source.about)
    totals = GeneTotals([(path, len(looked.rows)) for looked, path in found])
    values = joined_values([looked.values for looked, _ in found if looked.rows])
    values["gene_totals"] = np.zeros(joined.n_genes)
    for number, of_file in enumerate(totals):
        values["gene_totals"] += np.bincount(joined.columns_of(number), of_file, joined.n_genes)
    notes = _differences(rows, chain)
    notes += selection_in_words(source.selection) if source.selection else []
    for note in notes:
        logger.warning("%s", note)
    return CheckedFiles(joined, values, rows, aside, totals, notes, source.selection)


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
