"""Metrics of the scores of classes: areas under curves, class by class, and what is said of the true class alone."""

import numpy as np

from bmfm_pipeline.evaluation.metric_kinds.classes import divided

# The smallest number above 0 that stored probabilities (float16) can hold: a true class at probability 0 costs -ln of it.
SMALLEST = float(np.finfo(np.float16).smallest_subnormal)


class Ranking:
    """Cells by falling score, for the areas under the curves of one class; cells of equal score count as one step."""

    def __init__(self, positive: np.ndarray, scores: np.ndarray):
        order = np.argsort(-scores, kind="stable")
        ranked = scores[order]
        self.order = order.astype(np.int32)
        self.positive = np.ascontiguousarray(positive[order])
        self.starts_run = np.append(True, ranked[1:] != ranked[:-1])

    def auroc(self, weights: np.ndarray) -> np.ndarray:
        """By rank sums (Mann and Whitney 1947), ties counting half."""
        from bmfm_pipeline.evaluation.metric_kinds import ranking_kernels

        return self._by(ranking_kernels.auroc, weights)

    def average_precision(self, weights: np.ndarray) -> np.ndarray:
        """Sum over steps of the recall gained times the precision there, as in scikit-learn."""
        from bmfm_pipeline.evaluation.metric_kinds import ranking_kernels

        return self._by(ranking_kernels.average_precision, weights)

    def _by(self, kernel, weights: np.ndarray) -> np.ndarray:
        found = np.empty(len(weights))
        kernel(self.order, self.positive, self.starts_run, weights, found)
        return found


def mean_over_classes(area, rankings: list[Ranking], weights: np.ndarray) -> np.ndarray:
    """(R,) mean of an area over the classes for which it is defined; nan if there are none."""
    if not rankings:
        return np.full(len(weights), np.nan)
    return mean_of_known(np.stack([area(ranking, weights) for ranking in rankings]))


def mean_of_known(values: np.ndarray) -> np.ndarray:
    """(R,) means of values (classes, R), leaving out those that are nan."""
    known = np.isfinite(values)
    return divided(np.where(known, values, 0).sum(axis=0), known.sum(axis=0), np.nan)


def log_losses(codes: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """(n,) -ln of the probability of each observation's class. scores: probabilities (n, C), or (n,) of the class of code 1.

    Rows are divided by their sum: stored probabilities are rounded. Below the smallest float16 they count as it.
    """
    if scores.ndim == 1:
        true = np.where(codes == 1, scores, 1 - scores)
    else:
        true = scores[np.arange(len(codes)), codes] / scores.sum(axis=1)
    return -np.log(np.clip(true, SMALLEST, 1.0))


def within_top(codes: np.ndarray, scores: np.ndarray, k: int) -> np.ndarray:
    """(n,) 1 where the true class is among the k of highest score; of equal scores the first classes come first, as for argmax."""
    own = scores[np.arange(len(codes)), codes][:, None]
    earlier = np.arange(scores.shape[1]) < codes[:, None]
    before = (scores > own).sum(axis=1) + ((scores == own) & earlier).sum(axis=1)
    return (before < k).astype(np.float64)


AREAS = {"auroc": Ranking.auroc, "auprc": Ranking.average_precision}
# How many classes may be named for one of them to be the true one.
TOP_METRICS = {"top3_accuracy": 3, "top5_accuracy": 5}
SCORE_METRICS = (*AREAS, "log_loss", "perplexity", *TOP_METRICS)
