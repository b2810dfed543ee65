"""The compiled kernel behind every option that reshapes a cell: dropout, chromosomes, zeros, normalisation, read depth.

`kernels.pick_genes` is its shorter and faster relative for batches that need none of these.
"""

import math
from typing import NamedTuple

import numba
import numpy as np

from bmfm_pipeline.batching import draws
from bmfm_pipeline.batching.draws import compiled, draw, stream, unit
from bmfm_pipeline.batching.kernels import add_sorting_key, sort_by_keys
from bmfm_pipeline.batching.ordering import (
    along_chromosomes,
    clear,
    drop,
    flagged_first,
    shuffle,
    take_turns,
    zeros_from_pool,
)

AS_STORED, SHUFFLED, SORTED, CHROMOSOMAL = range(4)
ZEROS_HIDDEN, ZEROS_IN_ORDER, ZEROS_OF_BATCH, ZEROS_AT_RANDOM = range(4)
DEPTH_OFF, DEPTH_DOWNSAMPLE, DEPTH_POISSON, DEPTH_EQUAL, DEPTH_TARGET = range(5)
TARGET_SUM = 10000.0
# Cells of fewer reads are never reduced; a reduced one keeps a share drawn from Beta(2, 2).
LEAST_READS = 1000.0
# The share of counts that Poisson renoising takes away, and of genes it blanks: 0.55 of its rate 0.6.
RENOISE = 0.55 * 0.6
FEW_ZEROS = 128


class Recipe(NamedTuple):
    """What `arrange_cells` does, in a form that compiled code takes. Empty arrays mean "not asked for".

    usable (genes,) says which columns may be chosen. medians (genes,) divide values. keep (genes,) are probabilities of staying in
    selective dropout. drop_share and drop_block: independent and contiguous dropout. places and chromosomes (genes,): rank along the
    genome, -1 unknown, and number of the chromosome; `sampled` draws are made. clip: most entries of a cell, 0 for no limit.
    zeros: which zeros are shown, taken from `pool`, the usable columns; cycle_own and cycle_zeros: how many expressed genes and zeros
    take turns (both 0: all expressed genes first); expressed_only: the share of cells shown without zeros. depth: a read-depth mode,
    `thin` whether it may reduce cells, target the reads asked for. normalise: x -> ln(1 + target_sum x / (total + 1)).
    """

    usable: np.ndarray
    medians: np.ndarray
    keep: np.ndarray
    drop_share: float
    drop_block: int
    order: int
    places: np.ndarray
    chromosomes: np.ndarray
    sampled: int
    clip: int
    zeros: int
    pool: np.ndarray
    cycle_own: int
    cycle_zeros: int
    expressed_only: float
    normalise: bool
    target_sum: float
    depth: int
    thin: bool
    target: float


@compiled
def take_rows(rows, indptr, indices, data, width, own_indptr, own_indices, own_data):
    """Copy rows of a CSR matrix into one of their own, int64, int32 and float32 whatever the types were.

    So the large kernels compile once and not for every type of matrix. Returns -1, or the first b whose row names a column outside
    0..width - 1.
    """
    place = 0
    own_indptr[0] = 0
    for b in range(len(rows)):
        for k in range(indptr[rows[b]], indptr[rows[b] + 1]):
            if indices[k] < 0 or indices[k] >= width:
                return b
            own_indices[place] = indices[k]
            own_data[place] = data[k]
            place += 1
        own_indptr[b + 1] = place
    return -1


@numba.njit
def _beside_zeros(recipe, own, front, n, pool, batch_pool, in_batch, nothing, where, candidates, pattern, seed, epoch, key, sequence,
                  length, limit):  # fmt: skip
    """Append to sequence[:length] the entries own[front:n] and zeros, as the strategy says; returns the new length."""
    selecting, dropping = stream(seed, epoch, key, draws.SELECTING), stream(seed, epoch, key, draws.DROPPING)
    others, of_batch = stream(seed, epoch, key, draws.OTHER_ZEROS), stream(seed, epoch, key, draws.BATCH_ZEROS)
    keep, order = recipe.keep, recipe.order
    in_order = recipe.zeros == ZEROS_IN_ORDER
    alone = not in_order and unit(draw(of_batch, 0)) < recipe.expressed_only
    zeros = 0
    if recipe.zeros == ZEROS_OF_BATCH and not alone:
        for column in batch_pool:
            if where[column] == 0 and (len(keep) == 0 or unit(draw(selecting, column)) < keep[column]):
                candidates[zeros] = column
                zeros += 1
        shuffle(of_batch, candidates, zeros)
    if not in_order or order >= SORTED:
        room = min(max(limit - length, 0), len(pattern))
        for i in range(take_turns(n - front, zeros, recipe.cycle_own, recipe.cycle_zeros, pattern[:room])):
            if pattern[i]:
                zeros -= 1
                sequence[length] = -1 - candidates[zeros]
            else:
                sequence[length] = own[front]
                front += 1
            length += 1
    if alone:
        limit = min(limit, length + FEW_ZEROS) if length < 2 else 0
    elif in_order and order == CHROMOSOMAL:  # a zero has no weight
        limit = 0
    return zeros_from_pool(
        pool, order == SHUFFLED or not (in_order or alone), in_order and order < SORTED, nothing if in_order or alone else in_batch,
        where, keep, selecting, recipe.drop_share if in_order else 0.0, dropping, others, sequence, length, limit,
    )  # fmt: skip


