"""Row chunks of an HDF5 matrix: what lies in row order is sliced, what lies in column order is first turned into rows on disk."""

from collections.abc import Iterator

import numpy as np

from bmfm_pipeline.errors import DataError

# Values of a dense matrix held at a time where its HDF5 chunks ask for many rows: 64 MB.
_DENSE_LIMIT = 16_000_000


def read_rows(source, node, rows_per_chunk: int | None, first: int = 0) -> Iterator[tuple[int, "object"]]:
    """(first row, scipy CSR float32) of the open HDF5 matrix `node`; the values are as stored, zeros included.

    Chunks that begin before row `first` are not read.
    """
    if source.encoding == "dense":
        yield from _dense(source, node, rows_per_chunk, first)
    elif source.encoding == "csr":
        yield from _csr(source, node, rows_per_chunk, first)
    else:
        yield from _csc(source, node, rows_per_chunk, first)


def _csc(source, node, rows_per_chunk: int | None, first: int) -> Iterator[tuple[int, "object"]]:
    from scipy import sparse

    for start, ends, columns, values in source.row_file(node).blocks(_limit(), rows_per_chunk):
        if start < first:
            continue
        shape = (len(ends) - 1, source._n_columns)
        yield start, sparse.csr_matrix((values, columns, ends.astype(np.int32)), shape=shape)


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


def _dense(source, node, rows_per_chunk: int | None, begin: int) -> Iterator[tuple[int, "object"]]:
    """Whole rows of HDF5 chunks are read at once, for each would be unpacked again for every part of it."""
    from scipy import sparse

    from bmfm_pipeline.data.kernels import count_nonzero_by_row, gather_nonzero

    n_columns = max(1, node.shape[1])
    band = node.chunks[0] if node.chunks else 1
    rows = max(1, 4 * _limit() // n_columns)
    rows = max(band, rows // band * band) if band * n_columns <= _DENSE_LIMIT else rows
    for start in range(0, node.shape[0], rows):
        if start + rows <= begin:
            continue
        dense = np.ascontiguousarray(node[start : start + rows], dtype=np.float32)
        lengths = np.empty(len(dense), dtype=np.int64)
        count_nonzero_by_row(dense, lengths)
        ends = np.concatenate(([0], np.cumsum(lengths)))
        for first, last in row_blocks(ends, _limit(), rows_per_chunk):
            if start + first < begin:
                continue
            indices, data = np.empty(ends[last] - ends[first], np.int32), np.empty(ends[last] - ends[first], np.float32)
            gather_nonzero(dense[first:last], indices, data)
            own_ends = (ends[first : last + 1] - ends[first]).astype(np.int32)
            yield start + first, sparse.csr_matrix((data, indices, own_ends), shape=(last - first, node.shape[1]))


def checked_indptr(source, node, length: int) -> np.ndarray:
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


def check_indices(source, indices: np.ndarray, length: int) -> None:
    if len(indices) and (indices.min() < 0 or indices.max() >= length):
        raise DataError(
            f"{source.path}: {source.matrix_name} is damaged: an index lies outside 0..{length - 1}; write the file again"
        )


def _csr(source, node, rows_per_chunk: int | None, first: int) -> Iterator[tuple[int, "object"]]:
    from scipy import sparse

    indptr = checked_indptr(source, node, source.n_cells)
    for start, stop in row_blocks(indptr, _limit(), rows_per_chunk):
        if start < first:
            continue
        low, high = indptr[start], indptr[stop]
        data = node["data"][low:high].astype(np.float32, copy=False)
        indices = node["indices"][low:high]
        check_indices(source, indices, source._n_columns)
        indices = indices.astype(np.int32, copy=False)
        ends = (indptr[start : stop + 1] - low).astype(np.int32)
        yield start, sparse.csr_matrix((data, indices, ends), shape=(stop - start, source._n_columns))
