"""Rows, or columns, that come in blocks, as an h5ad whose arrays lie contiguous."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from bmfm_pipeline.data.processed import ProcessedWriter, Spool, SpooledMatrix
from bmfm_pipeline.errors import DataError


class CellFile:
    """An h5ad in the making: `add` blocks of one matrix after the other, then `finish` with the tables.

    Blocks are scipy CSR of cells by genes in row order, or of genes by cells when `by_gene`, and then stored by column. Use as a
    context manager.
    """

    def __init__(self, target: Path, by_gene: bool = False):
        self.target, self.by_gene = target, by_gene
        self._spool = Spool(target.parent)
        self._matrices: dict[str, SpooledMatrix] = {}

    def __enter__(self) -> "CellFile":
        self._spool.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._spool.__exit__(*error)

    def add(self, block: sparse.csr_matrix, name: str = "X") -> None:
        block = sparse.csr_matrix(block)
        if block.nnz and block.data.min() == 0 == block.data.max():
            block.eliminate_zeros()
        if not block.has_canonical_format:
            block.sum_duplicates()
        self._spool.add(self._matrices.setdefault(name, SpooledMatrix()), block)

    def finish(self, obs: pd.DataFrame, var: pd.DataFrame, place: Path) -> dict[str, Any]:
        """Write the file; `place` is what messages call it. Returns {"cells", "genes", "values"}."""
        from anndata.io import write_elem

        shape = len(obs), len(var)
        lines = shape[1] if self.by_gene else shape[0]
        for name, matrix in self._matrices.items():
            found = sum(map(len, matrix.lengths))
            if found != lines:
                what = "genes" if self.by_gene else "cells"
                raise DataError(f"{place}: {name} has {found:,} {what}, and {lines:,} are named; it is damaged")
        obs.index, var.index = (pd.Index(table.index.astype(str), dtype=object) for table in (obs, var))
        with ProcessedWriter(self.target, obs, [], shape) as writer:
            file = writer.file
            del file["var"]
            write_elem(file, "var", with_text_columns(var))
            for name, matrix in self._matrices.items():
                writer.copy(name, [(self._spool, matrix)])
                if self.by_gene:
                    file[name].attrs["encoding-type"] = "csc_matrix"
        stored = sum(int(lengths.sum()) for lengths in self._matrices["X"].lengths) if "X" in self._matrices else 0
        return {"cells": shape[0], "genes": shape[1], "values": stored}


def with_text_columns(table: pd.DataFrame) -> pd.DataFrame:
    """The table with columns of mixed values as text, which is what an h5ad can hold; missing values stay missing."""
    table = table.copy()
    for name in table.columns:
        if table[name].dtype == object:
            table[name] = table[name].map(lambda value: value if pd.isna(value) else str(value)).astype("category")
    return table


def unique_genes(symbols: Iterable[str], ids: Iterable[str] | None) -> list[str]:
    """Symbols; one that was there before becomes SYMBOL_ID, as in what 10x archives become."""
    if ids is None:
        return list(symbols)
    seen: set[str] = set()
    names = []
    for symbol, gene in zip(symbols, ids, strict=True):
        names.append(f"{symbol}_{gene}" if symbol in seen else symbol)
        seen.add(symbol)
    return names


def texts(values) -> list[str]:
    """Names from HDF5 or R, bytes or text."""
    return [value.decode() if isinstance(value, bytes) else str(value) for value in np.asarray(values).tolist()]
