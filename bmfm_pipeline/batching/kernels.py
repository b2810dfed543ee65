"""Compiled kernels over CSR rows. Randomness is counter-based: a draw depends on (seed, epoch, cell row, stream, count) alone,
so that batch shape, neighbours and worker number cannot change it.
"""

import numba
import numpy as np


def _compiled(function):
    """Compile on first use and keep the result on disk; where no folder can be written, compile in every process."""
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:
        return numba.njit(nogil=True)(function)


IGNORED = -100
ORDER_NONE, ORDER_RANDOM, ORDER_SORTED = 0, 1, 2
SEP, PAD, CLS, MASK = 1, 2, 3, 4

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)


@numba.njit(inline="always")
def _mix(x):
    """SplitMix64's output function (Steele, Lea and Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * _MIX1
    x = (x ^ (x >> np.uint64(27))) * _MIX2
    return x ^ (x >> np.uint64(31))


@numba.njit(inline="always")
def _stream(seed, epoch, row, stream):
    """The state from which the draws of one cell for one purpose start."""
    state = _mix(np.uint64(seed) + _GAMMA)
    state = _mix(state ^ (np.uint64(epoch) + _GAMMA))
    state = _mix(state ^ (np.uint64(row) + _GAMMA))
    return _mix(state ^ (np.uint64(stream) + _GAMMA))


@numba.njit(inline="always")
def _draw(state, count):
    return _mix(state + _GAMMA * np.uint64(count + 1))


@numba.njit(inline="always")
def _uniform(bits):
    return np.float64(bits >> np.uint64(11)) * (1.0 / 9007199254740992.0)


@numba.njit(inline="always")
def _below(bits, bound):
    """A whole number in [0, bound): multiply-shift on the upper 32 bits."""
    return np.int64(((bits >> np.uint64(32)) * np.uint64(bound)) >> np.uint64(32))


@_compiled
def token_counts(rows, indptr, indices, column_ids, cap, counts):
    """counts (B,): how many genes of each row have a token, at most `cap`."""
    for b in range(len(rows)):
        found = 0
        for k in range(indptr[rows[b]], indptr[rows[b] + 1]):
            if column_ids[indices[k]] > 0:
                found += 1
                if found == cap:
                    break
        counts[b] = found


@_compiled
def select_genes(rows, indptr, indices, data, column_ids, cap, order, seed, epoch, genes, values, scratch):
    """Write gene token ids and values of each row, ordered and cut to `cap`, to genes and values at positions 1, 2, ...

    `scratch` is an int64 array as long as the longest row. Order random needs only the first `cap` places of a permutation.
    """
    for b in range(len(rows)):
        start, stop = indptr[rows[b]], indptr[rows[b] + 1]
        n = 0
        for k in range(start, stop):
            if column_ids[indices[k]] > 0:
                scratch[n] = k
                n += 1
        taken = min(n, cap)
        if order == ORDER_SORTED:
            ranked = np.argsort(-data[scratch[:n]].astype(np.float64), kind="mergesort")
            for i in range(taken):
                k = scratch[ranked[i]]
                genes[b, 1 + i] = column_ids[indices[k]]
                values[b, 1 + i] = data[k]
        else:
            state = _stream(seed, epoch, rows[b], 0)
            for i in range(taken):
                if order == ORDER_RANDOM:
                    j = i + _below(_draw(state, i), n - i)
                    k = scratch[j]
                    scratch[j] = scratch[i]
                else:
                    k = scratch[i]
                genes[b, 1 + i] = column_ids[indices[k]]
                values[b, 1 + i] = data[k]


@_compiled
def write_ids(counts, genes, out):
    """Gene tokens (B, L) into one field of the batch, with [CLS], [SEP] and [PAD]."""
    length = out.shape[1]
    for b in range(len(counts)):
        n = counts[b]
        out[b, 0] = CLS
        for i in range(1, n + 1):
            out[b, i] = genes[b, i]
        out[b, n + 1] = SEP
        for i in range(n + 2, length):
            out[b, i] = PAD


@_compiled
def write_value_ids(counts, values, value_ids, out):
    """Values rounded and looked up; outside the table they are [UNK]. Returns how many were outside."""
    length = out.shape[1]
    outside = 0
    for b in range(len(counts)):
        n = counts[b]
        out[b, 0] = CLS
        for i in range(1, n + 1):
            value = np.int64(np.rint(values[b, i]))
            if 0 <= value < len(value_ids):
                out[b, i] = value_ids[value]
            else:
                out[b, i] = 0
                outside += 1
        out[b, n + 1] = SEP
        for i in range(n + 2, length):
            out[b, i] = PAD
    return outside


@_compiled
def write_values(counts, values, out):
    """Continuous values; special positions hold -(id + 1)."""
    length = out.shape[1]
    for b in range(len(counts)):
        n = counts[b]
        out[b, 0] = -(CLS + 1)
        for i in range(1, n + 1):
            out[b, i] = values[b, i]
        out[b, n + 1] = -(SEP + 1)
        for i in range(n + 2, length):
            out[b, i] = -(PAD + 1)


@_compiled
def mask_field(
    rows,
    counts,
    seed,
    epoch,
    stream,
    change,
    mask,
    switch,
    continuous,
    exclusive,
    first_switch,
    last_switch,
    taken,
    ids,
    labels,
):
    """Mask one field in place and write its labels (-100 elsewhere).

    A share `change` of the real positions of every cell is selected; of these `mask` become [MASK], `switch` another token (or,
    for continuous fields, another value of the same cell), the rest stay. With `exclusive` no position is masked that `taken`
    (B, L) says is masked in an earlier field, or whose token is [UNK], and the rate on the others is raised to keep the share.
    """
    for b in range(len(counts)):
        n = counts[b]
        rate = change
        if exclusive:
            free = 0
            for i in range(1, n + 1):
                if not taken[b, i] and (continuous or ids[b, i] != 0):
                    free += 1
            rate = min(1.0, change * n / free) if free > 0 else 0.0
        state = _stream(seed, epoch, rows[b], stream)
        other = _stream(seed, epoch, rows[b], stream + 1000)
        original = ids[b, : n + 1].copy() if switch > 0 else ids[b, :0]
        for i in range(1, n + 1):
            if exclusive and (taken[b, i] or (not continuous and ids[b, i] == 0)):
                continue
            u = _uniform(_draw(state, i))
            if u >= rate:
                continue
            labels[b, i] = ids[b, i]
            if u < rate * mask:
                ids[b, i] = -(MASK + 1) if continuous else MASK
                taken[b, i] = True
            elif u < rate * (mask + switch):
                if continuous:
                    ids[b, i] = original[1 + _below(_draw(other, i), n)]
                else:
                    ids[b, i] = first_switch + _below(_draw(other, i), last_switch - first_switch)


@_compiled
def attention_without_masked(counts, taken, out):
    """(B, L, L): real tokens see unmasked ones; a masked one sees unmasked, non-special ones and itself."""
    for b in range(len(counts)):
        n = counts[b] + 2
        for q in range(n):
            for k in range(n):
                if taken[b, q]:
                    out[b, q, k] = k == q or (not taken[b, k] and 0 < k < n - 1)
                else:
                    out[b, q, k] = not taken[b, k]
