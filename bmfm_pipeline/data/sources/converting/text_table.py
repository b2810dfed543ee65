"""Matrices as csv or tsv, plain or gzip: cells by genes or genes by cells, read in parts."""

import csv
import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from bmfm_pipeline.config.reading import PLACE, Reading
from bmfm_pipeline.data.sources.converting.writing import CellFile
from bmfm_pipeline.data.sources.gene_names import looks_transposed
from bmfm_pipeline.errors import ConfigError, DataError
from bmfm_pipeline.vocabulary.harmonising import describe_names

VALUES_PER_BLOCK = 4_000_000
SHOWN = 5
_NO_NAME = ("", "index", "cell", "cells", "cell_id", "cellid", "barcode", "barcodes", "gene", "genes", "gene_id", "gene_name", "symbol", "sample", "id", "name")  # fmt: skip


def write(path: Path, target: Path, reading: Reading) -> dict[str, Any]:
    """Cells by genes of the table; columns of text describe cells (rows are cells) or genes (rows are genes). See `convert`."""
    layout = _Layout(path)
    first = next(layout.blocks(), None)
    if first is None or not len(first):
        raise DataError(f"{path}: has a header and no rows; a matrix is expected")
    by_gene, why = _rows_are_genes(path, first, reading.rows)
    beside = _columns_beside(path, first, by_gene, reading.obs_columns)
    values = [name for name in first.columns if name not in beside]
    if not values:
        raise DataError(
            f"{path}: no column holds numbers; the columns are {', '.join(map(str, first.columns[:SHOWN]))}"
        )
    names: list[np.ndarray] = []
    tables: list[pd.DataFrame] = []
    with CellFile(target, by_gene=by_gene) as file:
        for block in layout.blocks():
            names.append(np.asarray(block.index.astype(str), dtype=object))
            tables.append(block[beside])
            file.add(sparse.csr_matrix(_numbers(path, block, values)))
        rows = pd.concat(tables, axis=0).set_axis(pd.Index(np.concatenate(names), dtype=object), axis=0)
        columns = pd.DataFrame(index=pd.Index([str(name) for name in values], dtype=object))
        obs, var = (columns, rows) if by_gene else (rows, columns)
        found = file.finish(obs, var, path)
    notes = [why]
    if beside:
        notes.append(f"columns that describe {'genes' if by_gene else 'cells'}: {', '.join(map(str, beside[:SHOWN]))}")
    return {**found, "notes": notes, "rows": "genes" if by_gene else "cells"}


class _Layout:
    """Separator, header and names of rows of a table, from its first two lines."""

    def __init__(self, path: Path):
        self.path = path
        lines = self._first_lines()
        if len(lines) < 2:
            raise DataError(f"{path}: has {len(lines)} lines; a matrix with a header is expected")
        self.separator = max("\t,; ", key=lambda sign: (lines[0].count(sign) > 0, lines[1].count(sign)))
        header, second = (next(csv.reader([line], delimiter=self.separator)) for line in lines)
        if {name.strip().lower() for name in header} >= {"sequence", "label"}:
            raise DataError(
                f"{path}: is a table of sequences, not a matrix of cells by genes; name the folder that holds train.csv, dev.csv and test.csv"
            )
        # R writes no name above the names of rows.
        self.short_header = len(second) == len(header) + 1
        if not self.short_header and len(second) != len(header):
            raise DataError(f"{path}: its header has {len(header):,} columns and its first row {len(second):,}")
        self.header = header
        self.has_names = self.short_header or not _is_number(second[0]) or header[0].strip().lower() in _NO_NAME
        self.rows = max(1, VALUES_PER_BLOCK // max(1, len(header)))

    def _first_lines(self) -> list[str]:
        try:
            with gzip.open(self.path, "rt") if self.path.suffix == ".gz" else open(self.path) as stream:
                return [line.rstrip("\r\n") for line in (stream.readline(), stream.readline()) if line.strip()]
        except (OSError, EOFError, UnicodeDecodeError) as error:
            raise DataError(f"{self.path}: is no readable text ({error}); fetch it again") from None

    def blocks(self) -> Iterator[pd.DataFrame]:
        """Consecutive rows, their names as the index."""
        names = ["_names", *self.header] if self.short_header else self.header
        repeated = pd.Index(names).duplicated()
        if repeated.any():
            twice = ", ".join(dict.fromkeys(name for name, again in zip(names, repeated, strict=True) if again))
            raise DataError(f"{self.path}: columns have the same name: {twice[:200]}; give each its own")
        try:
            with pd.read_csv(
                self.path,
                sep=self.separator,
                header=None,
                skiprows=1,
                names=names,
                index_col=0 if self.has_names else False,
                chunksize=self.rows,
                dtype={names[0]: str} if self.has_names else None,
            ) as reader:
                yield from reader
        except (pd.errors.ParserError, pd.errors.EmptyDataError, OSError, EOFError, UnicodeDecodeError) as error:
            raise DataError(f"{self.path}: cannot be read as a table ({error}); it is damaged, or no matrix") from None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _rows_are_genes(path: Path, first: pd.DataFrame, asked: str) -> tuple[bool, str]:
    if asked != "auto":
        return asked == "genes", f"rows are {asked}, as the config says"
    rows, columns = [str(name) for name in first.index[:20000]], [str(name) for name in first.columns]
    if looks_transposed(rows, columns):
        return True, "rows are genes, by their names"
    if looks_transposed(columns, rows):
        return False, "rows are cells, by the names of the columns"
    shares = []
    for names in (rows, columns):
        naming = describe_names(names)
        shares.append(naming.share if naming.kind in ("gene symbols", "Ensembl ids") else 0.0)
    if abs(shares[0] - shares[1]) < 0.3:
        raise ConfigError(
            f"{path}: whether rows are cells or genes cannot be told from the names (rows {', '.join(rows[:3])}; columns "
            f"{', '.join(columns[:3])}); set {PLACE}.reading.rows=cells or =genes"
        )
    return shares[0] > shares[1], f"rows are {'genes' if shares[0] > shares[1] else 'cells'}, by the names"


def _columns_beside(path: Path, first: pd.DataFrame, by_gene: bool, asked: list[str]) -> list[str]:
    if absent := [name for name in asked if name not in first.columns]:
        raise ConfigError(f"{PLACE}.reading.obs_columns: {path} has no column {', '.join(absent)}")
    if asked and by_gene:
        raise ConfigError(f"{PLACE}.reading.obs_columns: the columns of {path} are cells; a cell_table describes them")
    return [name for name in first.columns if name in asked or first[name].dtype.kind not in "iufb"]


def _numbers(path: Path, block: pd.DataFrame, values: list[str]) -> np.ndarray:
    wrong = [name for name in values if block[name].dtype.kind not in "iufb"]
    if wrong:
        column = block[wrong[0]]
        bad = column[pd.to_numeric(column, errors="coerce").isna() & column.notna()]
        raise DataError(
            f"{path}: {wrong[0]} of {bad.index[0]} is {bad.iloc[0]!r}, a number is needed"
            if len(bad)
            else f"{path}: column {wrong[0]} holds no numbers"
        )
    found = block[values].to_numpy(dtype=np.float32)
    empty = np.isnan(found)
    if empty.any():
        row, column = np.argwhere(empty)[0]
        raise DataError(
            f"{path}: {int(empty.sum()):,} values are missing in {int(empty.any(axis=1).sum()):,} rows, e.g. {values[column]} of {block.index[row]}; write 0 where "
            "nothing was counted"
        )
    return found
