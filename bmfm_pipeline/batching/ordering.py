"""Parts of `arranging.arrange_cells`: orders, dropout, and the choice of zeros."""

import math

import numba
import numpy as np

from bmfm_pipeline.batching.draws import below, compiled, draw, unit
from bmfm_pipeline.batching.kernels import sort_by_keys, tally_key


@compiled
def expressed_columns(indptr, indices, data, usable):
    """The usable columns with a positive value in any row, ascending, int32."""
    seen = np.zeros(len(usable), np.uint8)
    found = 0
    for k in range(indptr[-1]):
        column = indices[k]
        if usable[column] and data[k] > 0 and not seen[column]:
            seen[column] = 1
            found += 1
    columns = np.empty(found, np.int32)
    place = 0
    for column in range(len(usable)):
        if seen[column]:
            columns[place] = column
            place += 1
    return columns


@compiled
def take_turns(n_own, n_zeros, cycle_own, cycle_zeros, pattern):
    """Fill pattern with 0 (next of the own) and 1 (next of the zeros); returns how many were written.

    Whole turns of cycle_own and cycle_zeros as long as both last, then what is left of the own, then of the zeros.
    """
    length, cycle = min(len(pattern), n_own + n_zeros), cycle_own + cycle_zeros
    turns = 0
    if cycle > 0:
        turns = min(n_own // cycle_own if cycle_own else n_zeros, n_zeros // cycle_zeros if cycle_zeros else n_own)
    for i in range(length):
        if i < turns * cycle:
            pattern[i] = i % cycle >= cycle_own
        else:
            pattern[i] = i - turns * cycle >= n_own - turns * cycle_own
    return length


@numba.njit
def clear(tallies):
    for digit in range(3):
        for d in range(2048):
            tallies[digit, d] = 0


@numba.njit
def shuffle(state, own, n):
    for i in range(n - 1):
        j = i + below(draw(state, i), n - i)
        own[i], own[j] = own[j], own[i]


@numba.njit
def along_chromosomes(
    places, chromosomes, sampled, columns, values, n, own, order, turn, keys, spare_keys, spare, tallies
):
    """Genes drawn with replacement by log1p of their values, chromosome after chromosome in random order, each by position.

    order and turn are the states of the two kinds of draws. Returns how many genes `own` holds then.
    """
    known, m = np.empty(n, np.int32), 0
    clear(tallies)
    for i in range(n):
        if places[columns[i]] >= 0 and values[i] > 0:
            known[m], keys[m] = i, places[columns[i]]
            tally_key(keys[m], tallies)
            m += 1
    sort_by_keys(keys, spare_keys, known, 0, spare, tallies, m)
    reach, times, starts = np.empty(m, np.float64), np.zeros(m, np.int32), np.empty(m + 1, np.int32)
    total, stretches = 0.0, 0
    for i in range(m):
        total += math.log1p(values[known[i]])
        reach[i] = total
        if i == 0 or chromosomes[columns[known[i]]] != chromosomes[columns[known[i - 1]]]:
            starts[stretches] = i
            stretches += 1
    starts[stretches] = m
    for i in range(sampled if m > 0 else 0):
        aim = unit(draw(order, i)) * total
        low, high = 0, m - 1
        while low < high:
            middle = (low + high) // 2
            if reach[middle] <= aim:
                low = middle + 1
            else:
                high = middle
        times[low] += 1
    turns, length = np.arange(stretches).astype(np.int32), 0
    shuffle(turn, turns, stretches)
    for s in turns:
        for i in range(starts[s], starts[s + 1]):
            for _ in range(times[i]):
                own[length] = known[i]
                length += 1
    return length


@numba.njit
def drop(share, block, state, own, n):
    """Sequence dropout: independent, or one block that leaves at least one entry. Returns how many stay."""
    if block > 0 and n > 1:
        size = min(block, n - 1)
        for i in range(below(draw(state, 0), n - size + 1), n - size):
            own[i] = own[i + size]
        return n - size
    if block > 0:
        return n
    stay = 0
    for i in range(n):
        if unit(draw(state, i)) >= share:
            own[stay] = own[i]
            stay += 1
    return stay


@numba.njit
def flagged_first(own, n, flagged, spare):
    """A stable partition of own[:n] by flag; returns how many are flagged."""
    front, rest = 0, 0
    for i in range(n):
        if flagged[own[i]]:
            own[front] = own[i]
            front += 1
        else:
            spare[rest] = own[i]
            rest += 1
    for i in range(rest):
        own[front + i] = spare[i]
    return front


@numba.njit
def zeros_from_pool(
    pool, shuffled, with_own, skipped, where, keep, selecting, share, dropping, state, sequence, length, limit
):
    """Append zeros of columns drawn from the pool without replacement (in its order unless shuffled) until `limit` are there.

    Columns of the cell itself are left out, or their entries taken `with_own`; skipped ones and those that dropout takes are left out.
    The pool is put back as it was, so that it need not be copied for each cell. Returns the new length.
    """
    swaps, done = np.empty(len(pool), np.int32), 0
    while done < len(pool) and length < limit:
        j = done
        if shuffled:
            j += below(draw(state, done), len(pool) - done)
            pool[done], pool[j] = pool[j], pool[done]
        swaps[done] = j
        column = pool[done]
        done += 1
        mark = where[column]
        if mark > 0 and with_own:
            sequence[length] = mark - 1
            length += 1
        elif (
            mark == 0
            and not skipped[column]
            and (len(keep) == 0 or unit(draw(selecting, column)) < keep[column])
            and (share == 0 or unit(draw(dropping, len(where) + column)) >= share)
        ):
            sequence[length] = -1 - column
            length += 1
    for i in range(done - 1, -1, -1):
        j = swaps[i]
        pool[i], pool[j] = pool[j], pool[i]
    return length
