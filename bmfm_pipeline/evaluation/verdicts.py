"""Two predictors in one sentence, worded alike on every page: better, worse, or no evidence, by how much, and how sure that is.

Both are scored on the same cells, so what they share cancels: each resample draws the same cells for both.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bmfm_pipeline.evaluation.intervals import Interval
from bmfm_pipeline.evaluation.metrics import Metric
from bmfm_pipeline.evaluation.resampling import resampled_together

# What stands beside a model, as sentences call it; the first of those there are is spoken of first.
NAMES = {
    "logistic_l2": "logistic regression",
    "logistic_l1": "L1 logistic regression",
    "pca50_logistic": "logistic regression on 50 principal components",
    "kmer6_logistic": "logistic regression on counts of 6-mers",
    "ridge": "ridge regression",
    "celltypist": "CellTypist",
    "linear_probe": "a linear probe of its frozen embeddings",
    "knn": "the nearest neighbours of its frozen embeddings",
    "no_pretrain": "the same model without pretraining",
    "majority": "the commonest class",
    "train_mean": "the mean of the training cells",
    "control_mean": "the mean of the control cells",
    "additive": "the sum of the single perturbations",
    "constant": "the constant guess",
}
METRIC_NAMES = {
    "f1": "macro-F1",
    "f1_without_rare": "macro-F1 without rare classes",
    "mcc": "Matthews correlation",
    "mse": "mean squared error",
    "mae": "mean absolute error",
    "pcc": "Pearson correlation",
    "auroc": "area under the ROC curve",
    "auprc": "average precision",
    "precision": "macro precision",
    "recall": "macro recall",
    "agg_mae": "mean absolute error of profiles",
    "agg_pcc": "correlation of profiles",
    "delta_agg_pcc": "correlation of changes from control",
}
SMALLER_IS_BETTER = ("mse", "mae", "rmse", "perplexity", "log_loss", "hamming", "hamming_loss", "brier", "ece", "nll")
SMALLER_IS_BETTER += ("mae_nonzero", "agg_mae", "agg_mse", "top20_de_agg_mae", "top20_de_agg_mse")
_ALL_SIGNS, _MANY_GROUPS = 14, 1000  # up to how many groups all signs are tried, and how many need no draws
_PARTS_OF_HUNDRED = ("accuracy", "f1", "precision", "recall", "jaccard")


@dataclass(frozen=True)
class Difference:
    """A metric of one predictor minus that of another; `low` and `high` are None where nothing can be said of its error."""

    metric: str
    value: float
    low: float | None
    high: float | None

    @property
    def kind(self) -> str:
        """better or worse where the interval leaves out 0, else open."""
        if self.low is None or self.high is None or self.low <= 0 <= self.high:
            return "open"
        return "better" if (self.low > 0) != (self.metric in SMALLER_IS_BETTER) else "worse"


def is_share(metric: str) -> bool:
    """Whether differences of the metric are told in points, hundredths of it."""
    return any(part in metric.split("_") for part in _PARTS_OF_HUNDRED)


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


def verdict(
    target: str,
    name: str,
    differences: Sequence[Difference],
    *,
    level: float,
    subject: str = "the model",
    p: float | None = None,
    test: str = "McNemar",
    remarks: Sequence[str] = (),
) -> str:
    """The sentence on `subject` against `name`, a key of NAMES or any words, from the differences of one or more metrics.

    The first difference decides; `p`, of the exact `test` of the same question, must agree with it. The others are told after it.
    `remarks` end the sentence. verdict_kind reads better, worse or open back from it.
    """
    first, *others = differences
    other = NAMES.get(name, name)
    kind = first.kind if p is None or p < 1 - level else "open"
    interval = f"{100 * level:g} % interval "
    if first.low is None:
        what = f"no interval of the difference in {metric_name(first.metric)} can be given"
        return "; ".join([f"{target}: {_no_evidence(name, subject, other)}: {what}", *remarks])
    if kind == "open":
        size = _signed(first)
        sentence = f"{_no_evidence(name, subject, other)}: {metric_name(first.metric)} {size[0]}, {interval}{size[1]}"
    else:
        size = _sized(first)
        sentence = f"{subject} is {kind} than {other} by {size[0]} of {metric_name(first.metric)}, {interval}{size[1]}"
        if name == "no_pretrain":
            sentence = f"pretraining {'helped' if kind == 'better' else 'hurt'}: {sentence}"
    trusted = kind == first.kind
    parts = [f"{target}: {sentence}", *(_aside(difference, trusted) for difference in others)]
    if p is not None:
        few = "cells" if test == "McNemar" else "groups"
        parts.append(f"{test} p = {p:.2g}" + ("" if trusted else f", too few {few} to go by the interval"))
    return "; ".join([*parts, *remarks])


def verdict_kind(sentence: str) -> str:
    """How a verdict is marked: better, worse or open; the words carry the meaning, sign and colour only repeat it."""
    words = sentence.lower()
    if "no evidence" in words or "not shown" in words:
        return "open"
    return next((kind for kind in ("better", "worse") if f"{kind} than" in words), "open")


def metric_name(metric: str) -> str:
    """The metric in words."""
    return METRIC_NAMES.get(metric, metric.replace("_", " "))


def _no_evidence(name: str, subject: str, other: str) -> str:
    if name == "no_pretrain":
        return "no evidence that pretraining helped"
    return f"no evidence that {subject} is better or worse than {other}"


def _aside(difference: Difference, trusted: bool) -> str:
    what = metric_name(difference.metric)
    if difference.low is None:
        return f"{what}: no interval"
    if difference.kind == "open" or not trusted:
        size, interval = _signed(difference)
        return f"{what}: {'undecided, ' if trusted else ''}{size}, {interval}"
    size, interval = _sized(difference)
    return f"{what}: {difference.kind} by {size}, {interval}"


def _signed(difference: Difference) -> tuple[str, str]:
    """('+0.2 points', '-1.1 to 1.5')"""
    value, low, high = _written(difference.metric, (difference.value, difference.low, difference.high), 1)
    plus = "" if value.startswith("-") or not value.strip("0.") else "+"
    return f"{plus}{value}{' points' if is_share(difference.metric) else ''}", f"{low} to {high}"


def _sized(difference: Difference) -> tuple[str, str]:
    """('1.3 points', '0.2 to 2.4'): how much better or worse, so without a sign."""
    bounds = sorted(abs(bound) for bound in (difference.low, difference.high))
    # With as many decimals as it takes to show that 0 is left out.
    decimals = next((count for count in (1, 2, 3) if round(100 * bounds[0], count)), 4)
    value, low, high = _written(difference.metric, (abs(difference.value), *bounds), decimals)
    return f"{value}{' points' if is_share(difference.metric) else ''}", f"{low} to {high}"


def _written(metric: str, values: Sequence[float], decimals: int) -> list[str]:
    """Points with so many decimals, other metrics with three digits."""
    if not is_share(metric):
        return [f"{value + 0.0:.3g}" for value in values]
    return [f"{round(100 * value, decimals) + 0.0:.{decimals}f}" for value in values]


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
            what = _no_evidence(name, "the model", NAMES.get(name, name))
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
