"""Verdicts: better, worse, or not shown to differ, from paired resamples and the exact McNemar test."""

import re

import numpy as np
import pytest
from scipy import stats

from bmfm_pipeline.evaluation.intervals import resampled
from bmfm_pipeline.evaluation.metrics import Metric
from bmfm_pipeline.evaluation.verdicts import class_verdicts, mcnemar, paired_difference, value_verdicts

OPTIONS = {"resamples": 500, "level": 0.95, "seed": 0}


def two_models(n=500, only_first=60, only_second=10, neither=30):
    """Truth and two guesses, right together except for the given numbers of cells."""
    truth = np.arange(n) % 3
    wrong = (truth + 1) % 3
    first, second = truth.copy(), truth.copy()
    second[:only_first] = wrong[:only_first]
    first[only_first : only_first + only_second] = wrong[only_first : only_first + only_second]
    both = slice(only_first + only_second, only_first + only_second + neither)
    first[both] = second[both] = wrong[both]
    return truth, first, second


def verdict(truth, guess, other, name="logistic_l2", **options):
    (sentence,) = class_verdicts("celltype", truth, guess, {name: other}, **{**OPTIONS, **options})
    return sentence


def test_better_worse_and_no_evidence():
    truth, first, second = two_models()
    assert verdict(truth, first, second).startswith(
        "celltype: the model is better than logistic regression: accuracy +10.0"
    )
    assert verdict(truth, second, first).startswith(
        "celltype: the model is worse than logistic regression: accuracy -10.0"
    )
    truth, first, second = two_models(only_first=11, only_second=10)
    assert "the model is not shown to differ from logistic regression: accuracy +0.2 points" in verdict(
        truth, first, second
    )
    same = verdict(truth, first, first)
    assert "not shown to differ" in same
    assert same.endswith(
        "accuracy +0.0 points (95 % interval +0.0 to +0.0), macro-F1 +0.0 (+0.0 to +0.0); McNemar p = 1"
    )


def test_the_interval_is_that_of_paired_resamples():
    """The difference of accuracies has the deviation of a mean of +1, 0 and -1, far below that of two separate samples."""
    truth, first, second = two_models()
    sentence = verdict(truth, first, second, resamples=4000)
    low, high = (float(value) for value in re.search(r"interval (\S+) to (\S+)\)", sentence).groups())
    differences = (first == truth).astype(float) - (second == truth)
    margin = 100 * 1.96 * differences.std() / np.sqrt(len(truth))
    assert (low, high) == pytest.approx((10 - margin, 10 + margin), abs=0.35)
    separate = sum(
        resampled(Metric("accuracy", truth, guess), 2000, seed).var() for seed, guess in ((1, first), (2, second))
    )
    assert high - low < 0.85 * 2 * 196 * np.sqrt(separate)


def test_the_level_is_said_and_used():
    truth, first, second = two_models(only_first=26, only_second=12)
    assert "better than" in verdict(truth, first, second, level=0.9)
    assert "(90 % interval" in verdict(truth, first, second, level=0.9)
    strict = verdict(truth, first, second, level=0.999)
    assert "not shown to differ" in strict
    assert "(99.9 % interval" in strict


def test_a_handful_of_cells_shows_nothing_however_right():
    """Three of three against none of three: every resample agrees, the exact test (p = .25) does not."""
    sentence = verdict(np.zeros(3, dtype=int), np.zeros(3, dtype=int), np.ones(3, dtype=int))
    assert "not shown to differ" in sentence
    assert sentence.endswith("McNemar p = 0.25")


@pytest.mark.parametrize("counts", [(60, 10), (3, 0), (5, 5), (0, 1)])
def test_mcnemar_equals_the_binomial_test_of_the_cells_that_differ(counts):
    truth, first, second = two_models(only_first=counts[0], only_second=counts[1])
    assert mcnemar(truth, first, second) == stats.binomtest(counts[0], sum(counts), 0.5).pvalue
    assert mcnemar(truth, first, second) == mcnemar(truth, second, first)


def test_mcnemar_of_equal_predictions_is_one():
    truth, first, _ = two_models()
    assert mcnemar(truth, first, first) == 1.0


def test_every_control_has_its_sentence_the_strong_ones_first():
    truth, first, second = two_models()
    sentences = class_verdicts(
        "celltype", truth, first, {"majority": second, "logistic_l1": second, "logistic_l2": second}, **OPTIONS
    )
    named = [re.search(r"than (.*?): accuracy", sentence).group(1) for sentence in sentences]
    assert named == ["logistic regression", "L1 logistic regression", "the commonest class"]


def test_groups_widen_the_interval_and_leave_the_cell_wise_test_out():
    truth, first, second = two_models()
    donors = np.arange(500) // 50  # all cells that differ belong to two donors
    sentence = verdict(truth, first, second, groups=donors)
    assert "not shown to differ" in sentence
    assert sentence.endswith("groups are resampled together")
    assert "better than" in verdict(truth, first, second)


def test_a_single_group_has_no_verdict():
    truth, first, second = two_models()
    assert "all cells are of one group" in verdict(truth, first, second, groups=["donor 1"] * 500)


def test_no_control_no_verdict():
    truth, first, _ = two_models()
    assert class_verdicts("celltype", truth, first, {}, **OPTIONS) == []
    assert class_verdicts("celltype", truth, first, {}, groups=["a"] * 500, **OPTIONS) == []


def test_numbers_are_compared_by_squared_error():
    generator = np.random.default_rng(0)
    truth = generator.normal(size=300)
    near, far = truth + 0.1 * generator.normal(size=300), np.zeros(300)
    (better,) = value_verdicts("age", truth, near, {"train_mean": far}, **OPTIONS)
    assert better.startswith("age: the model is better than the mean of the training cells: mean squared error -")
    (worse,) = value_verdicts("age", truth, far, {"train_mean": near}, **OPTIONS)
    assert "worse than" in worse
    (same,) = value_verdicts("age", truth, far, {"train_mean": far}, **OPTIONS)
    assert "not shown to differ" in same


def test_a_difference_of_cells_seen_in_several_splits_is_as_uncertain_as_the_cells():
    truth, first, second = two_models()
    cells = np.arange(len(truth))
    once = paired_difference("accuracy", truth, first, second, resamples=2000)
    assert once.value == pytest.approx(0.1) and once.n == 500
    assert once.low < 0.1 < once.high
    three = [np.tile(values, 3) for values in (truth, first, second)]
    as_if_new = paired_difference("accuracy", *three, resamples=2000)
    clustered = paired_difference("accuracy", *three, resamples=2000, groups=np.tile(cells, 3))
    assert clustered.value == as_if_new.value == pytest.approx(0.1)
    width = {name: found.high - found.low for name, found in (("new", as_if_new), ("same", clustered), ("once", once))}
    assert width["same"] == pytest.approx(width["once"], rel=0.1)
    assert width["new"] == pytest.approx(width["once"] / 3**0.5, rel=0.15)
