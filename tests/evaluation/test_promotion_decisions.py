"""What a re-evaluation ends as and whether a challenger takes over, from stored predictions alone."""

import numpy as np
import pytest

from bmfm_pipeline.config.promotion import PromotionConfig
from bmfm_pipeline.errors import DataError
from bmfm_pipeline.evaluation.comparing import Contender
from bmfm_pipeline.evaluation.drift import Drift
from bmfm_pipeline.evaluation.predictions import LabelPredictions, Predictions
from bmfm_pipeline.evaluation.promotion import compare_with_record, decide, outcome_of, without_cells

NAMES = ["B", "NK", "T", "rare"]
SETTINGS = PromotionConfig(resamples=400)
FAR = Drift("label_mix", 0.4, 0.15, 0.1, True, "label mix 0.40")


def truth_of(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).choice(4, n, p=[0.4, 0.3, 0.27, 0.03])


def side(truth, right: float, seed: int = 0, start: int = 0, names=NAMES, wrong=None, groups=None) -> Contender:
    """A model that is right about a share of cells; cells are called c0, c1, ... from `start` on."""
    generator = np.random.default_rng([seed, 7])
    fails = generator.permutation(len(truth)) >= right * len(truth) if wrong is None else wrong
    guess = np.where(fails, (truth + 1) % len(names), truth)
    label = LabelPredictions(truth.copy(), guess, None, list(names))
    return Contender(Predictions([f"c{start + row}" for row in range(len(truth))], {"kind": label}), groups, None)


def joined(first: Contender, second: Contender) -> Contender:
    labels = [each.predictions.labels["kind"] for each in (first, second)]
    both = LabelPredictions(
        np.concatenate([label.truth for label in labels]),
        np.concatenate([label.predicted for label in labels]),
        None,
        NAMES,
    )
    return Contender(Predictions([*first.predictions.cells, *second.predictions.cells], {"kind": both}))


def compared(recorded, now, settings=SETTINGS):
    judgements, notes = compare_with_record(recorded, now, settings)
    return {one.cells: one for one in judgements}, notes


def test_the_same_answers_about_the_same_cells_hold():
    recorded = side(truth_of(300), 0.8)
    found, notes = compared(recorded, side(truth_of(300), 0.8))
    assert list(found) == ["the same cells"] and found["the same cells"].paired and notes == []
    assert "both say the same of each cell" in found["the same cells"].sentence
    assert outcome_of(list(found.values()), []) == "held"


def test_a_score_that_fell_on_the_same_cells_is_shown_by_the_paired_test():
    found, _ = compared(side(truth_of(400), 0.8, seed=1), side(truth_of(400), 0.7, seed=2))
    one = found["the same cells"]
    assert one.paired and one.kind == "worse" and one.p < 0.05 and "McNemar" in one.sentence
    assert one.difference.value == pytest.approx(-0.1)
    assert outcome_of(list(found.values()), [FAR]) == "regressed"
    found, _ = compared(side(truth_of(400), 0.7, seed=2), side(truth_of(400), 0.8, seed=1))
    assert outcome_of(list(found.values()), []) == "improved"
    assert outcome_of(list(found.values()), [FAR]) == "drifted"


def test_new_cells_are_judged_by_themselves_and_unpaired_so_that_old_ones_cannot_hide_them():
    recorded = side(truth_of(400), 0.8)
    now = joined(recorded, side(truth_of(150, 5), 0.5, start=400))
    found, _ = compared(recorded, now)
    assert found["the same cells"].kind == "open"
    new = found["new cells"]
    assert (new.paired, new.kind, new.n) == (False, "worse", (150, 400))
    assert "unpaired" in new.sentence and "Fisher's exact test" in new.sentence
    assert outcome_of(list(found.values()), []) == "regressed"


def test_intervals_are_wider_where_two_comparisons_are_made():
    recorded, now = side(truth_of(400), 0.8, seed=1), side(truth_of(400), 0.75, seed=2)
    alone = compared(recorded, now)[0]["the same cells"].difference
    beside = compared(recorded, joined(now, side(truth_of(60, 5), 0.8, start=400)))[0]["the same cells"].difference
    assert beside.low < alone.low and beside.high > alone.high


def test_a_handful_of_new_cells_is_said_and_not_judged():
    recorded = side(truth_of(300), 0.8)
    found, notes = compared(recorded, joined(recorded, side(truth_of(7, 5), 0.0, start=300)))
    assert list(found) == ["the same cells"]
    assert notes == ["kind: 7 new cells are too few to be judged (promotion.min_cells 20)"]


def test_other_cells_are_compared_unpaired():
    found, _ = compared(side(truth_of(300), 0.8), side(truth_of(200, 3), 0.8, start=1000))
    assert list(found) == ["these cells"] and not found["these cells"].paired


def test_few_cells_are_not_judged_by_an_interval_that_is_too_sure():
    wrong = np.zeros(22, dtype=bool)
    wrong[:4] = True  # 4 to 0 discordant cells: the bootstrap leaves out 0, the exact test does not agree
    truth = np.tile([0, 1], 11)
    found, _ = compared(side(truth, 1, wrong=np.zeros(22, dtype=bool)), side(truth, 1, wrong=wrong))
    one = found["the same cells"]
    assert one.difference.high < 0 and one.p == pytest.approx(0.125) and one.kind == "open"


def test_groups_are_resampled_together():
    groups = np.repeat([f"donor{number}" for number in range(8)], 50).astype(object)
    found, _ = compared(
        side(truth_of(400), 0.8, seed=1, groups=groups), side(truth_of(400), 0.7, seed=2, groups=groups)
    )
    assert "sign-flip test of 8 groups" in found["the same cells"].sentence


