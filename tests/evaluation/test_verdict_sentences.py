"""Verdicts: better, worse, or not shown to differ, from paired resamples and the exact McNemar test."""

import re

import numpy as np
import pytest
from scipy import stats

from bmfm_pipeline.evaluation import verdicts, wording
from bmfm_pipeline.evaluation.intervals import resampled
from bmfm_pipeline.evaluation.metrics import Metric
from bmfm_pipeline.evaluation.verdicts import class_verdicts, mcnemar, paired_difference, value_verdicts
from bmfm_pipeline.evaluation.wording import Difference, verdict_kind

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
    size = r"by 10\.0 points of accuracy, 95 % interval (\S+) to (\S+); macro-F1: {} by 10\.0 points, \S+ to \S+; McNemar p = \S+"
    better = verdict(truth, first, second)
    low, high = re.fullmatch(
        "celltype: the model is better than logistic regression " + size.format("better"), better
    ).groups()
    assert 0 < float(low) < 10 < float(high)
    worse = verdict(truth, second, first)
    found = re.fullmatch("celltype: the model is worse than logistic regression " + size.format("worse"), worse)
    assert found.groups() == (low, high), "sizes carry no sign"
    truth, first, second = two_models(only_first=11, only_second=10)
    none = verdict(truth, first, second)
    assert none.startswith(
        "celltype: no evidence that the model is better or worse than logistic regression: accuracy +0.2 points, 95 % interval -"
    )
    assert "; macro-F1: undecided, +0.2 points, -" in none
    assert [verdict_kind(sentence) for sentence in (better, worse, none)] == ["better", "worse", "open"]


def test_two_that_say_the_same_are_called_so():
    truth, first, _ = two_models()
    assert verdict(truth, first, first) == (
        "celltype: no evidence that the model is better or worse than logistic regression: both say the same of each of the 500 cells"
    )


def test_pretraining_has_words_of_its_own():
    truth, first, second = two_models()
    helped, hurt = verdict(truth, first, second, "no_pretrain"), verdict(truth, second, first, "no_pretrain")
    assert helped.startswith(
        "celltype: pretraining helped: the model is better than the same model without pretraining by 10.0 points"
    )
    assert hurt.startswith(
        "celltype: pretraining hurt: the model is worse than the same model without pretraining by 10.0 points"
    )
    truth, first, second = two_models(only_first=11, only_second=10)
    none = verdict(truth, first, second, "no_pretrain")
    assert none.startswith("celltype: no evidence that pretraining helped: accuracy +0.2 points, 95 % interval -")
    assert [verdict_kind(sentence) for sentence in (helped, hurt, none)] == ["better", "worse", "open"]


def test_accuracy_and_macro_f1_may_point_in_different_directions():
    """The rare class is lost for some more cells of the common one."""
    truth = np.array([0] * 380 + [1] * 20)
    first, second = np.zeros(400, dtype=int), truth.copy()
    second[:60] = 1
    sentence = verdict(truth, first, second)
    assert re.search(r"better than logistic regression by \S+ points of accuracy.*; macro-F1: worse by ", sentence)


def test_an_interval_that_barely_leaves_out_zero_is_written_so_that_this_shows():
    barely = wording.verdict("kind", "majority", [Difference("accuracy", 0.004, 0.0002, 0.01)], level=0.95)
    assert (
        barely
        == "kind: the model is better than the commonest class by 0.40 points of accuracy, 95 % interval 0.02 to 1.00"
    )


def test_smaller_errors_are_better_and_other_metrics_are_told_in_their_own_units():
    def of(metric, *numbers):
        return wording.verdict("age", "train_mean", [Difference(metric, *numbers)], level=0.9)

    assert of("mae", -0.25, -0.5, -0.125) == (
        "age: the model is better than the mean of the training cells by 0.25 of mean absolute error, 90 % interval 0.125 to 0.5"
    )
    assert of("pcc", -0.25, -0.5, -0.125).startswith("age: the model is worse than")
    assert of("pcc", 0.25, -0.5, 0.75).endswith("Pearson correlation +0.25, 90 % interval -0.5 to 0.75")
    assert of("pcc", float("nan"), None, None).endswith(
        "no interval of the difference in Pearson correlation can be given"
    )


def test_resamples_in_which_one_of_both_is_not_defined_say_nothing():
    values = np.array([0.5, np.nan, 0.75])
    found = verdicts.difference_of("pcc", 0.5, values, 0.25, np.array([0.25, 0.0, np.nan]), 0.95)
    assert (found.low, found.high) == (0.25, 0.25)


