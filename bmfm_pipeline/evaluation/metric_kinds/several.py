"""Metrics of cells that may have several classes at once."""

import numpy as np

from bmfm_pipeline.evaluation.metric_kinds.classes import BY_CLASS, ClassCounts, divided, macro, mcc_of
from bmfm_pipeline.evaluation.metric_kinds.scores import AREAS, Ranking, mean_of_known
from bmfm_pipeline.evaluation.metric_kinds.sums import SumsMetric, mean_of

SEVERAL_METRICS = ("subset_accuracy", "hamming_loss", "jaccard", "f1_micro", *BY_CLASS, "mcc", *AREAS)


def several_metrics(truth: np.ndarray, predicted: np.ndarray, probabilities: np.ndarray | None = None) -> list:
    """The metrics of SEVERAL_METRICS, the areas only with probabilities.

    truth (n, K) is 1 where a cell has the class, 0 where not, negative where it is not known, and then not counted; predicted (n, K) 0
    or 1. subset_accuracy is the share of cells right in all classes; hamming_loss the share of all answers that are wrong; jaccard
    the mean over cells of classes right over classes true or said, 1 where there are neither; f1_micro pools all answers, as does
    mcc; f1, precision, recall, auroc and auprc are means over classes.
    """
    known = truth >= 0
    true, said = (truth > 0) & known, (predicted > 0) & known
    right, either = true & said, (true | said).sum(axis=1)
    scored = known.any(axis=1)
    wrong = ((true != said) & known).sum(axis=1)
    whole = np.where(scored, wrong == 0, np.nan)
    overlap = np.where(scored, divided(right.sum(axis=1).astype(float), either.astype(float), 1.0), np.nan)
    sums = np.concatenate([right, true, said, known], axis=1)
    found = [
        mean_of("subset_accuracy", whole, is_proportion=bool(scored.all())),
        mean_of("hamming_loss", wrong.astype(float), known.sum(axis=1)),
        mean_of("jaccard", overlap),
        SumsMetric("f1_micro", sums, _micro_f1),
        *(SumsMetric(name, sums, lambda found, name=name: macro(name, _counts(found)[0])) for name in BY_CLASS),
        SumsMetric("mcc", sums, _pooled_mcc),
    ]
    if probabilities is not None:
        found += [MeanArea(name, truth, probabilities) for name in AREAS]
    return found


def _counts(sums: np.ndarray) -> tuple[ClassCounts, np.ndarray]:
    """Counts per class, and how many answers are known of each."""
    right, true, said, known = np.split(sums, 4, axis=1)
    return ClassCounts(right, true, said), known


def _micro_f1(sums: np.ndarray) -> np.ndarray:
    counts, _ = _counts(sums)
    right, true, said = (values.sum(axis=1) for values in (counts.hits, counts.true, counts.predicted))
    return divided(2 * right, true + said)


def _pooled_mcc(sums: np.ndarray) -> np.ndarray:
    counts, known = _counts(sums)
    right, true, said = (values.sum(axis=1) for values in (counts.hits, counts.true, counts.predicted))
    total = known.sum(axis=1)
    neither = total - true - said + right
    pooled = (np.stack(pair, axis=1) for pair in ((neither, right), (total - true, true), (total - said, said)))
    return mcc_of(ClassCounts(*pooled))


class MeanArea:
    """The mean over classes of an area under the curve, each class over the cells of which it is known."""

    is_proportion = False

    def __init__(self, name: str, truth: np.ndarray, probabilities: np.ndarray):
        self.name, self._truth, self._scores = name, truth, probabilities
        self._classes = []
        for own, scores in zip(truth.T, probabilities.T, strict=True):
            rows = np.flatnonzero(own >= 0)
            if (own > 0).any():
                self._classes.append((rows, Ranking(own[rows] > 0, scores[rows])))

    @property
    def n(self) -> int:
        return len(self._truth)

    def values(self, weights: np.ndarray) -> np.ndarray:
        if not self._classes:
            return np.full(len(weights), np.nan)
        area = AREAS[self.name]
        return mean_of_known(np.stack([area(ranking, weights[:, rows]) for rows, ranking in self._classes]))

    def value(self) -> float:
        return float(self.values(np.ones((1, self.n)))[0])

    def at(self, rows: np.ndarray) -> "MeanArea":
        return MeanArea(self.name, self._truth[rows], self._scores[rows])

    def alike(self) -> tuple[np.ndarray, np.ndarray]:
        return np.arange(self.n), np.arange(self.n)
