"""The compiled kernel of dropout on a processor. Import this module where there is something to drop: it loads numba."""

import numpy as np

from bmfm_pipeline.batching.draws import compiled

_HALF, _ODD = np.uint32(16), np.uint32(15)
_MIX1, _MIX2, _LOW = np.uint32(0x7FEB352D), np.uint32(0x846CA68B), np.uint32(0xFFFF)


@compiled
def fill_kept(out, first, second, limit):
    """Fill float32 `out` (n,) with 0 with probability limit / 65,536, else 1: element i and element n / 2 + i have 16 bits each of hash i.

    The hash, of two uint32 keys, is two rounds of a 32-bit mixer (C. Wellons, 2018) with the second key between them; it is written out so that
    the processor works on many elements at once.
    """
    half = len(out) // 2
    low, high = out[:half], out[half : 2 * half]
    for i in range(half):
        x = np.uint32(i) ^ first
        x = np.uint32((x ^ (x >> _HALF)) * _MIX1)
        x = np.uint32((x ^ (x >> _ODD)) * _MIX2)
        x = np.uint32((x ^ (x >> _HALF)) + second)
        x = np.uint32((x ^ (x >> _HALF)) * _MIX1)
        x = np.uint32((x ^ (x >> _ODD)) * _MIX2)
        x = x ^ (x >> _HALF)
        low[i] = np.float32(1.0) if (x & _LOW) >= limit else np.float32(0.0)
        high[i] = np.float32(1.0) if (x >> _HALF) >= limit else np.float32(0.0)
    if len(out) % 2:
        x = np.uint32((first ^ second ^ np.uint32(half)) * _MIX1)
        x = np.uint32((x ^ (x >> _ODD)) * _MIX2)
        out[-1] = np.float32(1.0) if (x >> _HALF) >= limit else np.float32(0.0)
