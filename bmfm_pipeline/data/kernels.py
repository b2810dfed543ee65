"""Compiled kernels over CSR arrays. Import this module where there is enough to do: it loads numba.

Kernels compile when first called and are kept on disk (in NUMBA_CACHE_DIR where it is set).
"""

import numba
import numpy as np


def _compiled(function):
    """Keep the compiled kernel on disk; where no folder can be written, compile in every process."""
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:
        return numba.njit(nogil=True)(function)


@_compiled
def select_columns(indptr, indices, values, counts, target, ends, kept, kept_values, kept_counts):
    """Keep entries whose column has a target of 0 or more, under its new number, in stored order.

    target: int32 (columns,), ascending over the columns that stay, so that sorted rows stay sorted. Fills `ends` (rows + 1,), `kept`,
    `kept_values` and `kept_counts` (room for all entries); returns the number of entries that stay.
    """
    position = 0
    ends[0] = 0
    for row in range(len(indptr) - 1):
        for k in range(indptr[row], indptr[row + 1]):
            column = target[indices[k]]
            if column >= 0:
                kept[position] = column
                kept_values[position] = values[k]
                kept_counts[position] = counts[k]
                position += 1
        ends[row + 1] = position
    return position


@_compiled
def quantile_edges(values, fractions, edges):
    """Fill `edges` with the linearly interpolated quantiles of float32 `values` at `fractions`; float64, as numpy computes them."""
    ordered = np.sort(values)
    last = len(ordered) - 1
    for j in range(len(fractions)):
        place = fractions[j] * last
        below = min(int(place), last)
        above = min(below + 1, last)
        share = place - below
        low, high = ordered[below], ordered[above]
        gap = np.float64(np.float32(high - low))
        edges[j] = high - gap * (1 - share) if share >= 0.5 else low + gap * share


@_compiled
def percentile_bins(indptr, data, fractions):
    """Replace each value above zero by the number of the interval of its row's quantiles it lies in, 1 to len(fractions) - 1."""
    edges = np.empty(len(fractions))
    top = len(fractions) - 1
    longest = 1
    for row in range(len(indptr) - 1):
        longest = max(longest, indptr[row + 1] - indptr[row])
    above = np.empty(longest, np.float32)
    for row in range(len(indptr) - 1):
        n = 0
        for k in range(indptr[row], indptr[row + 1]):
            if data[k] > 0:
                above[n] = data[k]
                n += 1
        if n == 0:
            continue
        quantile_edges(above[:n], fractions, edges)
        for k in range(indptr[row], indptr[row + 1]):
            value = data[k]
            if value > 0:
                low, high = 0, len(edges)  # the number of edges at or below the value
                while low < high:
                    middle = (low + high) // 2
                    if edges[middle] <= value:
                        low = middle + 1
                    else:
                        high = middle
                data[k] = max(1, min(low, top))


@_compiled
def count_nonzero_by_row(dense, lengths):
    """Fill int64 `lengths` (rows,) with the number of values of each row that are not zero."""
    for row in range(dense.shape[0]):
        n = 0
        for column in range(dense.shape[1]):
            n += dense[row, column] != 0
        lengths[row] = n


@_compiled
def gather_nonzero(dense, indices, data):
    """Fill `indices` and `data` with the values of `dense` that are not zero, row by row."""
    position = 0
    for row in range(dense.shape[0]):
        for column in range(dense.shape[1]):
            if dense[row, column] != 0:
                indices[position] = column
                data[position] = dense[row, column]
                position += 1


@_compiled
def sort_into_buckets(rows, first_column, column_ends, values, bucket_of, starts, out_rows, out_columns, out_values):
    """Group entries of consecutive columns by the bucket of their row, in stored order within a bucket.

    rows, values: the entries; column_ends: (columns + 1,) offsets into them; bucket_of: int32 (rows of the matrix,). starts:
    int64 (buckets + 1,), where each bucket begins in the outputs; it is filled here.
    """
    starts[:] = 0
    for k in range(len(rows)):
        starts[bucket_of[rows[k]] + 1] += 1
    for bucket in range(len(starts) - 1):
        starts[bucket + 1] += starts[bucket]
    place = starts[:-1].copy()
    for column in range(len(column_ends) - 1):
        for k in range(column_ends[column], column_ends[column + 1]):
            bucket = bucket_of[rows[k]]
            at = place[bucket]
            out_rows[at] = rows[k]
            out_columns[at] = first_column + column
            out_values[at] = values[k]
            place[bucket] = at + 1


@_compiled
def sort_by_row(rows, columns, values, first_row, indptr, out_columns, out_values):
    """Stable counting sort of entries by row; indptr: int64 (rows of the block + 1,), offsets into the outputs."""
    place = indptr[:-1].copy()
    for k in range(len(rows)):
        row = rows[k] - first_row
        at = place[row]
        out_columns[at] = columns[k]
        out_values[at] = values[k]
        place[row] = at + 1


@_compiled
def add_group_moments(indptr, indices, data, groups, sums, squares):
    """Add the values of CSR rows, and their squares, to sums (P, G) and squares (P, G) at the row's group."""
    for row in range(len(groups)):
        group = groups[row]
        for k in range(indptr[row], indptr[row + 1]):
            value = np.float64(data[k])
            sums[group, indices[k]] += value
            squares[group, indices[k]] += value * value


@_compiled
def add_moments(indices, data, sums, squares, expressed):
    """Add float32 values to each column's sum, sum of squares (squared in float32, as scanpy does) and number of values above zero.

    One after the other, so that the result does not depend on how rows are cut into chunks.
    """
    for k in range(len(indices)):
        value = np.float32(data[k])
        sums[indices[k]] += value
        squares[indices[k]] += np.float32(value * value)
        expressed[indices[k]] += value > 0


@_compiled
def add_clipped_moments(indices, data, highest, sums, squares):
    """Add values to each column's sum and sum of squares (float64), none above the column's `highest`."""
    for k in range(len(indices)):
        value = min(np.float64(data[k]), highest[indices[k]])
        sums[indices[k]] += value
        squares[indices[k]] += value * value
