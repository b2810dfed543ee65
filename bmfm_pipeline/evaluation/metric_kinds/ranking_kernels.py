"""Areas under curves in one pass over ranked cells per resample. Import this module where there is something to rank: it loads numba."""

import numpy as np

from bmfm_pipeline.batching.draws import compiled


@compiled
def auroc(order, positive, starts_run, weights, found):
    """By rank sums, ties counting half.

    order: int32 (n,), cells by falling score; positive, starts_run: bool (n,), of the cells in that order: whether the class is theirs,
    and whether their score is below that of the one before. weights (R, n). Fills found (R,), nan without cells of either side.
    """
    for row in range(len(weights)):
        above = hits = ranks = run = run_hits = 0.0
        for place in range(len(order)):
            if starts_run[place]:
                ranks += run_hits * (above + run / 2)
                above += run
                hits += run_hits
                run = run_hits = 0.0
            weight = weights[row, order[place]]
            run += weight
            if positive[place]:
                run_hits += weight
        ranks += run_hits * (above + run / 2)
        above += run
        hits += run_hits
        if hits > 0 and hits < above:
            found[row] = (hits * above - ranks - hits * hits / 2) / (hits * (above - hits))
        else:
            found[row] = np.nan


@compiled
def average_precision(order, positive, starts_run, weights, found):
    """Sum over runs of equal scores of the recall gained times the precision there. Arguments as for auroc; nan without hits."""
    for row in range(len(weights)):
        seen = hits = gained = run = run_hits = 0.0
        for place in range(len(order)):
            if starts_run[place] and run > 0:
                seen += run
                hits += run_hits
                gained += run_hits * hits / seen
                run = run_hits = 0.0
            weight = weights[row, order[place]]
            run += weight
            if positive[place]:
                run_hits += weight
        if run > 0:
            seen += run
            hits += run_hits
            gained += run_hits * hits / seen
        found[row] = gained / hits if hits > 0 else np.nan
