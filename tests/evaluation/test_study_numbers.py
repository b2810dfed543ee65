"""What several trainings add up to: means and intervals over seeds, differences from a control, collapsed seeds, and the sentences."""

import math

import numpy as np
import pytest
from scipy import stats

from bmfm_pipeline.evaluation.pages.study_page import study_markdown, study_page
from bmfm_pipeline.evaluation.study import PointScores, student_t, study_of
from bmfm_pipeline.evaluation.study_collapse import find_collapsed
from bmfm_pipeline.evaluation.study_words import sentence_kind, study_text
from bmfm_pipeline.evaluation.verdicts import paired_difference

N = 400
TRUTH = np.arange(N) % 4


def guesses(accuracy: float, luck: int) -> np.ndarray:
    """Labels of which this share is right, another part of them for every `luck`."""
    wrong = np.random.default_rng(luck).permutation(N)[: round((1 - accuracy) * N)]
    found = TRUTH.copy()
    found[wrong] = (found[wrong] + 1) % 4
    return found


def point(fraction: float, seed: int, model: float, control: float, *, cells=None, truth=TRUTH) -> PointScores:
    made = {"model": guesses(model, seed), "logistic_l2": guesses(control, 99), "majority": np.zeros(N, dtype=int)}
    rows = [
        {
            "target": "celltype",
            "metric": metric,
            "model": name,
            "value": float((guess == truth).mean()),
            "ci_low": 0.1,
            "ci_high": 0.9,
            "ci_method": "bootstrap_quantiles",
            "n": N,
        }
        for name, guess in made.items()
        for metric in ("accuracy", "f1")
    ]
    names = cells or [f"cell{number}" for number in range(N)]
    return PointScores(
        name=f"{100 * fraction:g} %, seed {seed}",
        fraction=fraction,
        seed=seed,
        n_train=round(1000 * fraction),
        rows=rows,
        truth={"celltype": truth},
        guesses={"celltype": made},
        cells={"celltype": names},
        groups={"celltype": None},
    )


def row_of(study, part: str, **wanted):
    (row,) = [row for row in study[part] if all(row[name] == value for name, value in wanted.items())]
    return row


def test_the_interval_of_a_mean_over_seeds_is_that_of_student():
    values = [0.70, 0.74, 0.72, 0.80]
    found = student_t(values, 0.95)
    low, high = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert found["mean"] == pytest.approx(0.74)
    assert found["sd"] == pytest.approx(math.sqrt((0.04**2 + 0 + 0.02**2 + 0.06**2) / 3))
    assert (found["ci_low"], found["ci_high"]) == pytest.approx((low, high))
    assert (found["min"], found["max"], found["n_seeds"]) == (0.70, 0.80, 4)


def test_of_two_seeds_it_is_what_a_table_of_t_gives():
    found = student_t([0.5, 0.7], 0.95)
    assert found["ci_high"] - found["mean"] == pytest.approx(12.706 * 0.1, rel=1e-4)


def test_of_one_seed_there_is_none():
    found = student_t([0.5])
    assert (found["mean"], found["sd"], found["ci_low"]) == (0.5, None, None)


def test_splits_that_share_cells_have_a_wider_interval():
    values = [0.70, 0.74, 0.72, 0.80]
    own, shared = student_t(values), student_t(values, test_to_train=0.25)
    assert shared["ci_method"] == "student_t_resampled"
    assert (shared["ci_high"] - shared["mean"]) / (own["ci_high"] - own["mean"]) == pytest.approx(math.sqrt(0.5 / 0.25))


