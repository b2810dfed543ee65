"""Compiled kernels over CSR rows: choose and order genes, write tokens, mask. No Python loop over cells or genes.

Randomness is counter-based: a draw depends on (seed, epoch, cell key, purpose, count) alone, so that batch shape, neighbours and
worker number cannot change it. Kernels compile when first called and are kept on disk (in NUMBA_CACHE_DIR where it is set).
"""

import numba
import numpy as np


def _compiled(function):
    """Keep the compiled kernel on disk; where no folder can be written, compile in every process."""
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:
        return numba.njit(nogil=True)(function)


IGNORED = -100
KIND_GENES, KIND_TOKENS, KIND_CONTINUOUS = 0, 1, 2
UNK, SEP, PAD, CLS, MASK = 0, 1, 2, 3, 4
# What `marks` says of a position.
FREE, MASKED, BARRED = 0, 1, 2
# Purposes of random draws; masking of field f draws from _MASKING + f.
_ORDERING, _MASKING, _SWITCHING = 0, 1, 1001

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)
_HALF = np.uint64(32)
_SPAN = 9007199254740992.0


@numba.njit
def _mix(x):
    """SplitMix64's output function (Steele, Lea and Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * _MIX1
    x = (x ^ (x >> np.uint64(27))) * _MIX2
    return x ^ (x >> np.uint64(31))


@numba.njit
def _stream(seed, epoch, key, purpose):
    """The state from which the draws of one cell for one purpose start."""
    state = _mix(np.uint64(seed) + _GAMMA)
    state = _mix(state ^ (np.uint64(epoch) + _GAMMA))
    state = _mix(state ^ (np.uint64(key) + _GAMMA))
    return _mix(state ^ (np.uint64(purpose) + _GAMMA))


@numba.njit
def _draw(state, count):
    return _mix(state + _GAMMA * np.uint64(count + 1))


@numba.njit
def _below(bits, bound):
    """A whole number in [0, bound): multiply-shift on the upper 32 bits."""
    return np.int64(((bits >> _HALF) * np.uint64(bound)) >> _HALF)


@_compiled
def rank_genes(rows, indptr, indices, data, column_ids, keep_unknown, ranking):
    """The genes of each row by value, largest first, equal ones in stored order, as offsets into the row.

    ranking: int32, room for all entries of the rows, row after row. Values are compared as float32 by a stable radix sort of three
    digits of 11 bits; a digit that all share, as the low ones of small whole numbers, costs no pass. Returns as `pick_genes` does.
    """
    longest = 1
    for b in range(len(rows)):
        longest = max(longest, indptr[rows[b] + 1] - indptr[rows[b]])
    values = np.empty(longest, np.float32)
    keys, spare_keys, spare = values.view(np.uint32), np.empty(longest, np.uint32), np.empty(longest, np.int32)
    tallies = np.empty((3, 2048), np.int32)
    low, middle, eleven = np.uint32(2047), np.uint32(22), np.uint32(11)
    width = np.uint32(len(column_ids))  # a negative column is larger than any width
    base = 0
    for b in range(len(rows)):
        start, size = indptr[rows[b]], indptr[rows[b] + 1] - indptr[rows[b]]
        for digit in range(3):
            for d in range(2048):
                tallies[digit, d] = 0
        n = 0
        for k in range(size):
            column = np.uint32(indices[start + k])
            if column >= width:
                return b
            if keep_unknown or column_ids[column] > 0:
                ranking[base + n] = k
                values[n] = np.float32(data[start + k]) + np.float32(0)  # -0.0 becomes 0.0
                # As whole numbers, the bits of floats ascend with positive and descend with negative ones.
                bits = keys[n]
                bits = bits if bits >> np.uint32(31) else bits ^ np.uint32(0x7FFFFFFF)
                keys[n] = bits
                tallies[0, bits & low] += 1
                tallies[1, (bits >> eleven) & low] += 1
                tallies[2, bits >> middle] += 1
                n += 1
        for digit in range(3):
            shift = np.uint32(11 * digit)
            if n == 0 or tallies[digit, (keys[0] >> shift) & low] == n:
                continue
            place = 0
            for d in range(2048):
                count = tallies[digit, d]
                tallies[digit, d] = place
                place += count
            for i in range(n):
                d = (keys[i] >> shift) & low
                place = tallies[digit, d]
                spare[place] = ranking[base + i]
                spare_keys[place] = keys[i]
                tallies[digit, d] += 1
            for i in range(n):
                ranking[base + i] = spare[i]
                keys[i] = spare_keys[i]
        base += size
    return -1


@_compiled
def pick_genes(
    rows, indptr, indices, data, column_ids, keep_unknown, shuffled, ranking, clip, cell_keys, seed, epoch, sum_values, columns,
    values, counts, sums,
):  # fmt: skip
    """The genes of each row as stored, shuffled, or as `ranking` says (empty: unused), cut to `clip` and the width of `columns`.

    Writes columns (B, room) int32, values (B, room) float32, counts (B,) and, with `sum_values`, sums (B,): the total of the values
    of the first `clip` genes. Shuffling draws only the places of the permutation that are used (Fisher-Yates). Returns -1, or the
    first b whose row names a gene column that does not exist.
    """
    room = columns.shape[1]
    longest = 0
    for b in range(len(rows)):
        longest = max(longest, indptr[rows[b] + 1] - indptr[rows[b]])
    spots = np.empty(longest + 1, np.int32)
    width = np.uint32(len(column_ids))  # a negative column is larger than any width
    base = 0
    for b in range(len(rows)):
        start, size = indptr[rows[b]], indptr[rows[b] + 1] - indptr[rows[b]]
        n = 0
        for k in range(size):
            spots[n] = k
            column = np.uint32(indices[start + k])
            if column >= width:
                return b
            if keep_unknown or column_ids[column] > 0:
                n += 1
        kept = min(n, clip)
        taken = min(kept, room)
        if len(ranking) > 0:
            for i in range(kept):
                spots[i] = ranking[base + i]
            base += size
        elif shuffled:
            state = _stream(seed, epoch, cell_keys[b], _ORDERING)
            for i in range(kept if sum_values else taken):
                j = i + _below(_draw(state, i), n - i)
                chosen = spots[j]
                spots[j] = spots[i]
                spots[i] = chosen
        for i in range(taken):
            k = start + spots[i]
            columns[b, i] = indices[k]
            values[b, i] = data[k]
        counts[b] = taken
        if sum_values:
            total = 0.0
            for i in range(kept):
                total += data[start + spots[i]]
            sums[b] = total
    return -1


@_compiled
def look_up_values(rows, indptr, indices, data, counts, columns, values):
    """Values (B, room) of the picked columns in another CSR matrix of the same cells; 0 where it has no entry."""
    for b in range(len(rows)):
        start, stop = indptr[rows[b]], indptr[rows[b] + 1]
        for i in range(counts[b]):
            low, high = start, stop
            while low < high:
                middle = (low + high) // 2
                if indices[middle] < columns[b, i]:
                    low = middle + 1
                else:
                    high = middle
            values[b, i] = data[low] if low < stop and indices[low] == columns[b, i] else 0


@_compiled
def write_fields(counts, columns, values, prefix, kinds, column_ids, value_ids, value_starts, ids, attention, outside):
    """Fill ids (B, F, L): prefix, genes or values, [SEP], [PAD]; special positions of continuous fields hold -(id + 1).

    Fills attention (B, L) too, 1 up to [SEP], unless it has no rows.
    values (S, B, room) by source; kinds[f] = (kind, source) of field f. Tokenised values are rounded and looked up in
    value_ids[value_starts[f]:value_starts[f + 1]]; outside it they are [UNK] and counted in `outside` (1,). Returns the place of
    the first continuous value that is negative or not finite, as b * room + i, or -1.
    """
    first, room, length = len(prefix), columns.shape[1], ids.shape[2]
    bad = -1
    for b in range(len(counts)):
        n = counts[b]
        if len(attention) > 0:
            for i in range(length):
                attention[b, i] = i <= first + n
        for f in range(len(kinds)):
            kind, source = kinds[f, 0], kinds[f, 1]
            if kind == KIND_CONTINUOUS:
                for i in range(first):
                    ids[b, f, i] = -(prefix[i] + 1)
                for i in range(n):
                    value = values[source, b, i]
                    if not (0 <= value < np.inf) and bad < 0:
                        bad = b * room + i
                    ids[b, f, first + i] = value
                ids[b, f, first + n] = -(SEP + 1)
                for i in range(first + n + 1, length):
                    ids[b, f, i] = -(PAD + 1)
                continue
            for i in range(first):
                ids[b, f, i] = prefix[i]
            if kind == KIND_GENES:
                for i in range(n):
                    ids[b, f, first + i] = column_ids[columns[b, i]]
            else:
                begin = value_starts[f]
                size = value_starts[f + 1] - begin
                for i in range(n):
                    value = np.rint(values[source, b, i])
                    if 0 <= value < size:
                        ids[b, f, first + i] = value_ids[begin + np.int64(value)]
                    else:
                        ids[b, f, first + i] = UNK
                        outside[0] += 1
            ids[b, f, first + n] = SEP
            for i in range(first + n + 1, length):
                ids[b, f, i] = PAD
    return bad


@_compiled
def mask_fields(
    cell_keys, counts, columns, first, seed, epoch, change, mask, switch, together, weights, plan, barred, ids, marks, labels
):  # fmt: skip
    """Mask fields of ids (B, F, L) in place; write marks (B, L) and labels (M, B, L), -100 where nothing is to be predicted.

    plan (M, 6): field, whether continuous, first id to switch to, number of ids to switch to, and the stretch of `barred` that
    holds the ids (ascending) left out of those. A share `change` of the real positions of every cell is selected; of these `mask`
    become [MASK], `switch` another token (continuous: the value of another position of the same cell), the rest stay. Unless
    `together`, positions are left out that are masked in an earlier field or are [UNK] in a masked field, and the rate elsewhere is
    raised so that the share is kept. weights (genes,) or empty: relative rates by gene column.
    """
    length = ids.shape[2]
    original = np.empty(length, np.float32)
    chosen, drawn = np.empty(length, np.int64), np.empty(length, np.int64)
    weighted = len(weights) > 0
    for b in range(len(counts)):
        n = counts[b]
        for i in range(length):
            marks[b, i] = FREE
        if not together:
            for m in range(len(plan)):
                if plan[m, 1] == 0:
                    for i in range(first, first + n):
                        if ids[b, plan[m, 0], i] == UNK:
                            marks[b, i] = BARRED
        for m in range(len(plan)):
            f, continuous = plan[m, 0], plan[m, 1] != 0
            for i in range(length):
                labels[m, b, i] = IGNORED
            total = 0.0
            if weighted:
                for i in range(n):
                    if marks[b, first + i] == FREE or together:
                        total += weights[columns[b, i]]
            else:
                free = 0
                for i in range(first, first + n):
                    free += marks[b, i] == FREE or together
                total = np.float64(free)
            if total <= 0:
                continue
            rate = change * n / total
            here = min(1.0, rate)
            # Whole numbers of 53 bits compare faster than floats made of them.
            selected, masked, switched = here * _SPAN, here * mask * _SPAN, here * (mask + switch) * _SPAN
            state = _stream(seed, epoch, cell_keys[b], _MASKING + (0 if together else f))
            other = _stream(seed, epoch, cell_keys[b], _SWITCHING + f)
            if continuous and switch > 0:
                for i in range(first, first + n):
                    original[i] = ids[b, f, i]
            # Chosen positions are gathered without a branch: which ones they are cannot be predicted.
            found = 0
            for i in range(first, first + n):
                if weighted:
                    selected = min(1.0, rate * weights[columns[b, i - first]]) * _SPAN
                u = np.int64(_draw(state, i) >> np.uint64(11))
                chosen[found], drawn[found] = i, u
                found += (u < np.int64(selected)) & (together or marks[b, i] == FREE)
            for k in range(found):
                i, u = chosen[k], drawn[k]
                if weighted:
                    here = min(1.0, rate * weights[columns[b, i - first]])
                    masked, switched = here * mask * _SPAN, here * (mask + switch) * _SPAN
                labels[m, b, i] = ids[b, f, i]
                if u < np.int64(masked):
                    ids[b, f, i] = -(MASK + 1) if continuous else MASK
                    marks[b, i] = MASKED
                elif u < np.int64(switched):
                    if continuous:
                        if n > 1:
                            j = first + _below(_draw(other, i), n - 1)
                            ids[b, f, i] = original[j + 1 if j >= i else j]
                    else:
                        token = plan[m, 2] + _below(_draw(other, i), plan[m, 3])
                        for t in range(plan[m, 4], plan[m, 5]):
                            if token >= barred[t]:
                                token += 1
                        ids[b, f, i] = token


@_compiled
def attention_without_masked(counts, first, marks, out):
    """Fill out (B, L, L), given as zeros: every token sees the unmasked ones; a masked one sees those that are genes, and itself."""
    for b in range(len(counts)):
        end = first + counts[b]
        for q in range(end + 1):
            masked = marks[b, q] == MASKED
            for k in range(end + 1):
                if marks[b, k] == MASKED:
                    out[b, q, k] = q == k
                else:
                    out[b, q, k] = not masked or first <= k < end
