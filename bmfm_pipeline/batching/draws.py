"""Randomness of the compiled kernels: every draw is a function of (seed, epoch, cell key, purpose, count) and of nothing else.

So batch shape, neighbours and worker number cannot change what a cell becomes. All functions compile into the kernels that call them.
"""

import math

import numba
import numpy as np


def compiled(function):
    """Keep the compiled kernel on disk; where no folder can be written, compile in every process."""
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:
        return numba.njit(nogil=True)(function)


# Purposes keep the draws of one cell apart; masking of field f draws from MASKING + f, switching from SWITCHING + f.
ORDERING, MASKING, SWITCHING = 0, 1, 1001
CHROMOSOMES, DROPPING, SELECTING, BATCH_ZEROS, OTHER_ZEROS, DEPTH, THINNING = range(2001, 2008)

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)
_HALF = np.uint64(32)
SPAN = 9007199254740992.0


@numba.njit
def mix(x):
    """SplitMix64's output function (Steele, Lea and Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * _MIX1
    x = (x ^ (x >> np.uint64(27))) * _MIX2
    return x ^ (x >> np.uint64(31))


@numba.njit
def stream(seed, epoch, key, purpose):
    """The state from which the draws of one cell for one purpose start."""
    state = mix(np.uint64(seed) + _GAMMA)
    state = mix(state ^ (np.uint64(epoch) + _GAMMA))
    state = mix(state ^ (np.uint64(key) + _GAMMA))
    return mix(state ^ (np.uint64(purpose) + _GAMMA))


@numba.njit
def draw(state, count):
    """64 random bits, the `count`-th of a stream."""
    return mix(state + _GAMMA * np.uint64(count + 1))


@numba.njit
def below(bits, bound):
    """A whole number in [0, bound): multiply-shift on the upper 32 bits."""
    return np.int64(((bits >> _HALF) * np.uint64(bound)) >> _HALF)


@numba.njit
def unit(bits):
    """A number in [0, 1)."""
    return np.float64(bits >> np.uint64(11)) / SPAN


@numba.njit
def beta22(state):
    """A draw from Beta(2, 2): the middle one of three uniform numbers."""
    a, b, c = unit(draw(state, 0)), unit(draw(state, 1)), unit(draw(state, 2))
    return max(min(a, b), min(max(a, b), c))


@numba.njit
def binomial(state, n, p):
    """How many of `n` trials succeed, each with probability `p`; exact for any n.

    By inversion where few succeed, else by transformed rejection (algorithm BTRS, Hoermann 1993).
    """
    if n <= 0 or p <= 0.0:
        return 0
    if p >= 1.0:
        return n
    q = min(p, 1.0 - p)
    if n * q < 10.0:
        # The gaps between successes are geometric.
        scale, place, found, count = math.log1p(-q), 0.0, 0, 0
        while True:
            place += math.floor(math.log(1.0 - unit(draw(state, count))) / scale) + 1.0
            count += 1
            if place > n:
                break
            found += 1
    else:
        found = _binomial_by_rejection(state, n, q)
    return found if q == p else n - found


@numba.njit
def _binomial_by_rejection(state, n, p):
    spread = math.sqrt(n * p * (1.0 - p))
    b = 1.15 + 2.53 * spread
    a = -0.0873 + 0.0248 * b + 0.01 * p
    centre, squeeze = n * p + 0.5, 0.92 - 4.2 / b
    alpha, odds, mode = (2.83 + 5.1 / b) * spread, math.log(p / (1.0 - p)), math.floor((n + 1) * p)
    height = math.lgamma(mode + 1.0) + math.lgamma(n - mode + 1.0)
    count = 0
    while True:
        u, v = unit(draw(state, count)) - 0.5, 1.0 - unit(draw(state, count + 1))
        count += 2
        rim = 0.5 - abs(u)
        if rim <= 0.0:
            continue
        k = math.floor((2.0 * a / rim + b) * u + centre)
        if rim >= 0.07 and v <= squeeze:
            return np.int64(k)
        if k < 0 or k > n:
            continue
        bound = height - math.lgamma(k + 1.0) - math.lgamma(n - k + 1.0) + (k - mode) * odds
        if math.log(v * alpha / (a / (rim * rim) + b)) <= bound:
            return np.int64(k)


@numba.njit
def poisson(state, mean):
    """A draw from the Poisson distribution; exact. By products of uniforms for small means, else by PTRS (Hoermann 1993)."""
    if mean <= 0.0:
        return 0
    count = 0
    if mean < 10.0:
        limit, product, found = math.exp(-mean), 1.0, -1
        while product > limit:
            product *= unit(draw(state, count))
            count += 1
            found += 1
        return found
    root = math.sqrt(mean)
    b = 0.931 + 2.53 * root
    a = -0.059 + 0.02483 * b
    alpha, squeeze = 1.1239 + 1.1328 / (b - 3.4), 0.9277 - 3.6224 / (b - 2.0)
    while True:
        u, v = unit(draw(state, count)) - 0.5, 1.0 - unit(draw(state, count + 1))
        count += 2
        rim = 0.5 - abs(u)
        if rim <= 0.0:
            continue
        k = math.floor((2.0 * a / rim + b) * u + mean + 0.43)
        if rim >= 0.07 and v <= squeeze:
            return np.int64(k)
        if k < 0 or (rim < 0.013 and v > rim):
            continue
        if math.log(v * alpha / (a / (rim * rim) + b)) <= -mean + k * math.log(mean) - math.lgamma(k + 1.0):
            return np.int64(k)