@pytest.mark.parametrize(
    ("scores", "floors", "found"),
    [
        ({1: 0.80, 2: 0.35, 3: 0.81}, {1: 0.34, 2: 0.34, 3: 0.34}, {2: "floor"}),
        ({1: 0.80, 2: 0.20, 3: 0.81}, {1: 0.34, 2: 0.34, 3: 0.34}, {2: "floor"}),  # below it too
        ({1: 0.80, 2: 0.82, 3: 0.81, 4: 0.60}, dict.fromkeys(range(1, 5), 0.34), {4: "others"}),
        ({1: 0.80, 2: 0.82, 3: 0.60}, {}, {}),  # of two others nothing can be said
        ({1: 0.800, 2: 0.801, 3: 0.799, 4: 0.795}, {}, {}),  # half a point is no collapse, however close the others are
        ({1: 0.80, 2: 0.82, 3: 0.81, 4: 0.95}, {}, {}),  # far above is none either
        ({1: 0.36}, {1: 0.34}, {1: "floor"}),
    ],
)
def test_collapsed_seeds_are_found(scores, floors, found):
    assert find_collapsed(scores, floors) == found


def test_of_an_error_the_larger_is_the_worse():
    assert find_collapsed({1: 0.5, 2: 0.99, 3: 0.52}, dict.fromkeys((1, 2, 3), 1.0), smaller_is_better=True) == {
        2: "floor"
    }
    assert find_collapsed({1: 0.5, 2: 0.51, 3: 0.52, 4: 0.9}, {}, smaller_is_better=True) == {4: "others"}


def test_a_curve_says_from_which_share_on_the_model_passes_its_control():
    study = study_of([point(0.1, 1, 0.60, 0.75), point(0.5, 1, 0.86, 0.78), point(1.0, 1, 0.92, 0.80)])
    assert study["kind"] == "few_shot"
    difference = row_of(study, "differences", metric="accuracy", fraction=0.5, seed=None)
    expected = paired_difference("accuracy", TRUTH, guesses(0.86, 1), guesses(0.78, 99), seed=1)
    assert difference["value"] == pytest.approx(0.08)
    assert difference["over_cells"] == pytest.approx([expected.low, expected.high], abs=0.01)
    assert difference["over_seeds"] is None
    kinds = [row["kind"] for row in study["differences"] if row["seed"] is None and row["metric"] == "accuracy"]
    assert kinds == ["worse", "better", "better"]
    sentence = study["verdicts"][0]
    assert "needs about 50 % of the training cells to pass logistic regression in accuracy: +8.0 points" in sentence
    assert sentence.endswith("with 50 % of the training cells (500)")
    assert sentence_kind(sentence) == "better"
    assert study["findings"] == [
        "celltype: accuracy is 0.600 with 10 % of the training cells (100) and 0.920 with 100 % of the training cells (1,000)"
    ]
    summary = row_of(study, "summary", metric="accuracy", fraction=0.1, model="model")
    assert (summary["mean"], summary["ci_low"], summary["ci_method"]) == (0.60, 0.1, "bootstrap_quantiles")


@pytest.mark.parametrize(
    ("scores", "words", "kind"),
    [
        ([(0.9, 0.7), (0.95, 0.8)], "is better than logistic regression in accuracy at every share tried", "better"),
        ([(0.5, 0.7), (0.6, 0.8)], "is worse than logistic regression in accuracy at every share tried", "worse"),
        ([(0.5, 0.7), (0.8, 0.8)], "no evidence that the model passes logistic regression", "open"),
        (
            [(0.9, 0.7), (0.8, 0.8)],
            "is ahead of logistic regression in accuracy at 10 % alone, and does not stay so",
            "open",
        ),
    ],
)
def test_every_course_of_a_curve_has_its_sentence(scores, words, kind):
    study = study_of([point(share, 1, *pair) for share, pair in zip((0.1, 1.0), scores, strict=True)], resamples=200)
    assert words in study["verdicts"][0]
    assert sentence_kind(study["verdicts"][0]) == kind


