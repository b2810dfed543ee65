"""Genes of one species and what they are called in another, from a table of the user."""

import csv
import gzip
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from bmfm_pipeline.errors import DataError
from bmfm_pipeline.vocabulary.gene_table import ENSEMBL, GeneTable, split_compound


class Orthologs:
    """{gene of the source species: its orthologs in the target species, in the order of the table}."""

    def __init__(self, pairs: Iterable[tuple[str, str]]):
        self.pairs = list(dict.fromkeys(pairs))
        self._targets: dict[str, list[str]] = {}
        self._folded: dict[str, set[str]] = {}
        for source, target in self.pairs:
            self._targets.setdefault(source, []).append(target)
            self._folded.setdefault(source.casefold(), set()).add(source)

    def __len__(self) -> int:
        return len(self._targets)

    def targets(self, name: str, table: GeneTable | None = None) -> list[str]:
        """Orthologs of `name`, which may carry an Ensembl version or be a compound; `table` knows other names of the source species."""
        tried = [name]
        if found := ENSEMBL.match(name):
            tried.append(found[1])
        tried += reversed(split_compound(name) or ())
        if table is not None:
            match = table.match(name)
            match = match if match.gene is not None else table.match_compound(name)
            if match.gene is not None:
                tried += [match.gene.symbol, match.gene.ensembl_id, *match.gene.previous]
        for key in tried:
            if key in self._targets:
                return self._targets[key]
        alike = self._folded.get(name.casefold(), set())
        return self._targets[next(iter(alike))] if len(alike) == 1 else []


def read_orthologs(path: str | Path, columns: Sequence[str] | None = None, reverse: bool = False) -> Orthologs:
    """Pairs from a csv or tsv file (plain or gzipped): the two named columns, else the first two; `reverse` swaps them.

    Lines without one of the two names are left out. Raises DataError when the file cannot be read or lacks a column.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"ortholog table {path}: cannot be read ({error}); name a csv or tsv file") from None
    tabs = "\t" in text.partition("\n")[0]
    rows = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if tabs else ",")
    first, second = 0, 1
    if columns is not None:
        head = next(rows, [])
        if missing := [name for name in columns if name not in head]:
            raise DataError(
                f"ortholog table {path}: has no column {', '.join(missing)} (found: {', '.join(head[:10]) or 'nothing'}); set "
                "data_module.transform_kwargs.gene_names.ortholog_columns to [source, target]"
            )
        first, second = (head.index(name) for name in columns)
    if reverse:
        first, second = second, first
    pairs = [
        (row[first].strip(), row[second].strip())
        for row in rows
        if len(row) > max(first, second) and row[first].strip() and row[second].strip()
    ]
    if not pairs:
        raise DataError(f"ortholog table {path}: has no line with two gene names; expected source and target columns")
    return Orthologs(pairs)
