"""Compiled kernels over CSR rows: choose and order genes, write tokens, mask. No Python loop over cells or genes.

Kernels compile when first called and are kept on disk (in NUMBA_CACHE_DIR where it is set).
"""

import numba
import numpy as np

from bmfm_pipeline.batching.draws import MASKING, ORDERING, SPAN, SWITCHING, below, compiled, draw, stream

IGNORED = -100
KIND_GENES, KIND_TOKENS, KIND_CONTINUOUS, KIND_SIGNED = 0, 1, 2, 3
UNK, SEP, PAD, CLS, MASK = 0, 1, 2, 3, 4
# What `marks` says of a position.
FREE, MASKED, BARRED = 0, 1, 2


@numba.njit
def add_sorting_key(keys, n, tallies):
    """Turn the bits of the n-th float into a whole number that descends with it, and tally it."""
    bits = keys[n]
    # As whole numbers, the bits of floats ascend with positive and descend with negative ones.
    keys[n] = bits if bits >> np.uint32(31) else bits ^ np.uint32(0x7FFFFFFF)
    tally_key(keys[n], tallies)


@numba.njit
def tally_key(key, tallies):
    """Count the three digits of 11 bits of a key, as `sort_by_keys` needs them."""
    tallies[0, key & np.uint32(2047)] += 1
    tallies[1, (key >> np.uint32(11)) & np.uint32(2047)] += 1
    tallies[2, key >> np.uint32(22)] += 1


@numba.njit
def sort_by_keys(keys, spare_keys, places, base, spare, tallies, n):
    """Sort places[base:base + n] by their keys, equal ones staying in order: a radix sort over digits of 11 bits.

    A digit that all share, as the low ones of small whole numbers, costs no pass.
    """
    low = np.uint32(2047)
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
            spare[place] = places[base + i]
            spare_keys[place] = keys[i]
            tallies[digit, d] += 1
        for i in range(n):
            places[base + i] = spare[i]
            keys[i] = spare_keys[i]


@compiled
def rank_genes(rows, indptr, indices, data, usable, ranking):
    """The genes of each row by value, largest first, equal ones in stored order, as offsets into the row.

    ranking: int32, room for all entries of the rows, row after row. usable (genes,): which gene columns may be chosen. Values are
    compared as float32. Returns as `pick_genes` does.
    """
    longest = 1
    for b in range(len(rows)):
        longest = max(longest, indptr[rows[b] + 1] - indptr[rows[b]])
    values = np.empty(longest, np.float32)
    keys, spare_keys, spare = values.view(np.uint32), np.empty(longest, np.uint32), np.empty(longest, np.int32)
    tallies = np.empty((3, 2048), np.int32)
    width = np.uint32(len(usable))  # a negative column is larger than any width
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
            if usable[column]:
                ranking[base + n] = k
                values[n] = np.float32(data[start + k]) + np.float32(0)  # -0.0 becomes 0.0
                add_sorting_key(keys, n, tallies)
                n += 1
        sort_by_keys(keys, spare_keys, ranking, base, spare, tallies, n)
        base += size
    return -1