@numba.njit
def _reduce(depth, columns, values, n, total, thin, state, thinning):
    """Write into `thin` the values of the n entries after a read-depth mode has reduced the cell, if it does."""
    if depth == DEPTH_DOWNSAMPLE:
        if total < LEAST_READS or draw(state, 9) >> np.uint64(63):
            return
        share = draws.beta22(state)
        for i in range(n):
            thin[i] = draws.binomial(draw(thinning, columns[i]), np.int64(values[i]), share)
    elif depth == DEPTH_POISSON:
        for i in range(n):
            lost = np.float64(draws.poisson(draw(thinning, columns[i]), values[i] * RENOISE))
            thin[i] = 0.0 if unit(draw(state, 16 + columns[i])) < RENOISE else max(values[i] - lost, 0.0)


@compiled
def arrange_cells(indptr, indices, data, recipe, batch_pool, flag_indptr, flag_indices, flag_data, cell_keys, seed, epoch,
                  columns, values, counts, totals):  # fmt: skip
    """The genes of each row of a CSR matrix from `take_rows`, chosen, ordered and transformed as `recipe` says.

    flag_*: a matrix of the same rows whose positive entries mark genes that stand first; no rows for none.
    Writes columns (B, room) int32, values (2, B, room) float32 (what the model sees; what label fields say), counts (B,), totals (B,):
    the sum of a cell's values before normalisation. With a read-depth mode the first two entries of a cell are the columns G and
    G + 1, G being len(usable), for the reads seen and the reads asked for. Returns -1, or the first row that is to be reduced but holds
    values that are no whole numbers.
    """
    room, width, lead = columns.shape[1], len(recipe.usable), 2 if recipe.depth > 0 else 0
    longest = 1
    for b in range(len(counts)):
        longest = max(longest, indptr[b + 1] - indptr[b])
    pool, flags = recipe.pool.copy(), len(flag_indptr) > 1
    exposed = recipe.zeros > 0
    limit = recipe.clip if recipe.clip > 0 else room
    capacity = max(longest, recipe.sampled) + 1
    most = (min(max(limit, room), len(pool)) + capacity) if exposed else capacity
    cell_columns, cell_values, thin = (
        np.empty(longest, np.int32),
        np.empty(longest, np.float32),
        np.empty(longest, np.float32),
    )
    own, spare, sequence = np.empty(capacity, np.int32), np.empty(capacity, np.int32), np.empty(most, np.int32)
    keys, spare_keys, tallies = (
        np.empty(longest, np.uint32),
        np.empty(longest, np.uint32),
        np.empty((3, 2048), np.int32),
    )
    floats = keys.view(np.float32)
    flagged = np.zeros(longest, np.uint8)
    # where: number of a column's entry in the cell, plus 1; -1 where it must not come back as a zero.
    where = np.zeros(width, np.int32)
    in_batch, nothing = np.zeros(width if exposed else 0, np.uint8), np.zeros(width if exposed else 0, np.uint8)
    candidates, pattern = np.empty(len(batch_pool), np.int32), np.empty(most, np.uint8)
    for column in batch_pool:
        in_batch[column] = 1
    for b in range(len(counts)):
        key, n = cell_keys[b], 0
        selecting = stream(seed, epoch, key, draws.SELECTING)
        whole = True
        for k in range(indptr[b], indptr[b + 1]):
            column, value = indices[k], data[k]
            if not recipe.usable[column] or (exposed and not value > 0):
                continue
            if len(recipe.keep) > 0 and unit(draw(selecting, column)) >= recipe.keep[column]:
                where[column] = -1
                continue
            if len(recipe.medians) > 0:
                value /= recipe.medians[column]
            whole = whole and value == np.rint(value)
            cell_columns[n], cell_values[n], thin[n] = column, value, value
            n += 1
            where[column] = n
        if recipe.thin and not whole and (recipe.depth == DEPTH_DOWNSAMPLE or recipe.depth == DEPTH_POISSON):
            return b
        kept, order = n, stream(seed, epoch, key, draws.ORDERING)
        for i in range(n):
            own[i] = i
        # In order, zeros stand among the expressed genes: they are shuffled together, later.
        if recipe.order == SHUFFLED and recipe.zeros != ZEROS_IN_ORDER:
            shuffle(order, own, n)
        elif recipe.order == SORTED:
            clear(tallies)
            for i in range(n):
                floats[i] = cell_values[i] + np.float32(0)
                add_sorting_key(keys, i, tallies)
            sort_by_keys(keys, spare_keys, own, 0, spare, tallies, n)
        elif recipe.order == CHROMOSOMAL:
            kept = along_chromosomes(
                recipe.places, recipe.chromosomes, recipe.sampled, cell_columns, cell_values, n, own, order,
                stream(seed, epoch, key, draws.CHROMOSOMES), keys, spare_keys, spare, tallies,
            )  # fmt: skip
        front, length = 0, 0
        if flags:
            for i in range(n):
                flagged[i] = 0
            for k in range(flag_indptr[b], flag_indptr[b + 1]):
                column = flag_indices[k]
                if flag_data[k] > 0 and where[column] > 0:
                    flagged[where[column] - 1] = 1
            front = flagged_first(own, kept, flagged, spare)
        if not exposed and recipe.clip > 0:
            kept = min(kept, recipe.clip)
        if recipe.drop_block > 0 or recipe.drop_share > 0:
            kept = drop(recipe.drop_share, recipe.drop_block, stream(seed, epoch, key, draws.DROPPING), own, kept)
            if front > 0:
                front = 0
                while front < kept and flagged[own[front]]:
                    front += 1
        if not exposed:
            for i in range(kept):
                sequence[i] = own[i]
            length = kept
        else:
            if recipe.drop_block > 0 or recipe.drop_share > 0:
                # A dropped gene must not come back, neither as a zero nor from the pool.
                for i in range(n):
                    where[cell_columns[i]] = -1
                for i in range(kept):
                    where[cell_columns[own[i]]] = own[i] + 1
            for i in range(front):
                sequence[length] = own[i]
                length += 1
                where[cell_columns[own[i]]] = -1
            if flags:
                for k in range(flag_indptr[b], flag_indptr[b + 1]):
                    column = flag_indices[k]
                    if recipe.usable[column] and flag_data[k] > 0 and where[column] == 0:
                        if length < limit:
                            sequence[length] = -1 - column
                            length += 1
                        where[column] = -1
            length = _beside_zeros(
                recipe, own, front, kept, pool, batch_pool, in_batch, nothing, where, candidates, pattern, seed, epoch, key, sequence,
                length, limit,
            )  # fmt: skip
            length = min(length, limit)
            if flags:
                for k in range(flag_indptr[b], flag_indptr[b + 1]):
                    column = flag_indices[k]
                    where[column] = 0
        for k in range(indptr[b], indptr[b + 1]):
            where[indices[k]] = 0
        # Totals count what is left of the cell: all of it, or up to the clip.
        chosen, size = (sequence, length) if recipe.clip > 0 or not exposed else (own, kept)
        total = 0.0
        for i in range(size):
            if chosen[i] >= 0:
                total += cell_values[chosen[i]]
        totals[b] = total
        seen = total
        if recipe.depth > 0:
            if recipe.thin:
                state, thinning = stream(seed, epoch, key, draws.DEPTH), stream(seed, epoch, key, draws.THINNING)
                _reduce(recipe.depth, cell_columns, cell_values, n, total, thin, state, thinning)
            seen = 0.0
            for i in range(size):
                if chosen[i] >= 0:
                    seen += thin[chosen[i]]
        _write_cell(
            recipe,
            b,
            room,
            lead,
            width,
            sequence,
            length,
            cell_columns,
            cell_values,
            thin,
            total,
            seen,
            columns,
            values,
        )
        counts[b] = min(length + lead, room)
    return -1


