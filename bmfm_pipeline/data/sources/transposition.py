"""A column-major matrix as rows: entries go to buckets of rows on disk, then each bucket is sorted by row in memory.

One pass to count, one to write, whatever the size of the matrix; memory is that of one bucket.
"""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bmfm_pipeline.data.sources.row_reading import check_indices, checked_indptr, row_blocks

# Entries sorted in memory at a time: about 160 MB.
VALUES_PER_BUCKET = 8_000_000
# Entries read from the columns at a time: about 50 MB.
VALUES_PER_READ = 2_000_000
# Bytes of an entry on disk while it waits: row, column, value.
_ENTRY = 12


class RowFile:
    """Rows of a matrix in a file of buckets; `ends` is int64 (rows + 1,), `tops` the first row of each bucket and the number of rows."""

    def __init__(self, path: Path, ends: np.ndarray, tops: np.ndarray):
        self.path, self.ends, self.tops = path, ends, tops

    def blocks(self, values_per_block: int, rows_per_block: int | None) -> Iterator[tuple]:
        """(first row, int64 ends from 0, int32 columns, float32 values) of consecutive rows."""
        with open(self.path, "rb", buffering=0) as file:
            for top, bottom in itertools.pairwise(self.tops):
                base, size = self.ends[top], self.ends[bottom] - self.ends[top]
                for start, stop in row_blocks(self.ends[top : bottom + 1], values_per_block, rows_per_block):
                    low, high = self.ends[top + start], self.ends[top + stop]
                    place = base * _ENTRY + 4 * (low - base)
                    columns = _read(file.fileno(), place, high - low, np.int32)
                    values = _read(file.fileno(), place + 4 * size, high - low, np.float32)
                    yield int(top + start), self.ends[top + start : top + stop + 1] - low, columns, values


def transpose(source, node, folder: Path) -> RowFile:
    """The rows of the open column-major HDF5 matrix `node` of `source`, kept in `folder`; what lies there already is used again.

    Raises StorageError before any work when the disk has no room for 12 bytes a stored value.
    """
    from bmfm_pipeline.storage import check_room, disk_errors, hash_json

    name = hash_json([list(source._stamp), str(source.path.absolute()), source.matrix_name])[:16]
    rows_path, index_path = folder / f"rows-{name}.bin", folder / f"rows-{name}.npz"
    if index_path.exists() and rows_path.exists():
        with np.load(index_path) as stored:
            return RowFile(rows_path, stored["ends"], stored["tops"])
    column_ends = checked_indptr(source, node, source._n_columns)
    ends = _row_ends(source, node)
    tops = np.array([0, *(stop for _, stop in row_blocks(ends, VALUES_PER_BUCKET))], dtype=np.int64)
    check_room(folder, int(ends[-1]) * _ENTRY)
    partial = folder / f".rows-{name}.{os.getpid()}.part"
    try:
        with disk_errors(partial):
            with open(partial, "w+b", buffering=0) as file:
                _fill_buckets(node, column_ends, ends, tops, file.fileno())
                _sort_buckets(ends, tops, file.fileno())
            os.replace(partial, rows_path)
            with open(partial, "wb") as file:
                np.savez(file, ends=ends, tops=tops)
            os.replace(partial, index_path)
    finally:
        partial.unlink(missing_ok=True)
    return RowFile(rows_path, ends, tops)


def first_rows(source, node, n_rows: int):
    """Up to `n_rows` first rows of a column-major matrix, by one scan: scipy CSR float32."""
    from scipy import sparse

    n_rows = min(n_rows, source.n_cells)
    column_ends = checked_indptr(source, node, source._n_columns)
    rows, columns, values = [], [], []
    for low, high, _, _ in _column_parts(column_ends):
        here = node["indices"][low:high]
        check_indices(source, here, source.n_cells)
        inside = np.flatnonzero(here < n_rows)
        if len(inside):
            rows.append(here[inside].astype(np.int32))
            columns.append((np.searchsorted(column_ends, low + inside, side="right") - 1).astype(np.int32))
            values.append(node["data"][low:high][inside].astype(np.float32))
    shape = (n_rows, source._n_columns)
    if not rows:
        return sparse.csr_matrix(shape, dtype=np.float32)
    places = (np.concatenate(rows), np.concatenate(columns))
    return sparse.coo_matrix((np.concatenate(values), places), shape=shape).tocsr()


