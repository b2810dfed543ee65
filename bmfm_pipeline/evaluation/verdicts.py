"""Two predictors on the same cells: the difference, its interval, an exact test, and the sentence on them.

Both are scored on the same cells, so what they share cancels: each resample draws the same cells for both.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bmfm_pipeline.evaluation.intervals import Interval
from bmfm_pipeline.evaluation.metrics import Metric
from bmfm_pipeline.evaluation.resampling import resampled_together
from bmfm_pipeline.evaluation.wording import NAMES, Difference, no_evidence, verdict

_ALL_SIGNS, _MANY_GROUPS = 14, 1000  # up to how many groups all signs are tried, and how many need no draws


def difference_of(
    metric: str, point: float, values: np.ndarray, other_point: float, other_values: np.ndarray, level: float
) -> Difference:
    """From the metric of two predictors and its values in the same resamples (R,); those where one is not defined are left out."""
    differences = np.asarray(values) - np.asarray(other_values)
    differences = differences[np.isfinite(differences)]
    if not len(differences) or not np.isfinite(point - other_point):
        return Difference(metric, point - other_point, None, None)
    tail = (1 - level) / 2
    low, high = np.quantile(differences, [tail, 1 - tail])
    return Difference(metric, point - other_point, float(low), float(high))


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
    strata=None,
) -> list[str]:
    """One sentence per control, with the difference of accuracy and of macro-F1 and the exact McNemar test.

    Better or worse is said of accuracy, and only where the paired bootstrap and the test agree: of a handful of cells the bootstrap
    alone is too sure. McNemar's test takes cells as independent; when `groups` are given, their signs are flipped instead.
    """
    if _one_group(groups):
        return [_of_one_group(target)] if controls else []
    options = {"resamples": resamples, "level": level, "seed": seed, "groups": groups, "strata": strata}
    sentences = []
    for name in _ordered(controls):
        other = np.asarray(controls[name])
        if np.array_equal(guess, other):
            what = no_evidence(name, "the model", NAMES.get(name, name))
            sentences.append(f"{target}: {what}: both say the same of each of the {len(truth)} cells")
            continue
        differences = paired_differences(("accuracy", "f1"), truth, guess, other, **options)
        tested = paired_test(truth, guess, other, groups, seed=seed)
        sentences.append(verdict(target, name, differences, level=level, **tested))
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
    if _one_group(groups):
        return [_of_one_group(target)] if controls else []
    options = {"resamples": resamples, "level": level, "seed": seed, "groups": groups}
    sentences = []
    for name in _ordered(controls):
        differences = paired_differences(("mse",), truth, guess, controls[name], **options)
        tested = paired_test(truth, guess, controls[name], groups, numbers=True, seed=seed)
        sentences.append(verdict(target, name, differences, level=level, **tested))
    return sentences


def paired_differences(
    metrics: Sequence[str],
    truth: np.ndarray,
    guess: np.ndarray,
    other: np.ndarray,
    *,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    groups=None,
    strata=None,
) -> list[Difference]:
    """Each metric of `guess` minus that of `other`, (n,) each, or scores (n, C), from the same resampled observations for both."""
    prepared = [Metric(metric, truth, values) for metric in metrics for values in (guess, other)]
    found = resampled_together(prepared, resamples, seed, groups, strata)
    pairs = zip(metrics, prepared[::2], found[::2], prepared[1::2], found[1::2], strict=True)
    return [
        difference_of(metric, ours.value(), values, theirs.value(), other_values, level)
        for metric, ours, values, theirs, other_values in pairs
    ]


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
    strata=None,
) -> Interval:
    """The metric of `guess` minus that of `other`, (n,) each, with an interval from resampling the same observations for both.

    `groups` (n,): observations of one group are resampled together, such as the predictions of one cell in several splits.
    `strata` (n,): of each as many are drawn as there are.
    """
    options = {"resamples": resamples, "level": level, "seed": seed, "groups": groups, "strata": strata}
    (found,) = paired_differences((metric,), truth, guess, other, **options)
    return Interval(found.value, found.low, found.high, len(truth), "bootstrap_quantiles")


def mcnemar(truth: np.ndarray, guess: np.ndarray, other: np.ndarray) -> float:
    """Exact two-sided McNemar test of two classifiers on the same cells (McNemar 1947): 1 where they never differ in being right."""
    from scipy import stats

    only_ours = int(((guess == truth) & (other != truth)).sum())
    only_theirs = int(((guess != truth) & (other == truth)).sum())
    if only_ours + only_theirs == 0:
        return 1.0
    return float(stats.binomtest(only_ours, only_ours + only_theirs).pvalue)


def sign_flip(won: np.ndarray, groups: np.ndarray, seed: int = 0) -> float:
    """Two-sided test of paired differences `won` (n,) whose groups (n,) are independent: how often their sum is as large when the sign of
    each group's is drawn by chance (Fisher 1935). 1 where nothing differs.

    Of few groups all signs are tried, of more 20,000 draws, and of very many the normal distribution stands for them.
    """
    codes = np.unique(np.asarray(groups).astype(str), return_inverse=True)[1]
    sums = np.bincount(codes, won)
    sums = sums[sums != 0]
    count, least = len(sums), abs(sums.sum()) * (1 - 1e-9)
    if not count:
        return 1.0
    if count <= _ALL_SIGNS:
        signs = 1 - 2 * (np.arange(2**count)[:, None] >> np.arange(count) & 1)
        return float((np.abs(signs @ sums) >= least).mean())
    if count > _MANY_GROUPS:
        from scipy import stats

        return float(2 * stats.norm.sf(least / np.sqrt((sums**2).sum())))
    generator, as_large = np.random.default_rng(seed), 0
    for _ in range(20):
        signs = 1.0 - 2.0 * generator.integers(0, 2, size=(1000, count))
        as_large += int((np.abs(signs @ sums) >= least).sum())
    return (1 + as_large) / 20_001


def paired_test(
    truth: np.ndarray, guess: np.ndarray, other: np.ndarray, groups=None, *, numbers: bool = False, seed: int = 0
) -> dict[str, Any]:
    """The exact test of a paired difference as `verdict` takes it: McNemar's of classes, flipped signs of groups where there are any.

    Of numbers without groups there is none: {}.
    """
    if groups is None:
        return {} if numbers else {"p": mcnemar(truth, guess, other)}
    if numbers:
        won = (other - truth) ** 2 - (guess - truth) ** 2
    else:
        won = (guess == truth).astype(int) - (other == truth)
    count = len(np.unique(np.asarray(groups).astype(str)))
    return {
        "p": sign_flip(won, groups, seed),
        "test": f"sign-flip test of {count} groups",
        "remarks": ["groups are resampled together"],
    }


def _ordered(controls: Mapping[str, np.ndarray]) -> list[str]:
    return [*(name for name in NAMES if name in controls), *(name for name in controls if name not in NAMES)]


def _one_group(groups) -> bool:
    return groups is not None and len(np.unique(np.asarray(groups).astype(str))) == 1


def _of_one_group(target: str) -> str:
    return f"{target}: all cells are of one group, so nothing can be said about how the model compares in others"
