"""Several h5ad files as one source: cells run on from file to file, genes are the union of their names."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from bmfm_pipeline.data.sources.h5ad import CellSource, open_source
from bmfm_pipeline.errors import DataError

# The obs column that names the file of a cell, and what a column of the data with that name is called instead.
FILE_COLUMN, FILE_COLUMN_OF_DATA = "file", "original_file"
PREFIX_END = ":"
SHOWN = 5
# Thousands of files are read in so many groups at most, and in groups of so many cells at least: each costs its preparation.
MOST_PIECES, CELLS_PER_PIECE = 64, 4000


def spans(sizes: Sequence[float], most: int, least: float = 0) -> list[tuple[int, int]]:
    """(start, stop) of groups of neighbours whose `sizes` add up to a share of 1/`most`, and to `least`."""
    enough = max(sum(sizes) / most, least)
    found, start, total = [], 0, 0.0
    for at, size in enumerate(sizes):
        total += size
        if total >= enough or at == len(sizes) - 1:
            found.append((start, at + 1))
            start, total = at + 1, 0.0
    return found


class SeveralFiles:
    """Opened files, {name: CellSource}, read one after the other in that order; offers what a CellSource offers to a chain.

    Genes are all names in order of first appearance; a gene that a file lacks is zero there. A name that stands k times in one
    file has k columns. obs has the columns of all files, missing where a file lacks one, and `file`, the file's name. `cell_names`
    prefix puts that name and a colon before each cell's. `about`, {name: {column: value}}, adds columns to obs that are alike for all
    cells of a file; a column of the data keeps its own values. Beside the columns of obs, memory holds a number a gene for each
    distinct list of genes. `place` names all of it in messages.
    """

    first_row = 0  # the number of the first cell in its chunks

    def __init__(
        self,
        sources: Mapping[str, CellSource],
        cell_names: str = "refuse",
        place: str = "the files",
        about: Mapping[str, Mapping[str, object]] | None = None,
    ):
        if not sources:
            raise DataError(f"{place}: there is no file to read")
        self.names, self.sources = list(sources), list(sources.values())
        self.path, self.cell_names, self.about = place, cell_names, about or {}
        self.n_cells = sum(source.n_cells for source in self.sources)
        self.unused = list(dict.fromkeys(name for source in self.sources for name in source.unused))
        self._firsts = np.cumsum([0, *(source.n_cells for source in self.sources)])

    @cached_property
    def _genes(self) -> tuple[list[np.ndarray], list[str]]:
        """(place of each gene of each file among all, names of all)."""
        return _joined_genes(self.sources)

    @property
    def var_names(self) -> list[str]:
        """Gene names of all files."""
        return self._genes[1]

    @property
    def where(self) -> str:
        """The matrix as it is called in messages."""
        return ", ".join(dict.fromkeys(source.where for source in self.sources))

    @property
    def n_genes(self) -> int:
        return len(self.var_names)

    @property
    def shape(self) -> tuple[int, int]:
        return self.n_cells, self.n_genes

    def columns_of(self, number: int) -> np.ndarray:
        """int32 (genes of file `number`,): where each of its genes lies among all."""
        return self._genes[0][number]

    @cached_property
    def obs(self):
        """The obs tables one below the other (pandas DataFrame, one row per cell)."""
        import pandas as pd

        tables = []
        for name, source in zip(self.names, self.sources, strict=True):
            table = source.obs
            if FILE_COLUMN in table:
                table = table.rename(columns={FILE_COLUMN: FILE_COLUMN_OF_DATA})
            if self.cell_names == "prefix":
                table = table.set_axis([f"{name}{PREFIX_END}{cell}" for cell in table.index], axis=0)
            tables.append(table)
            source.forget_tables()
        obs = stacked_tables(tables)
        codes = np.repeat(np.arange(len(self.names)), np.diff(self._firsts))
        obs[FILE_COLUMN] = pd.Categorical.from_codes(codes, self.names)
        rows = [self.about.get(name, {}) for name in self.names]
        for column in dict.fromkeys(column for row in rows for column in row):
            if column not in obs:
                obs[column] = _said_of_files([row.get(column) for row in rows])[codes]
        return obs

    @property
    def obs_names(self) -> np.ndarray:
        """Cell names, object array of str."""
        return np.asarray(self.obs.index, dtype=object)

    @cached_property
    def var(self):
        """For each gene what the first file that says something says of it."""
        import pandas as pd

        columns: dict[str, np.ndarray] = {}
        for source, table in zip(self.sources, self._genes[0], strict=True):
            for name, values in source.var.items():
                known = columns.setdefault(name, np.full(self.n_genes, np.nan, dtype=object))
                fresh = pd.isna(known[table])
                known[table[fresh]] = np.asarray(values, dtype=object)[fresh]
            source.forget_tables()
        return pd.DataFrame(columns, index=pd.Index(self.var_names, dtype=object))

    @property
    def cell_names_cure(self) -> str:
        """Which files have the same cell names, and what to do."""
        index = self.obs.index
        repeated = index[index.duplicated()].unique()[:SHOWN]
        files = self.obs[FILE_COLUMN].astype(str)
        examples = "; ".join(f"{cell} in {', '.join(dict.fromkeys(files[index == cell]))}" for cell in repeated)
        return (
            f"they are in several files ({examples}): set data_module.transform_kwargs.cell_names=prefix, which puts the name of the "
            "file before those of its cells, unless these are the same cells twice"
        )

    def verify_unchanged(self) -> None:
        """Raise DataError when a file is no longer the one that was opened."""
        for source in self.sources:
            source.verify_unchanged()

    def iter_chunks(self, rows_per_chunk: int | None = None) -> Iterator[tuple[int, "object"]]:
        """Yield (first row, scipy CSR float32 with sorted indices and no stored zeros) over the cells of all files."""
        yield from self._piece(0, len(self.sources)).iter_chunks(rows_per_chunk)

    def pieces(self) -> list["FilesPiece"]:
        """The files in groups of neighbours, for passes that are made in parts; rows keep the numbers that they have among all."""
        sizes = [source.n_cells for source in self.sources]
        return [self._piece(start, stop) for start, stop in spans(sizes, MOST_PIECES, CELLS_PER_PIECE)]

    def _piece(self, start: int, stop: int) -> "FilesPiece":
        columns, names = self._genes
        return FilesPiece(
            self.names[start:stop], self.sources[start:stop], columns[start:stop], names, int(self._firsts[start])
        )


class FilesPiece:
    """Some neighbouring files of several, as a source for the passes of a chain: the genes are those of all files.

    `first_row` is the number of its first cell among all, and chunks are numbered so. columns[i]: the place among all genes of each
    gene of file i. It can be sent to another process, which opens the files itself.
    """

    def __init__(
        self,
        names: list[str],
        sources: list[CellSource],
        columns: list[np.ndarray],
        var_names: list[str],
        first_row: int,
    ):
        self.names, self.sources, self.var_names, self.first_row = names, sources, var_names, first_row
        self._columns = columns
        self.n_cells = sum(source.n_cells for source in sources)

    @property
    def where(self) -> str:
        """The matrix as it is called in messages."""
        return ", ".join(dict.fromkeys(source.where for source in self.sources))

    def iter_chunks(self, rows_per_chunk: int | None = None) -> Iterator[tuple[int, "object"]]:
        """Yield (first row, scipy CSR float32 with sorted indices and no stored zeros) over the cells of these files."""
        first = self.first_row
        for source, columns in zip(self.sources, self._columns, strict=True):
            rises = bool((np.diff(columns) > 0).all())
            same = rises and (len(columns) == 0 or columns[-1] == len(columns) - 1)
            for start, chunk in source.iter_chunks(rows_per_chunk):
                yield first + start, self._placed(chunk, None if same else columns, rises)
            source.forget_tables()
            first += source.n_cells

    def _placed(self, chunk, columns: np.ndarray | None, rises: bool):
        """The rows of a file among the genes of all."""
        from scipy import sparse

        placed = sparse.csr_matrix((chunk.shape[0], len(self.var_names)), dtype=chunk.dtype)
        placed.data, placed.indptr = chunk.data, chunk.indptr
        placed.indices = chunk.indices if columns is None else columns[chunk.indices]
        placed.has_sorted_indices = rises
        placed.sort_indices()
        placed.has_canonical_format = True
        return placed


def open_several(
    files: Mapping[str, str | Path],
    layer: str | None = None,
    duplicate_genes: str = "refuse",
    scratch: str | Path | None = None,
    cell_names: str = "refuse",
    place: str = "the files",
    about: Mapping[str, Mapping[str, object]] | None = None,
) -> SeveralFiles:
    """Open h5ad files, {name: path}, as one source; see SeveralFiles."""
    opened = {name: open_source(path, layer, duplicate_genes, scratch) for name, path in files.items()}
    return SeveralFiles(opened, cell_names, place, about)


def _said_of_files(values: list):
    """One value a file: numbers as float64, text as a pandas Categorical; None is missing."""
    import pandas as pd

    if all(value is None or (isinstance(value, int | float) and not isinstance(value, bool)) for value in values):
        return np.array([np.nan if value is None else value for value in values], dtype=np.float64)
    return pd.Categorical([None if value is None else str(value) for value in values])


def _joined_genes(sources: Sequence[CellSource]) -> tuple[list[np.ndarray], list[str]]:
    """(int32 (genes of the file,) for each file: the place of its genes, names of all genes)."""
    places: dict[str | tuple[str, int], int] = {}
    known: dict[bytes, np.ndarray] = {}
    tables: list[np.ndarray] = []
    last: list[str] = []
    for source in sources:
        names = source.var_names
        if names == last:
            tables.append(tables[-1])
            source.forget_tables()
            continue
        last = names
        table = np.fromiter((places.setdefault(key, len(places)) for key in _keys(names)), np.int32, len(names))
        tables.append(known.setdefault(hashlib.sha256(table).digest(), table))
        source.forget_tables()
    return tables, [key if isinstance(key, str) else key[0] for key in places]


def _keys(names: Sequence[str]) -> Iterator[str | tuple[str, int]]:
    """A key for each column: the name, and for a name that was there before the name with a number."""
    if len(set(names)) == len(names):
        yield from names
        return
    seen: dict[str, int] = {}
    for name in names:
        before = seen.get(name, 0)
        seen[name] = before + 1
        yield (name, before) if before else name


def stacked_tables(tables: Sequence) -> "object":
    """DataFrames one below the other with the columns of all, missing where a table lacks one; categories stay categories."""
    import pandas as pd

    names = dict.fromkeys(name for table in tables for name in table.columns)
    columns = {name: _stacked([table[name] if name in table else len(table) for table in tables]) for name in names}
    index = np.concatenate([np.asarray(table.index, dtype=object) for table in tables])
    return pd.DataFrame(columns, index=pd.Index(index, dtype=object))


def _stacked(parts: list):
    """Columns as one; a number stands for so many missing values."""
    import pandas as pd
    from pandas.api.types import union_categoricals

    present = [part for part in parts if not isinstance(part, int)]
    kinds = {part.dtype.categories.dtype if isinstance(part.dtype, pd.CategoricalDtype) else None for part in present}
    if None not in kinds and len(kinds) == 1:
        like = present[0].cat.categories
        filled = [pd.Categorical.from_codes([-1] * part, like) if isinstance(part, int) else part for part in parts]
        return union_categoricals(filled, ignore_order=True)
    numbers = all(isinstance(part.dtype, np.dtype) and part.dtype.kind in "iuf" for part in present)
    one_kind = len(present) == len(parts) and len({part.dtype for part in present}) == 1
    if numbers or (one_kind and isinstance(present[0].dtype, np.dtype)):
        return np.concatenate([np.full(part, np.nan) if isinstance(part, int) else part.to_numpy() for part in parts])
    filled = [np.full(part, np.nan, dtype=object) if isinstance(part, int) else part.astype(object) for part in parts]
    return np.concatenate(filled)
