"""The model against each control in one sentence: both are scored on the same cells, so what they share cancels."""

from collections.abc import Mapping

import numpy as np

from bmfm_pipeline.evaluation.intervals import Interval, resampled
from bmfm_pipeline.evaluation.metrics import Metric

NAMES = {
    "logistic_l2": "logistic regression",
    "logistic_l1": "L1 logistic regression",
    "pca50_logistic": "logistic regression on 50 principal components",
    "majority": "the commonest class",
    "train_mean": "the mean of the training cells",
}


def class_verdicts(
    target: str,
    truth: np.ndarray,
    guess: np.ndarray,
    controls: Mapping[str, np.ndarray],
    *,
    resamples: int,
    level: float,
    seed: int,
    groups=None,
) -> list[str]:
    """One sentence per control, with the difference of accuracy and of macro-F1 and the exact McNemar test.

    Better or worse is said of accuracy, and only where the paired bootstrap and the test agree: of a handful of cells the bootstrap
    alone is too sure. The test takes cells as independent, so it is left out when `groups` are given.
    """
    compare = _Paired(truth, guess, resamples, level, seed, groups)
    if compare.one_group:
        return [_one_group(target)] if controls else []
    sentences = []
    for name in _ordered(controls):
        point, low, high = (100 * value for value in compare.difference("accuracy", controls[name]))
        f1 = [100 * value for value in compare.difference("f1", controls[name])]
        p = None if groups is not None else mcnemar(truth, guess, controls[name])
        shown = p is None or p < 1 - level
        words = (
            "better than" if low > 0 and shown else "worse than" if high < 0 and shown else "not shown to differ from"
        )
        sentences.append(
            f"{target}: the model is {words} {NAMES.get(name, name)}: accuracy {point:+.1f} points "
            f"({100 * level:g} % interval {low:+.1f} to {high:+.1f}), macro-F1 {f1[0]:+.1f} ({f1[1]:+.1f} to {f1[2]:+.1f})"
            + (f"; McNemar p = {p:.2g}" if p is not None else "; groups are resampled together")
        )
    return sentences


def value_verdicts(
    target: str,
    truth: np.ndarray,
    guess: np.ndarray,
    controls: Mapping[str, np.ndarray],
    *,
    resamples: int,
    level: float,
    seed: int,
    groups=None,
) -> list[str]:
    """One sentence per control, of the difference of the mean squared error."""
    compare = _Paired(truth, guess, resamples, level, seed, groups)
    if compare.one_group:
        return [_one_group(target)] if controls else []
    sentences = []
    for name in _ordered(controls):
        point, low, high = compare.difference("mse", controls[name])
        words = "better than" if high < 0 else "worse than" if low > 0 else "not shown to differ from"
        sentences.append(
            f"{target}: the model is {words} {NAMES.get(name, name)}: mean squared error {point:+.3g} "
            f"({100 * level:g} % interval {low:+.3g} to {high:+.3g})"
        )
    return sentences


def paired_difference(
    metric: str,
    truth: np.ndarray,
    guess: np.ndarray,
    other: np.ndarray,
    *,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    groups=None,
) -> Interval:
    """The metric of `guess` minus that of `other`, (n,) each, with an interval from resampling the same observations for both.

    `groups` (n,): observations of one group are resampled together, such as the predictions of one cell in several splits.
    """
    compare = _Paired(truth, guess, resamples, level, seed, groups)
    return Interval(*compare.difference(metric, other), len(truth), "bootstrap_quantiles")


def mcnemar(truth: np.ndarray, guess: np.ndarray, other: np.ndarray) -> float:
    """Exact two-sided McNemar test of two classifiers on the same cells (McNemar 1947): 1 where they never differ in being right."""
    from scipy import stats

    only_ours = int(((guess == truth) & (other != truth)).sum())
    only_theirs = int(((guess != truth) & (other == truth)).sum())
    if only_ours + only_theirs == 0:
        return 1.0
    return float(stats.binomtest(only_ours, only_ours + only_theirs).pvalue)


def _ordered(controls: Mapping[str, np.ndarray]) -> list[str]:
    return [*(name for name in NAMES if name in controls), *(name for name in controls if name not in NAMES)]


def _one_group(target: str) -> str:
    return f"{target}: all cells are of one group, so nothing can be said about how the model compares in others"


class _Paired:
    """Differences between one guess and others, resampled with the same cells."""

    def __init__(self, truth, guess, resamples: int, level: float, seed: int, groups):
        self.truth, self.guess, self.groups = truth, guess, groups
        self.resamples, self.level, self.seed = resamples, level, seed
        self.one_group = groups is not None and len(np.unique(np.asarray(groups).astype(str))) == 1
        self._ours: dict[str, tuple[float, np.ndarray]] = {}

    def _values(self, metric: str, guess) -> tuple[float, np.ndarray]:
        prepared = Metric(metric, self.truth, guess)
        return prepared.value(), resampled(prepared, self.resamples, self.seed, self.groups)

    def difference(self, metric: str, other) -> tuple[float, float, float]:
        """Of the metric, ours minus theirs, with its interval."""
        if metric not in self._ours:
            self._ours[metric] = self._values(metric, self.guess)
        (point, values), (other_point, other_values) = self._ours[metric], self._values(metric, other)
        tail = (1 - self.level) / 2
        low, high = np.quantile(values - other_values, [tail, 1 - tail])
        return point - other_point, float(low), float(high)
