"""The compiled part of UMAP. Import this module where a map is made: it loads numba."""

import numpy as np

from bmfm_pipeline.batching.draws import compiled

# a and b of 1 / (1 + a d^2b), fitted to min_dist 0.1 and spread 1.
A, B = 1.576943460405378, 0.8950608781227859
_NEGATIVE = 5
_LARGEST_STEP = 4.0


@compiled
def optimise(layout, heads, tails, every, epochs, seed):
    """Stochastic gradient descent: each edge is drawn once in `every[e]` epochs, and each time 5 random points are pushed away."""
    n, state = len(layout), seed * np.uint64(6364136223846793005) + np.uint64(1442695040888963407)
    due = every.copy()
    for epoch in range(epochs):
        rate = 1.0 - epoch / epochs
        for edge in range(len(heads)):
            if due[edge] > epoch + 1:
                continue
            due[edge] += every[edge]
            head, tail = heads[edge], tails[edge]
            across, up = layout[head, 0] - layout[tail, 0], layout[head, 1] - layout[tail, 1]
            square = across * across + up * up
            if square > 0:
                pull = -2.0 * A * B * square ** (B - 1.0) / (A * square**B + 1.0)
                step = min(max(pull * across, -_LARGEST_STEP), _LARGEST_STEP) * rate
                layout[head, 0] += step
                layout[tail, 0] -= step
                step = min(max(pull * up, -_LARGEST_STEP), _LARGEST_STEP) * rate
                layout[head, 1] += step
                layout[tail, 1] -= step
            for _ in range(_NEGATIVE):
                state = state * np.uint64(6364136223846793005) + np.uint64(1442695040888963407)
                other = np.int64((state >> np.uint64(33)) % np.uint64(n))
                if other == head:
                    continue
                across, up = layout[head, 0] - layout[other, 0], layout[head, 1] - layout[other, 1]
                square = across * across + up * up
                if square > 0:
                    push = 2.0 * B / ((0.001 + square) * (A * square**B + 1.0))
                    layout[head, 0] += min(max(push * across, -_LARGEST_STEP), _LARGEST_STEP) * rate
                    layout[head, 1] += min(max(push * up, -_LARGEST_STEP), _LARGEST_STEP) * rate