def test_the_interval_is_that_of_paired_resamples():
    """The difference of accuracies has the deviation of a mean of +1, 0 and -1, far below that of two separate samples."""
    truth, first, second = two_models()
    sentence = verdict(truth, first, second, resamples=4000)
    low, high = (float(value) for value in re.search(r"interval (\S+) to (\S+);", sentence).groups())
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
    assert ", 90 % interval" in verdict(truth, first, second, level=0.9)
    strict = verdict(truth, first, second, level=0.999)
    assert verdict_kind(strict) == "open"
    assert ", 99.9 % interval" in strict


def test_a_handful_of_cells_shows_nothing_however_right():
    """Three of three against none of three: every resample agrees, the exact test (p = .25) does not."""
    sentence = verdict(np.zeros(3, dtype=int), np.zeros(3, dtype=int), np.ones(3, dtype=int))
    assert sentence.startswith(
        "celltype: no evidence that the model is better or worse than logistic regression: accuracy"
    )
    assert sentence.endswith(
        "macro-F1: +100.0 points, 100.0 to 100.0; McNemar p = 0.25, too few cells to go by the interval"
    )


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
    named = [re.search(r"than (.*?) by", sentence).group(1) for sentence in sentences]
    assert named == ["logistic regression", "L1 logistic regression", "the commonest class"]


def test_groups_widen_the_interval_and_take_the_place_of_cells_in_the_test():
    truth, first, second = two_models()
    donors = np.arange(500) // 50  # all cells that differ belong to two donors
    sentence = verdict(truth, first, second, groups=donors)
    assert verdict_kind(sentence) == "open"
    assert sentence.endswith("; sign-flip test of 10 groups p = 1; groups are resampled together")
    assert "better than" in verdict(truth, first, second)
    spread = verdict(truth, first, second, groups=np.arange(500) % 10)
    assert verdict_kind(spread) == "better" and "sign-flip test of 10 groups p = 0.002" in spread


def test_two_donors_show_nothing_however_clear_each_of_them_is():
    truth, first, second = two_models()
    sentence = verdict(truth, first, second, groups=np.arange(500) % 2)
    assert verdict_kind(sentence) == "open"
    assert "sign-flip test of 2 groups p = 0.5, too few groups to go by the interval" in sentence
    numbers = np.arange(200) / 10
    (sentence,) = value_verdicts(
        "age", numbers, numbers, {"train_mean": numbers * 0}, **OPTIONS, groups=np.arange(200) % 3
    )
    assert verdict_kind(sentence) == "open" and "sign-flip test of 3 groups p = 0.25" in sentence


def test_flipped_signs_equal_scipys_permutation_test():
    generator = np.random.default_rng(0)
    groups = np.repeat(np.arange(9), 7)
    won = generator.integers(-1, 2, size=63) + (generator.random(63) < 0.3)
    sums = np.bincount(groups, won)
    expected = stats.permutation_test((sums,), np.sum, permutation_type="samples", n_resamples=np.inf).pvalue
    assert verdicts.sign_flip(won, groups) == pytest.approx(expected)
    # More groups: by draws, and by the normal distribution, both about as exact as they can be.
    single = generator.normal(0.15, 1, size=14)
    drawn = np.concatenate([single, np.full(6, 1e-12)])
    assert verdicts.sign_flip(drawn, np.arange(20)) == pytest.approx(
        verdicts.sign_flip(single, np.arange(14)), abs=0.015
    )
    many = generator.normal(0.04, 1, size=1500)
    normal, by_t = verdicts.sign_flip(many, np.arange(1500)), stats.ttest_1samp(many, 0).pvalue
    assert normal == pytest.approx(by_t, rel=0.05)
    assert verdicts.sign_flip(np.zeros(30), np.arange(30) % 5) == 1.0


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
    assert re.match(
        r"age: the model is better than the mean of the training cells by [\d.]+ of mean squared error,", better
    )
    (worse,) = value_verdicts("age", truth, far, {"train_mean": near}, **OPTIONS)
    assert verdict_kind(worse) == "worse"
    (same,) = value_verdicts("age", truth, far, {"train_mean": far}, **OPTIONS)
    assert same.startswith("age: no evidence that the model is better or worse than the mean of the training cells")


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
