"""Row chunks of an HDF5 matrix: what lies in row order is sliced, what lies in column order is gathered block by block."""

from collections.abc import Iterator

import numpy as np

from bmfm_pipeline.errors import DataError


def read_rows(source, node, rows_per_chunk: int | None) -> Iterator[tuple[int, "object"]]:
    """(first row, scipy CSR float32) of the open HDF5 matrix `node`; the values are as stored, zeros included."""
    if source.encoding == "dense":
        yield from _dense(source, node, rows_per_chunk)
    elif source.encoding == "csr":
        yield from _csr(source, node, rows_per_chunk)
    else:
        yield from _csc(source, node, rows_per_chunk)


def row_blocks(
    indptr: np.ndarray, values_per_block: int, rows_per_block: int | None = None
) -> Iterator[tuple[int, int]]:
    """Consecutive row ranges with at most `values_per_block` stored values each (more where a single row has more)."""
    n_rows = len(indptr) - 1
    start = 0
    while start < n_rows:
        stop = int(np.searchsorted(indptr, indptr[start] + values_per_block, side="right")) - 1
        stop = min(max(stop, start + 1), n_rows)
        if rows_per_block is not None:
            stop = min(stop, start + rows_per_block)
        yield start, stop
        start = stop


def _limit() -> int:
    from bmfm_pipeline.data.sources import h5ad

    return h5ad.VALUES_PER_CHUNK


def _dense(source, node, rows_per_chunk: int | None) -> Iterator[tuple[int, "object"]]:
    from scipy import sparse

    rows = max(1, _limit() // max(1, node.shape[1]))
    rows = min(rows, rows_per_chunk) if rows_per_chunk else rows
    for start in range(0, node.shape[0], rows):
        yield start, sparse.csr_matrix(np.asarray(node[start : start + rows], dtype=np.float32))


def _checked_indptr(source, node, length: int) -> np.ndarray:
    indptr = node["indptr"][:].astype(np.int64)
    if (
        len(indptr) != length + 1
        or indptr[0] != 0
        or (np.diff(indptr) < 0).any()
        or indptr[-1] != node["data"].shape[0]
    ):
        raise DataError(
            f"{source.path}: {source.matrix_name} is damaged: its indptr does not fit its shape {source.n_cells} x {source._n_columns} "
            f"and its {node['data'].shape[0]} values; write the file again"
        )
    return indptr


def _check_indices(source, indices: np.ndarray, length: int) -> None:
    if len(indices) and (indices.min() < 0 or indices.max() >= length):
        raise DataError(
            f"{source.path}: {source.matrix_name} is damaged: an index lies outside 0..{length - 1}; write the file again"
        )


def _csr(source, node, rows_per_chunk: int | None) -> Iterator[tuple[int, "object"]]:
    from scipy import sparse

    indptr = _checked_indptr(source, node, source.n_cells)
    for start, stop in row_blocks(indptr, _limit(), rows_per_chunk):
        low, high = indptr[start], indptr[stop]
        data = node["data"][low:high].astype(np.float32, copy=False)
        indices = node["indices"][low:high].astype(np.int32, copy=False)
        _check_indices(source, indices, source._n_columns)
        ends = (indptr[start : stop + 1] - low).astype(np.int32)
        yield start, sparse.csr_matrix((data, indices, ends), shape=(stop - start, source._n_columns))


def _csc(source, node, rows_per_chunk: int | None) -> Iterator[tuple[int, "object"]]:
    """Scan the columns once per block of rows: memory stays bounded, time grows with the number of blocks."""
    from scipy import sparse

    from bmfm_pipeline.data.sources import h5ad

    column_ends = _checked_indptr(source, node, source._n_columns)
    per_row = np.zeros(source.n_cells, dtype=np.int64)
    for first, last in row_blocks(column_ends, _limit()):
        rows = node["indices"][column_ends[first] : column_ends[last]]
        _check_indices(source, rows, source.n_cells)
        per_row += np.bincount(rows, minlength=source.n_cells)
    ends = np.concatenate(([0], np.cumsum(per_row)))
    for top, bottom in row_blocks(ends, h5ad.VALUES_PER_SCAN):
        size = int(ends[bottom] - ends[top])
        rows, columns = np.empty(size, dtype=np.int32), np.empty(size, dtype=np.int32)
        data = np.empty(size, dtype=np.float32)
        filled = 0
        for first, last in row_blocks(column_ends, _limit()):
            low, high = column_ends[first], column_ends[last]
            found = node["indices"][low:high]
            inside = np.flatnonzero((found >= top) & (found < bottom))
            end = filled + len(inside)
            rows[filled:end] = found[inside] - top
            columns[filled:end] = np.repeat(np.arange(first, last), np.diff(column_ends[first : last + 1]))[inside]
            data[filled:end] = node["data"][low:high][inside]
            filled = end
        block = sparse.coo_matrix((data, (rows, columns)), shape=(bottom - top, source._n_columns)).tocsr()
        for start, stop in row_blocks(block.indptr.astype(np.int64), _limit(), rows_per_chunk):
            yield top + start, block[start:stop]
