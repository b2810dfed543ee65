"""Compiled targets: what a whole cell expresses, gene token by gene token, for models that predict it from part of it."""

import math

import numba
import numpy as np

from bmfm_pipeline.batching.arranging import TARGET_SUM
from bmfm_pipeline.batching.draws import compiled
from bmfm_pipeline.batching.kernels import IGNORED

RAW, LOG_SUM, LOG_SHARE, LOG_COUNT, SQRT_SHARE = range(5)


@compiled
def whole_cell_targets(indptr, indices, data, usable, medians, column_ids, scale, target_sum, counts, columns, lead, exposed,
                       places, targets):  # fmt: skip
    """Fill targets (sets, B, V), given as -100, with the values of the genes of each row of a CSR matrix at their token ids.

    places (3,): which set holds the genes that the model sees, those that it does not see, and all; -1 where not asked for. The
    genes it sees are columns[b, lead:counts[b]]. With `exposed`, unexpressed genes are targets of 0. Genes without a token have no
    place. scale says what becomes of a value x: RAW, ln(1 + target_sum x / (total + 1)), ln(1 + 10000 x / total), ln(1 + x), or
    sqrt(target_sum x / total), the total being that of the whole cell.
    """
    width = len(usable)
    seen = np.zeros(width, np.uint8)
    for b in range(len(counts)):
        for i in range(lead, counts[b]):
            seen[columns[b, i]] = 1
        total = 0.0
        for k in range(indptr[b], indptr[b + 1]):
            column = indices[k]
            if usable[column]:
                total += data[k] / medians[column] if len(medians) > 0 else data[k]
        factor = 1.0
        if scale == LOG_SUM:
            factor = target_sum / (total + 1.0)
        elif scale == LOG_SHARE and total > 0:
            factor = TARGET_SUM / total
        elif scale == SQRT_SHARE and total > 0:
            factor = target_sum / total
        if exposed:
            for column in range(width):
                token = column_ids[column]
                if token > 0 and usable[column]:
                    _put(targets, places, b, token, seen[column], 0.0)
        for k in range(indptr[b], indptr[b + 1]):
            column = indices[k]
            if not usable[column] or column_ids[column] <= 0:
                continue
            value = np.float64(data[k])
            if len(medians) > 0:
                value /= medians[column]
            if scale == SQRT_SHARE:
                value = math.sqrt(value * factor)
            elif scale != RAW and (scale != LOG_SHARE or total > 0):
                value = math.log1p(value * factor)
            _put(targets, places, b, column_ids[column], seen[column], value)
        for i in range(lead, counts[b]):
            seen[columns[b, i]] = 0


@numba.njit
def _put(targets, places, b, token, seen, value):
    part = 0 if seen else 1
    if places[part] >= 0:
        targets[places[part], b, token] = value
    if places[2] >= 0:
        targets[places[2], b, token] = value


def empty_targets(sets: int, batch: int, tokens: int) -> np.ndarray:
    """float32 (sets, batch, tokens) without any target."""
    return np.full((sets, batch, tokens), IGNORED, dtype=np.float32)
