"""Metrics by what they compare: classes, scores of classes, several classes a cell, numbers, sums over cells.

All are functions of weighted observations, vectorised over resamples: weights (R, n) in, values (R,) out. `evaluation.metrics.Metric`
picks by name.
"""