@compiled
def pick_genes(
    rows, indptr, indices, data, usable, shuffled, ranking, clip, cell_keys, seed, epoch, sum_values, columns, values, counts,
    sums,
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
    width = np.uint32(len(usable))  # a negative column is larger than any width
    base = 0
    for b in range(len(rows)):
        start, size = indptr[rows[b]], indptr[rows[b] + 1] - indptr[rows[b]]
        n = 0
        for k in range(size):
            spots[n] = k
            column = np.uint32(indices[start + k])
            if column >= width:
                return b
            if usable[column]:
                n += 1
        kept = min(n, clip)
        taken = min(kept, room)
        if len(ranking) > 0:
            for i in range(kept):
                spots[i] = ranking[base + i]
            base += size
        elif shuffled:
            state = stream(seed, epoch, cell_keys[b], ORDERING)
            for i in range(kept if sum_values else taken):
                j = i + below(draw(state, i), n - i)
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


@compiled
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


@compiled
def write_fields(counts, columns, values, prefix, kinds, column_ids, value_ids, value_starts, ids, attention, outside):
    """Fill ids (B, F, L): prefix, genes or values, [SEP], [PAD]; special positions of continuous fields hold -(id + 1).

    Fills attention (B, L) too, 1 up to [SEP], unless it has no rows.
    values (S, B, room) by source; kinds[f] = (kind, source) of field f. Tokenised values are rounded and looked up in
    value_ids[value_starts[f]:value_starts[f + 1]]; outside it they are [UNK] and counted in `outside` (1,). Returns the place of
    the first continuous value that is negative (unless its kind is signed) or not finite, as b * room + i, or -1.
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
            if kind in (KIND_CONTINUOUS, KIND_SIGNED):
                lowest = 0.0 if kind == KIND_CONTINUOUS else -np.inf
                for i in range(first):
                    ids[b, f, i] = -(prefix[i] + 1)
                for i in range(n):
                    value = values[source, b, i]
                    if not (lowest <= value < np.inf and value > -np.inf) and bad < 0:
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


@compiled
def mask_fields(
    cell_keys, counts, columns, first, lead, seed, epoch, change, mask, switch, together, weights, plan, barred, ids, marks,
    labels,
):  # fmt: skip
    """Mask fields of ids (B, F, L) in place; write marks (B, L) and labels (M, B, L), -100 where nothing is to be predicted.

    plan (M, 6): field, whether continuous, first id to switch to, number of ids to switch to, and the stretch of `barred` that
    holds the ids (ascending) left out of those. A share `change` of the real positions of every cell is selected; of these `mask`
    become [MASK], `switch` another token (continuous: the value of another position of the same cell), the rest stay. Unless
    `together`, positions are left out that are masked in an earlier field or are [UNK] in a masked field, and the rate elsewhere is
    raised so that the share is kept. weights (genes,) or empty: relative rates by gene column. The `lead` leading entries of a cell,
    which tell its read depth, are never selected and do not count.
    """
    length = ids.shape[2]
    original = np.empty(length, np.float32)
    chosen, drawn = np.empty(length, np.int64), np.empty(length, np.int64)
    weighted = len(weights) > 0
    for b in range(len(counts)):
        start, stop = first + lead, first + counts[b]
        for i in range(length):
            marks[b, i] = FREE
        if not together:
            for m in range(len(plan)):
                if plan[m, 1] == 0:
                    for i in range(start, stop):
                        if ids[b, plan[m, 0], i] == UNK:
                            marks[b, i] = BARRED
        for m in range(len(plan)):
            f, continuous = plan[m, 0], plan[m, 1] != 0
            for i in range(length):
                labels[m, b, i] = IGNORED
            total = 0.0
            if weighted:
                for i in range(start, stop):
                    if marks[b, i] == FREE or together:
                        total += weights[columns[b, i - first]]
            else:
                free = 0
                for i in range(start, stop):
                    free += marks[b, i] == FREE or together
                total = np.float64(free)
            if total <= 0:
                continue
            rate = change * (stop - start) / total
            here = min(1.0, rate)
            # Whole numbers of 53 bits compare faster than floats made of them.
            selected, masked, switched = here * SPAN, here * mask * SPAN, here * (mask + switch) * SPAN
            state = stream(seed, epoch, cell_keys[b], MASKING + (0 if together else f))
            other = stream(seed, epoch, cell_keys[b], SWITCHING + f)
            if continuous and switch > 0:
                for i in range(start, stop):
                    original[i] = ids[b, f, i]
            # Chosen positions are gathered without a branch: which ones they are cannot be predicted.
            found = 0
            for i in range(start, stop):
                if weighted:
                    selected = min(1.0, rate * weights[columns[b, i - first]]) * SPAN
                u = np.int64(draw(state, i) >> np.uint64(11))
                chosen[found], drawn[found] = i, u
                found += (u < np.int64(selected)) & (together or marks[b, i] == FREE)
            for k in range(found):
                i, u = chosen[k], drawn[k]
                if weighted:
                    here = min(1.0, rate * weights[columns[b, i - first]])
                    masked, switched = here * mask * SPAN, here * (mask + switch) * SPAN
                labels[m, b, i] = ids[b, f, i]
                if u < np.int64(masked):
                    ids[b, f, i] = -(MASK + 1) if continuous else MASK
                    marks[b, i] = MASKED
                elif u < np.int64(switched):
                    if continuous:
                        if stop - start > 1:
                            j = start + below(draw(other, i), stop - start - 1)
                            ids[b, f, i] = original[j + 1 if j >= i else j]
                    else:
                        token = plan[m, 2] + below(draw(other, i), plan[m, 3])
                        for t in range(plan[m, 4], plan[m, 5]):
                            if token >= barred[t]:
                                token += 1
                        ids[b, f, i] = token


@compiled
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