@numba.njit
def _write_cell(
    recipe, b, room, lead, width, sequence, length, cell_columns, cell_values, thin, total, seen, columns, values
):
    """Write one cell: its entries, on the scale the recipe asks for, behind its read depths where there are any."""
    scale, label_scale = 0.0, 0.0
    if recipe.depth > 0:
        if recipe.depth == DEPTH_TARGET:
            first, second = math.log1p(total), math.log1p(recipe.target)
            scale = label_scale = TARGET_SUM / total if total > 0 else 0.0
        else:
            total = total if total > 0 else 1.0
            if seen <= 0:
                for i in range(len(thin)):
                    thin[i] = cell_values[i]
                seen = total
            first, second = math.log1p(seen), math.log1p(total)
            scale, label_scale = (
                (1.0, 1.0) if recipe.depth == DEPTH_POISSON else (TARGET_SUM / seen, TARGET_SUM / total)
            )
        for i in range(2):
            columns[b, i] = width + i
            values[0, b, i] = values[1, b, i] = first if i == 0 else second
    elif recipe.normalise:
        scale = recipe.target_sum / (total + 1.0)
    for i in range(min(length, room - lead)):
        entry = sequence[i]
        if entry < 0:
            columns[b, lead + i] = -1 - entry
            values[0, b, lead + i] = values[1, b, lead + i] = 0
            continue
        columns[b, lead + i] = cell_columns[entry]
        value, label = np.float64(thin[entry]), np.float64(cell_values[entry])
        values[0, b, lead + i] = math.log1p(value * scale) if scale > 0 else value
        values[1, b, lead + i] = math.log1p(label * label_scale) if label_scale > 0 else label


@compiled
def largest_total(rows, indptr, indices, data):
    """The largest sum of a row of a CSR matrix, among `rows`; 0 without rows."""
    largest = 0.0
    for row in rows:
        total = 0.0
        for k in range(indptr[row], indptr[row + 1]):
            total += data[k]
        largest = max(largest, total)
    return largest