def _column_parts(column_ends: np.ndarray) -> Iterator[tuple[int, int, int, np.ndarray]]:
    """(first entry, entry after the last, first column, ends of its columns within the part) of consecutive entries."""
    total = int(column_ends[-1])
    for low in range(0, total, VALUES_PER_READ):
        high = min(low + VALUES_PER_READ, total)
        first = int(np.searchsorted(column_ends, low, side="right")) - 1
        last = int(np.searchsorted(column_ends, high, side="left"))
        yield low, high, first, np.clip(column_ends[first : last + 1] - low, 0, high - low)


def _row_ends(source, node) -> np.ndarray:
    per_row = np.zeros(source.n_cells, dtype=np.int64)
    for low in range(0, node["indices"].shape[0], VALUES_PER_READ):
        rows = node["indices"][low : low + VALUES_PER_READ]
        check_indices(source, rows, source.n_cells)
        per_row += np.bincount(rows, minlength=source.n_cells)
    return np.concatenate(([0], np.cumsum(per_row)))


def _fill_buckets(node, column_ends: np.ndarray, ends: np.ndarray, tops: np.ndarray, file: int) -> None:
    from bmfm_pipeline.data.kernels import sort_into_buckets

    sizes = ends[tops[1:]] - ends[tops[:-1]]
    bases = ends[tops[:-1]] * _ENTRY
    bucket_of = np.repeat(np.arange(len(sizes), dtype=np.int32), np.diff(tops))
    filled = np.zeros(len(sizes), dtype=np.int64)
    starts = np.zeros(len(sizes) + 1, dtype=np.int64)
    for low, high, first, part_ends in _column_parts(column_ends):
        rows = node["indices"][low:high].astype(np.int32, copy=False)
        values = node["data"][low:high].astype(np.float32, copy=False)
        sorted_parts = np.empty(high - low, np.int32), np.empty(high - low, np.int32), np.empty(high - low, np.float32)
        sort_into_buckets(rows, first, part_ends, values, bucket_of, starts, *sorted_parts)
        for bucket in np.flatnonzero(np.diff(starts)):
            begin, end = starts[bucket], starts[bucket + 1]
            place = bases[bucket] + 4 * filled[bucket]
            for number, part in enumerate(sorted_parts):
                _write(file, place + 4 * number * sizes[bucket], part[begin:end])
            filled[bucket] += end - begin


def _sort_buckets(ends: np.ndarray, tops: np.ndarray, file: int) -> None:
    from bmfm_pipeline.data.kernels import sort_by_row

    for top, bottom in itertools.pairwise(tops):
        size, base = ends[bottom] - ends[top], ends[top] * _ENTRY
        rows, columns = (_read(file, base + 4 * number * size, size, np.int32) for number in (0, 1))
        values = _read(file, base + 8 * size, size, np.float32)
        sorted_columns, sorted_values = np.empty(size, np.int32), np.empty(size, np.float32)
        sort_by_row(rows, columns, values, top, ends[top : bottom + 1] - ends[top], sorted_columns, sorted_values)
        _write(file, base, sorted_columns)
        _write(file, base + 4 * size, sorted_values)


def _write(file: int, place: int, array: np.ndarray) -> None:
    view = memoryview(np.ascontiguousarray(array)).cast("B")
    while len(view):
        written = os.pwrite(file, view, int(place))
        view, place = view[written:], place + written


def _read(file: int, place: int, size: int, kind) -> np.ndarray:
    array = np.empty(int(size), dtype=kind)
    view = memoryview(array).cast("B")
    while len(view):
        got = os.preadv(file, [view], int(place))
        if not got:
            raise OSError(f"the file of rows ends at byte {place}")
        view, place = view[got:], place + got
    return array
