"""Whether confidence can be believed: calibration error, risk and coverage, unknown cells, against plain loops and known cases."""

import numpy as np
import pytest
from scipy.special import softmax

from bmfm_pipeline.evaluation.calibration import (
    Unknown,
    best_area,
    calibration_of,
    fitted_to,
    rows_of_all,
    score_rows,
)
from bmfm_pipeline.evaluation.confidences import (
    Confidences,
    confidences_of,
    confidences_of_control,
    confidences_of_model,
    read_confidences,
    write_confidences,
)
from bmfm_pipeline.evaluation.predictions import LabelPredictions, Predictions
from bmfm_pipeline.evaluation.reliability import (
    AccuracyAtCoverage,
    CalibrationError,
    Mean,
    RiskCoverageArea,
    equal_bins,
)
from bmfm_pipeline.evaluation.resampling import resampled_together
from bmfm_pipeline.evaluation.rows import Settings
from bmfm_pipeline.training.temperature import coverage_points, pick_threshold, scaled_log_probabilities

CELLS = 400


def simulated(n: int = CELLS, temperature: float = 1.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(confidence, right): cells that are right as often as softmax at `temperature` says, confident as it says at 1."""
    generator = np.random.default_rng(seed)
    odds = generator.gamma(2.0, 1.0, n)
    return 1 / (1 + np.exp(-odds)), generator.random(n) < 1 / (1 + np.exp(-odds / temperature))


def of(confidence, right) -> Confidences:
    everyone = np.ones(len(right), dtype=bool)
    return Confidences(confidence, right, np.where(right, 0.1, 2.0), np.where(right, 0.0, 2.0), everyone)


def test_the_error_is_that_of_a_plain_loop_over_bins_of_equal_size():
    confidence, right = simulated()
    order = np.argsort(confidence)
    total = 0.0
    for part in np.array_split(order, 15):
        total += len(part) * abs(right[part].mean() - confidence[part].mean())
    measured = CalibrationError(confidence, right)
    # 400 cells do not divide by 15: a cell more or less in a bin.
    assert measured.value() == pytest.approx(total / CELLS, abs=0.004)
    sizes = [point["n"] for point in measured.bins()]
    assert len(sizes) == 15 and sum(sizes) == CELLS and max(sizes) - min(sizes) <= 1
    by_hand = sum(point["n"] * abs(point["accuracy"] - point["confidence"]) for point in measured.bins()) / CELLS
    assert measured.value() == pytest.approx(by_hand, abs=1e-12)


@pytest.mark.parametrize(
    ("confidence", "right", "error"),
    [
        (np.full(100, 0.9), np.arange(100) < 60, 0.3),
        (np.full(100, 1.0), np.ones(100, dtype=bool), 0.0),
        (np.full(100, 0.75), np.arange(100) < 75, 0.0),
        (np.repeat([0.6, 0.9], 50), np.arange(100) % 50 < 40, 0.5 * 0.2 + 0.5 * 0.1),
        (np.full(3, 0.8), np.array([True, True, False]), 0.8 - 2 / 3),
    ],
)
def test_known_errors(confidence, right, error):
    assert CalibrationError(confidence, right).value() == pytest.approx(error, abs=1e-12)


def test_equally_sure_cells_are_one_bin_whatever_their_order():
    confidence, right = np.repeat([0.5, 0.7, 0.9], [200, 1, 99]), np.random.default_rng(0).random(300) < 0.7
    shuffled = np.random.default_rng(1).permutation(300)
    assert (
        CalibrationError(confidence, right).value() == CalibrationError(confidence[shuffled], right[shuffled]).value()
    )
    assert all(len(np.unique(equal_bins(confidence)[confidence == value])) == 1 for value in (0.5, 0.9))
    assert [equal_bins(np.random.default_rng(0).random(n)).max() + 1 for n in (1, 39, 40, 140, 5000)] == [
        1,
        1,
        2,
        7,
        15,
    ]


@pytest.mark.parametrize("temperature", [1.0, 1.6, 3.0])
def test_the_interval_holds_the_error_of_all_cells(temperature):
    many, _ = simulated(400_000, temperature, seed=9)
    odds = np.log(many / (1 - many))
    expected = np.abs(1 / (1 + np.exp(-odds / temperature)) - many).mean()
    held = []
    for seed in range(60):
        entry = rows(*simulated(CELLS, temperature, seed), resamples=100)["ece"]
        assert entry["ci_low"] <= entry["value"] <= entry["ci_high"]
        held.append(entry["ci_low"] <= expected <= entry["ci_high"])
    assert np.mean(held) >= 0.88  # 0.95 less two and a half times the error of 60 simulations


def rows(confidence, right, **settings) -> dict[str, dict]:
    found = score_rows(of(confidence, right), "kind", "model", Settings(**settings))
    return {row["metric"]: row for row in found}


def test_exact_confidences_show_the_error_that_is_expected_of_them():
    expected, most = CalibrationError(*simulated(seed=3)).if_calibrated(0.975, seed=0)
    found = [CalibrationError(*simulated(seed=seed)).value() for seed in range(300)]
    assert np.mean(found) == pytest.approx(expected, rel=0.05)
    assert 0.95 <= np.mean(np.array(found) <= most) <= 1.0


def test_the_area_under_the_risk_coverage_curve_is_that_of_a_plain_loop():
    confidence, right = simulated(temperature=2.0)
    confidence = confidence.round(2)  # with ties
    risks = []
    for threshold in confidence:
        kept = confidence >= threshold
        risks.append((~right[kept]).mean())
    area = RiskCoverageArea(confidence, right)
    assert area.value() == pytest.approx(np.mean(risks), abs=1e-12)
    weights = np.random.default_rng(0).multinomial(CELLS, np.full(CELLS, 1 / CELLS), size=3)
    for row, value in zip(weights, area.values(weights.astype(float)), strict=True):
        again = np.repeat(np.arange(CELLS), row)
        assert RiskCoverageArea(confidence[again], right[again]).value() == pytest.approx(value, abs=1e-12)
    assert RiskCoverageArea(np.full(CELLS, 0.5), right).value() == pytest.approx((~right).mean())
    assert RiskCoverageArea(right.astype(float) + np.linspace(0, 0.1, CELLS), right).value() == pytest.approx(
        best_area(right)
    )


def test_accuracy_of_the_surest_cells():
    confidence, right = simulated(temperature=2.0)
    surest = np.argsort(-confidence)[:320]
    assert AccuracyAtCoverage(confidence, right, 0.8).value() == pytest.approx(right[surest].mean())
    assert AccuracyAtCoverage(confidence, right, 1.0).value() == pytest.approx(right.mean())
    weights = np.random.default_rng(0).multinomial(CELLS, np.full(CELLS, 1 / CELLS), size=2).astype(float)
    for row, value in zip(weights, AccuracyAtCoverage(confidence, right, 0.5).values(weights), strict=True):
        again = np.repeat(np.arange(CELLS), row.astype(int))
        drawn = AccuracyAtCoverage(confidence[again], right[again], 0.5)
        assert drawn.value() == pytest.approx(value, abs=1e-12)


def test_all_are_measured_on_the_same_resamples_and_groups_stay_together():
    confidence, right = simulated()
    groups = np.repeat(np.arange(8), CELLS // 8)
    numbers = groups.astype(float)
    found = resampled_together([Mean(numbers), RiskCoverageArea(confidence, right)], 20, 0, groups)
    assert np.allclose(found[0] * 8, np.rint(found[0] * 8))  # whole groups
    wide = rows(confidence, right, groups=np.zeros(CELLS, dtype=int))
    assert all(row["ci_low"] is None and row["ci_method"] == "none" for row in wide.values())


def test_losses_are_those_of_scikit_learn_and_a_lost_probability_is_not_infinite():
    from sklearn.metrics import brier_score_loss, log_loss

    generator = np.random.default_rng(0)
    logits, truth = generator.normal(size=(200, 4)) * 3, generator.integers(0, 4, 200)
    found = confidences_of(scaled_log_probabilities(logits, 1.7), truth, logits.argmax(axis=1))
    probabilities = softmax(logits / 1.7, axis=1)
    assert found.loss.mean() == pytest.approx(log_loss(truth, probabilities))
    assert found.brier == pytest.approx(((probabilities - np.eye(4)[truth]) ** 2).sum(axis=1))
    yes = (truth == 1).astype(int)
    two = np.stack([np.zeros(200), logits[:, 0]], axis=1)
    binary = confidences_of(scaled_log_probabilities(two), yes, (logits[:, 0] > 0).astype(int))
    # Of two classes both are counted, as Brier did.
    assert binary.brier.mean() == pytest.approx(2 * brier_score_loss(yes, softmax(two, axis=1)[:, 1]))
    never = LabelPredictions(np.array([0, 1]), np.array([0, 0]), np.array([[1.0, 0.0], [1.0, 0.0]]), ["a", "b"])
    assert confidences_of_control(never).loss == pytest.approx([0, -np.log(5e-6)])
    assert confidences_of_control(LabelPredictions(np.zeros(2), np.zeros(2))) is None


@pytest.fixture
def stored(tmp_path) -> tuple[Predictions, dict]:
    generator = np.random.default_rng(0)
    kind, tags = generator.normal(size=(60, 3)) * 3, generator.normal(size=(60, 2)) * 3
    truth = np.where(np.arange(60) % 7 == 0, -100, generator.integers(0, 3, 60))
    several = (generator.random((60, 2)) < 0.5).astype(np.float32)
    labels = {
        "kind": LabelPredictions(truth, kind.argmax(axis=1), softmax(kind, axis=1), ["a", "b", "c"]),
        "tags": LabelPredictions(several, (tags > 0).astype(int), 1 / (1 + np.exp(-tags)), ["x", "y"]),
    }
    predictions = Predictions(
        [f"c{row}" for row in range(60)], labels, logits={"kind": kind.astype(np.float32), "tags": tags}
    )
    found = confidences_of_model(predictions, {"kind": 2.0, "tags": 3.0}, {"tags": several})
    write_confidences(tmp_path, predictions.cells, found)
    return predictions, read_confidences(tmp_path)


def test_confidences_are_stored_before_and_after_temperature_and_each_class_of_several_is_a_target(stored):
    predictions, found = stored
    assert list(found) == ["kind", "tags: x", "tags: y"]
    label = predictions.labels["kind"]
    after, before = found["kind"]["calibrated"], found["kind"]["uncalibrated"]
    assert after.known.tolist() == (label.truth >= 0).tolist()
    assert before.confidence == pytest.approx(label.probabilities.max(axis=1), abs=1e-6)
    assert after.confidence == pytest.approx(softmax(predictions.logits["kind"] / 2, axis=1).max(axis=1), abs=1e-6)
    assert (after.right == before.right).all() and np.isnan(after.loss[~after.known]).all()
    yes = 1 / (1 + np.exp(-predictions.logits["tags"][:, 1] / 3))
    assert found["tags: y"]["calibrated"].confidence == pytest.approx(np.maximum(yes, 1 - yes), abs=1e-6)


def test_metric_rows_of_the_model_and_of_controls_with_probabilities(stored):
    predictions, found = stored
    truth = predictions.labels["kind"].truth
    shares = LabelPredictions(truth, np.zeros(60, dtype=int), np.tile([0.5, 0.3, 0.2], (60, 1)), ["a", "b", "c"])
    without = LabelPredictions(truth, np.zeros(60, dtype=int), None, ["a", "b", "c"])
    controls = {"majority": {"kind": shares}, "knn": {"kind": without}}
    fitted = {"kind": {"temperature": 2.0, "n": 99}, "tags": {"temperature": 3.0, "n": 99}}
    settings = Settings(resamples=50, split_hash="abc")
    table = rows_of_all(found, controls, fitted, settings)
    assert [(row["target"], row["model"]) for row in table[::3]] == [
        ("kind", "model"), ("kind", "majority"), ("tags: x", "model"), ("tags: y", "model"),
    ]  # fmt: skip
    assert [row["metric"] for row in table[:3]] == ["ece", "brier", "nll"]
    assert all(row["n"] == int((truth >= 0).sum()) and row["split_hash"] == "abc" for row in table[:6])
    assert all(row["ci_low"] <= row["value"] <= row["ci_high"] for row in table)
    assert "temperature 2" in table[0]["note"] and "temperature" not in table[3]["note"]


def test_what_calibration_json_says(stored):
    _, found = stored
    fitted = {"temperature": 2.0, "n": 99, "coverage": coverage_points(*simulated(300, seed=5))}
    settings = Settings(resamples=50)
    entry = calibration_of(found["kind"], fitted, settings, Unknown("auto", 0.9))
    cells = found["kind"]["calibrated"].at(np.flatnonzero(found["kind"]["calibrated"].known))
    assert (entry["temperature"], entry["n_dev"]) == (2.0, 99) and "encoder_share" not in entry
    weighed = calibration_of(found["kind"], {**fitted, "encoder_share": 0.35}, settings, Unknown("auto", 0.9))
    assert weighed["encoder_share"] == 0.35
    assert entry["aurc"]["best"] <= entry["aurc"]["value"] and entry["aurc"]["chance"] == (~cells.right).mean()
    assert entry["risk_coverage"][-1]["risk"] == pytest.approx((~cells.right).mean())
    assert [part["coverage"] for part in entry["accuracy_at_coverage"]] == [0.8, 0.9]
    unknown, threshold = entry["unknown"], pick_threshold(fitted["coverage"], 0.9)["threshold"]
    kept = cells.confidence >= threshold
    assert unknown["threshold"] == threshold and unknown["share"] == pytest.approx(1 - kept.mean())
    assert unknown["accuracy_of_known"] == pytest.approx(cells.right[kept].mean())
    assert unknown["accuracy_of_unknown"] == pytest.approx(cells.right[~kept].mean())
    assert "points off on average" in entry["sentence"] and "note" not in entry

    asked = calibration_of(found["kind"], {}, settings, Unknown(0.999))
    assert asked["unknown"]["n_known"] == (cells.confidence >= 0.999).sum()
    assert "no calibration.json" in asked["note"]
    assert calibration_of(found["kind"], {}, settings, Unknown(None))["unknown"]["threshold"] is None
    assert "no confidence" in calibration_of(found["kind"], {}, settings, Unknown())["unknown"]["note"]
    nobody = {way: of(np.full(3, 0.5), np.zeros(3, dtype=bool)) for way in ("calibrated", "uncalibrated")}
    for each in nobody.values():
        each.known[:] = False
    assert calibration_of(nobody, {}, settings, Unknown()) == {}


def test_a_class_of_several_has_the_temperature_of_its_column_but_not_its_threshold():
    fitted = {"tags": {"temperature": 3.0, "n": 5, "coverage": [1], "unknown": {}}}
    assert fitted_to("tags: x", fitted) == {"temperature": 3.0, "n": 5}
    assert fitted_to("tags", fitted) == fitted["tags"] and fitted_to("kind", fitted) == {}
