"""Several stores as one: rows run on, genes are aligned by name."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from bmfm_pipeline.data.stores.base import BaseStore
from bmfm_pipeline.data.stores.matrices import Gathered, Matrix, joined, row_numbers, running_sizes
from bmfm_pipeline.errors import DataError

_EXAMPLES = 5


class JoinedMatrix(Matrix):
    """Matrices one below the other. columns[i]: the new column of each column of part i, -1 where it is left out."""

    def __init__(self, parts: list[Matrix], columns: list[np.ndarray], width: int):
        self.parts = parts
        self._columns = [None if _is_identity(table, width) else table for table in columns]
        self._rises = [bool(np.all(np.diff(table[table >= 0]) > 0)) for table in columns]
        self._firsts = running_sizes(np.array([part.shape[0] for part in parts], dtype=np.int64))
        self.shape = int(self._firsts[-1]), width

    @cached_property
    def row_sizes(self) -> np.ndarray:
        return np.concatenate([np.zeros(0, np.int64), *(part.row_sizes for part in self.parts)])

    @cached_property
    def dtype(self) -> np.dtype:
        return np.result_type(*(part.dtype for part in self.parts))

    def _gather(self, rows: np.ndarray) -> Gathered:
        owner = np.searchsorted(self._firsts, rows, side="right") - 1
        pieces: list[Gathered] = []
        places: list[np.ndarray] = []
        for number in np.unique(owner).tolist():
            mine = np.flatnonzero(owner == number)
            places.append(mine)
            pieces.append(self._aligned(number, self.parts[number].gather(rows[mine] - self._firsts[number])))
        if len(pieces) == 1:
            indptr, indices, data = pieces[0]
            return indptr, indices, data.astype(self.dtype, copy=False)
        sizes = np.zeros(len(rows), np.int64)
        ordered_indices: list = [None] * len(rows)
        ordered_data: list = [None] * len(rows)
        for mine, (indptr, indices, data) in zip(places, pieces, strict=True):
            sizes[mine] = np.diff(indptr)
            for place, start, end in zip(mine.tolist(), indptr[:-1].tolist(), indptr[1:].tolist(), strict=True):
                ordered_indices[place], ordered_data[place] = indices[start:end], data[start:end]
        return running_sizes(sizes), joined(ordered_indices, np.int32), joined(ordered_data, self.dtype)

    def _aligned(self, number: int, gathered: Gathered) -> Gathered:
        indptr, indices, data = gathered
        table = self._columns[number]
        if table is None:
            return gathered
        indices = table[indices]
        kept = indices >= 0
        if not kept.all():
            indptr = np.concatenate([[0], np.cumsum(kept)])[indptr].astype(np.int64)
            indices, data = indices[kept], data[kept]
        if not self._rises[number]:
            order = np.argsort(row_numbers(indptr) * np.int64(self.shape[1]) + indices)
            indices, data = indices[order], data[order]
        return indptr, indices, data


class JoinedStore(BaseStore):
    """Stores as one, with the genes `genes` (default: all of them, in order of first appearance).

    A gene that a store lacks is zero there; one that `genes` lacks is left out. Both are counted in `gene_report`, a dict a store:
    {"store", "genes", "left_out", "left_out_examples", "absent"}. obs has the columns of all, NaN where a store lacks one.
    unique_names: append "-0", "-1", ... to the cell names, one number a store. Without it a name that two cells bear is a DataError.
    """

    def __init__(self, stores: Sequence[BaseStore], genes: Sequence[str] | None = None, *, unique_names: bool = False):
        self.stores, self.unique_names = list(stores), unique_names
        if not self.stores:
            raise DataError("no stores were given to join; name at least one file")
        self.name = " + ".join(store.name for store in self.stores)
        known = genes if genes is not None else [gene for store in self.stores for gene in store.var_names]
        self._var_names = list(dict.fromkeys(str(gene) for gene in known))
        if genes is not None and len(self._var_names) != len(genes):
            raise DataError(f"the gene list names {len(genes) - len(self._var_names)} genes more than once")
        self._tables, self.gene_report = self._align()
        self.matrix = JoinedMatrix([store.matrix for store in self.stores], self._tables, len(self._var_names))
        self._obs_names = self._join_names()

    def _align(self) -> tuple[list[np.ndarray], list[dict]]:
        position = {gene: column for column, gene in enumerate(self._var_names)}
        tables, report = [], []
        known: dict[int, tuple[np.ndarray, list[str]]] = {}  # stores that share a list of genes share its table
        for store in self.stores:
            if id(store.var_names) not in known:
                known[id(store.var_names)] = _place_genes(store, position)
            table, left_out = known[id(store.var_names)]
            tables.append(table)
            report.append(
                {
                    "store": store.name,
                    "genes": len(table),
                    "left_out": len(left_out),
                    "left_out_examples": left_out[:_EXAMPLES],
                    "absent": len(self._var_names) - int(np.count_nonzero(table >= 0)),
                }
            )
        return tables, report

    @cached_property
    def counts(self) -> Matrix | None:
        """Counts of all stores; None when none has them. Raises DataError when only some do."""
        without = [store.name for store in self.stores if store.counts is None]
        if len(without) == len(self.stores):
            return None
        if without:
            raise DataError(
                f"only some of the joined files have counts; without: {', '.join(without[:_EXAMPLES])}. Preprocess those anew "
                "(data_module.transform_kwargs.input_values=counts), or leave them out"
            )
        return JoinedMatrix([store.counts for store in self.stores], self._tables, len(self._var_names))

    @cached_property
    def log_values(self) -> Matrix | None:
        """Log-normalised input of all stores; None where one has none."""
        if any(store.log_values is None for store in self.stores):
            return None
        return JoinedMatrix([store.log_values for store in self.stores], self._tables, len(self._var_names))

    def _join_names(self) -> np.ndarray:
        names = [store.obs_names for store in self.stores]
        if self.unique_names:
            names = [np.array([f"{name}-{number}" for name in own], dtype=object) for number, own in enumerate(names)]
        found = np.concatenate(names)
        if len(set(found)) != len(found):
            seen: set = set()
            twice = list(dict.fromkeys(name for name in found if name in seen or seen.add(name)))
            cure = (
                "they occur twice within one file; correct that file"
                if self.unique_names
                else "set unique_names=True to append the number of the file to every name"
            )
            raise DataError(
                f"{self.name}: {len(twice)} cell names occur more than once, e.g. {', '.join(map(str, twice[:_EXAMPLES]))}; {cure}"
            )
        return found

    @property
    def obs_names(self) -> np.ndarray:
        return self._obs_names

    @cached_property
    def obs_columns(self) -> list[str]:
        return list(dict.fromkeys(name for store in self.stores for name in store.obs_columns))

    @cached_property
    def obs(self):
        import pandas as pd

        table = pd.concat([store.obs for store in self.stores], axis=0, join="outer", ignore_index=True)
        table.index = pd.Index(self.obs_names, dtype=object)
        return table

    def _read_column(self, name: str) -> np.ndarray:
        return np.concatenate(
            [
                store.column(name) if name in store.obs_columns else np.full(store.n_cells, np.nan, dtype=object)
                for store in self.stores
            ]
        )


def _place_genes(store: BaseStore, position: dict[str, int]) -> tuple[np.ndarray, list[str]]:
    """(the new column of each gene of a store or -1, genes that have none)."""
    if len(set(store.var_names)) != len(store.var_names):
        raise DataError(
            f"{store.name}: a gene name occurs more than once, so that genes cannot be aligned by name; preprocess the file "
            "first, or call `adata.var_names_make_unique()`"
        )
    table = np.array([position.get(gene, -1) for gene in store.var_names], dtype=np.int32)
    return table, [gene for gene, column in zip(store.var_names, table.tolist(), strict=True) if column < 0]


def _is_identity(table: np.ndarray, width: int) -> bool:
    return len(table) <= width and bool(np.array_equal(table, np.arange(len(table))))