def test_columns_of_numbers_and_of_several_classes():
    truth = np.random.default_rng(0).normal(size=300)

    def numbers(noise: float) -> Contender:
        guess = truth + np.random.default_rng(1).normal(size=300) * noise
        label = LabelPredictions(truth.copy(), guess)
        return Contender(Predictions([f"c{row}" for row in range(300)], {"age": label}))

    one, _ = compare_with_record(numbers(0.2), numbers(1.0), SETTINGS)
    assert (one[0].metric, one[0].kind) == ("mse", "worse") and one[0].gain[0] < 0
    assert decide(numbers(1.0), numbers(0.2), SETTINGS).promoted
    assert not decide(numbers(0.2), numbers(1.0), SETTINGS).promoted

    def several(right: float) -> Contender:
        labels, generator = {}, np.random.default_rng(3)
        for name in ("a", "b"):
            own = generator.integers(0, 2, 200)
            guess = np.where(generator.random(200) < right, own, 1 - own)
            labels[f"states: {name}"] = LabelPredictions(own, guess, None, ["no", "yes"], part_of="states")
        return Contender(Predictions([f"c{row}" for row in range(200)], labels))

    found, _ = compare_with_record(several(0.95), several(0.7), SETTINGS)
    assert [(each.target, each.kind, each.n) for each in found] == [("states", "worse", (200, 200))]


def test_a_challenger_that_is_better_by_more_than_the_margin_is_promoted():
    champion, challenger = side(truth_of(500), 0.7, seed=1), side(truth_of(500), 0.85, seed=2)
    decision = decide(champion, challenger, SETTINGS)
    assert decision.promoted and "the challenger is better than the champion by 15.0 points" in decision.sentence
    (one,) = decision.judgements
    assert 0 < one.gain[1] < 0.15
    assert decide(champion, challenger, PromotionConfig(resamples=400, margin=round(one.gain[1] - 0.001, 4))).promoted
    refused = decide(champion, challenger, PromotionConfig(resamples=400, margin=round(one.gain[1] + 0.001, 4)))
    assert not refused.promoted and "more than promotion.margin" in refused.sentence


def test_a_challenger_is_never_promoted_with_a_worse_rare_class():
    truth = truth_of(600)
    champion = side(truth, 1, wrong=(np.arange(600) % 4 == 0) & (truth != 3))
    challenger = side(truth, 1, wrong=truth == 3)
    decision = decide(champion, challenger, SETTINGS)
    assert decision.judgements[0].gain[1] > 0 and not decision.promoted
    assert "mean F1 of rare classes (rare) 0.000 against" in decision.sentence
    assert decision.rare["kind"]["classes"] == ["rare"]
    lenient = PromotionConfig(resamples=400, rare_tolerance=1)
    assert decide(champion, challenger, lenient).promoted


def test_without_common_cells_there_is_no_promotion():
    decision = decide(side(truth_of(300), 0.5), side(truth_of(300), 0.9, start=1000), SETTINGS)
    assert not decision.promoted and "0 cells were tested with both, and 20 are needed" in decision.sentence


def test_a_challenger_that_learned_another_class_is_compared_on_the_cells_of_the_classes_of_both():
    truth = truth_of(400)
    champion, challenger = side(truth, 0.7, seed=1), side(truth, 0.85, seed=2, names=["new", *NAMES])
    label = challenger.predictions.labels["kind"]
    label.truth += 1
    label.predicted = np.where(label.predicted + 1 < 5, label.predicted + 1, 0)  # what was wrong may be the new class
    decision = decide(champion, challenger, SETTINGS)
    assert decision.judgements[0].n == (400, 400) and decision.judgements[0].difference.value > 0.1
    assert decision.reasons[-1] == "kind: the challenger also knows new"


def test_a_challenger_for_another_label_or_of_other_classes_is_refused():
    other = side(truth_of(300), 0.9)
    other.predictions.labels["lineage"] = other.predictions.labels.pop("kind")
    assert decide(side(truth_of(300), 0.5), other, SETTINGS).reasons == ["it does not predict kind"]
    strangers = decide(side(truth_of(300), 0.5), side(truth_of(300), 0.9, names=["w", "x", "y", "z"]), SETTINGS)
    assert not strangers.promoted and "0 cells were tested with both" in strangers.reasons[0]
    with pytest.raises(DataError, match="no label column in common"):
        compare_with_record(side(truth_of(300), 0.5), other, SETTINGS)


def test_a_second_label_column_may_not_get_worse():
    champion, challenger = side(truth_of(500), 0.7, seed=1), side(truth_of(500), 0.85, seed=2)
    for contender, right, seed in ((champion, 0.9, 3), (challenger, 0.7, 4)):
        contender.predictions.labels["state"] = side(truth_of(500, 9), right, seed=seed).predictions.labels["kind"]
    decision = decide(champion, challenger, PromotionConfig(resamples=400, rare_tolerance=1))
    assert not decision.promoted and decision.sentence.startswith("state, paired on 500 cells: the challenger is worse")


def test_cells_can_be_left_out_of_an_evaluation():
    whole = side(truth_of(10), 0.5, groups=np.arange(10).astype(object))
    half = without_cells(whole, np.arange(10) % 2 == 0)
    assert half.predictions.cells == ["c0", "c2", "c4", "c6", "c8"] and list(half.groups) == [0, 2, 4, 6, 8]
    assert list(half.predictions.labels["kind"].truth) == list(whole.predictions.labels["kind"].truth[::2])
