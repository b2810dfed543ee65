"""The words for two predictors, alike on every page: better, worse, or no evidence, by how much, and how sure that is.

Without numerical packages, so that pages of what is already there open at once.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

# What stands beside a model, as sentences call it; the first of those there are is spoken of first.
NAMES = {
    "logistic_l2": "logistic regression",
    "logistic_l1": "L1 logistic regression",
    "pca50_logistic": "logistic regression on 50 principal components",
    "kmer6_logistic": "logistic regression on counts of words of 1 to 6 letters",
    "kmer6_ridge": "ridge regression on counts of words of 1 to 6 letters",
    "gc_logistic": "logistic regression on the share of G and C",
    "cnn": "a small convolutional network",
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
        return "; ".join([f"{target}: {no_evidence(name, subject, other)}: {what}", *remarks])
    if kind == "open":
        size = _signed(first)
        sentence = f"{no_evidence(name, subject, other)}: {metric_name(first.metric)} {size[0]}, {interval}{size[1]}"
    else:
        size = _sized(first)
        sentence = f"{subject} is {kind} than {other} by {size[0]} of {metric_name(first.metric)}, {interval}{size[1]}"
        if name == "no_pretrain":
            sentence = f"pretraining {'helped' if kind == 'better' else 'hurt'}: {sentence}"
    trusted = kind == first.kind
    parts = [f"{target}: {sentence}", *(_aside(difference, trusted) for difference in others)]
    if p is not None:
        few = "groups" if "groups" in test else "cells"
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


def no_evidence(name: str, subject: str, other: str) -> str:
    """The words where nothing is shown of `subject` against `name`, which sentences call `other`."""
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


def in_words(text: str, of: str) -> str:
    """A sentence about cells and their genes, or about sequences and their pieces."""
    if of == "cells":
        return text
    for word, other in (("cell", "sequence"), ("gene", "piece"), ("Gene", "Piece")):
        text = re.sub(rf"\b{word}(s?)\b", rf"{other}\1", text)
    return text