def test_seeds_have_a_mean_a_spread_and_a_difference_with_both_kinds_of_luck():
    points = [point(1.0, seed, accuracy, 0.80) for seed, accuracy in ((1, 0.90), (2, 0.91), (3, 0.92), (4, 0.89))]
    study = study_of(points)
    assert study["kind"] == "seeds"
    summary = row_of(study, "summary", metric="accuracy", fraction=1.0, model="model")
    assert summary["mean"] == pytest.approx(0.905)
    assert summary["sd"] == pytest.approx(np.std([0.90, 0.91, 0.92, 0.89], ddof=1))
    assert summary["values"][1] == {"seed": 2, "value": pytest.approx(0.91)}
    row = row_of(study, "differences", metric="accuracy", seed=None)
    low, high = stats.t.interval(0.95, 3, loc=0.105, scale=summary["sd"] / 2)
    assert row["over_seeds"] == pytest.approx([low, high])
    assert row["over_cells"][0] < 0.105 < row["over_cells"][1]
    # Other test cells matter less to the mean of four models than to one of them.
    one = row_of(study, "differences", metric="accuracy", seed=1)
    assert row["over_cells"][1] - row["over_cells"][0] < one["ci_high"] - one["ci_low"]
    assert row["kind"] == "better" and row["above"] == 4
    assert "better in 4 of 4 seeds" in study["verdicts"][0]
    assert "from one pretrained model" in study["notes"][0] and "of so few seeds it is rough" in study["notes"][1]


def test_better_on_average_is_not_said_where_seeds_disagree():
    points = [point(1.0, seed, accuracy, 0.80) for seed, accuracy in ((1, 0.95), (2, 0.70), (3, 0.94), (4, 0.72))]
    row = row_of(study_of(points), "differences", metric="accuracy", seed=None)
    assert row["value"] == pytest.approx(0.0275) and row["kind"] == "open"


def test_a_collapsed_seed_is_named():
    points = [point(1.0, seed, accuracy, 0.80) for seed, accuracy in ((7, 0.88), (8, 0.26), (9, 0.90))]
    study = study_of(points)
    assert study["verdicts"][-1] == (
        "celltype: seed 8 collapsed at 100 % of the training cells: accuracy 0.260, hardly better than a constant guess (0.250); "
        "without it the mean is 0.890"
    )
    assert sentence_kind(study["verdicts"][-1]) == "worse"


def test_where_the_control_learned_nothing_either_no_seed_has_collapsed():
    points = [point(1.0, seed, 0.25, 0.26) for seed in (1, 2)]
    assert study_of(points, resamples=100)["collapsed"] == []


def test_seeds_with_test_cells_of_their_own_are_compared_by_seed_alone():
    points = [
        point(1.0, seed, 0.88 + seed / 100, 0.8, cells=[f"{seed}-{number}" for number in range(N)])
        for seed in (1, 2, 3)
    ]
    study = study_of(points, seeds_of="split", resamples=100)
    row = row_of(study, "differences", metric="accuracy", seed=None)
    assert row["over_cells"] is None and row["over_seeds"] is not None
    assert row_of(study, "summary", metric="accuracy", model="model")["ci_method"] == "student_t_resampled"
    assert "Nadeau and Bengio" in study["notes"][0]


def test_pages_show_every_point_and_the_missing_ones():
    points = [point(share, seed, 0.7 + 0.1 * share, 0.8) for share in (0.1, 1.0) for seed in (1, 2)]
    study = study_of(points, missing=["50 %, seed 1"], resamples=100)
    assert study["kind"] == "few_shot_and_seeds"
    names = {"model": "this model", "logistic_l2": "logistic regression", "majority": "commonest class"}
    about = {"dataset": "<cells> & more"}
    page = study_page(study, "cells: share", names, about)
    text = study_markdown(study, "cells: share", names, about)
    for entry in points:
        assert entry.name in page and entry.name in text
    assert "1 point is missing, because it failed: 50 %, seed 1" in page
    assert page.count("<svg") == 2 and "&lt;cells&gt; &amp; more" in page
    assert "://" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "10 % (100)" in study_text(study) and "logistic regression" in study_text(study)
