"""Temperature scaling: what is fitted to logits, what it leaves alone, and which confidence reaches an accuracy."""

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_softmax, softmax
from training_cases import StopAtLook, run_config

from bmfm_pipeline.training.calibrating import calibrate
from bmfm_pipeline.training.temperature import (
    FEWEST_CELLS,
    confidence_of,
    coverage_points,
    fit_temperature,
    pick_threshold,
    read_calibration,
    scaled_log_probabilities,
    scaled_probabilities,
)


def drawn(n: int, temperature: float, classes: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits that are `temperature` times too large for the labels drawn from them."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(n, classes)) * 2
    truth = (softmax(logits, axis=1).cumsum(axis=1) > generator.random((n, 1))).argmax(axis=1)
    return (logits * temperature).astype(np.float32), truth


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7, 4.0])
def test_the_temperature_that_logits_were_made_with_is_found(temperature):
    found = fit_temperature(*drawn(20_000, temperature))
    assert found["temperature"] == pytest.approx(temperature, rel=0.03)
    assert found["n"] == 20_000 and "note" not in found


def test_it_is_the_one_of_the_highest_likelihood():
    logits, truth = drawn(300, 2.5, seed=3)
    found = fit_temperature(logits, truth)

    def nll(temperature: float) -> float:
        return -log_softmax(logits / temperature, axis=1)[np.arange(300), truth].mean()

    best = minimize_scalar(nll, bounds=(0.1, 10), method="bounded")
    assert found["temperature"] == pytest.approx(best.x, rel=1e-3)
    assert (found["nll_before"], found["nll_after"]) == pytest.approx((nll(1.0), best.fun), rel=1e-6)
    assert found["nll_after"] <= found["nll_before"]


def test_several_classes_a_cell_share_one_temperature_on_the_sigmoid():
    generator = np.random.default_rng(1)
    logits = generator.normal(size=(8000, 4)) * 2
    truth = (generator.random(logits.shape) < expit(logits)).astype(np.float32)
    truth[:100] = -100
    found = fit_temperature(logits * 3, truth, several=True)
    assert found["temperature"] == pytest.approx(3, rel=0.05) and found["n"] == 7900
    assert scaled_probabilities(logits * 3, 3.0, several=True) == pytest.approx(expit(logits))


def test_cells_without_a_label_do_not_take_part():
    logits, truth = drawn(500, 2.0)
    more = np.concatenate([logits, np.full((50, 6), 30.0)])
    unknown = np.concatenate([truth, np.full(50, -100)])
    assert fit_temperature(more, unknown) == fit_temperature(logits, truth)


@pytest.mark.parametrize(
    ("logits", "truth", "note"),
    [
        (np.zeros((0, 3)), np.zeros(0, dtype=int), "no dev cell has a known label"),
        (np.zeros((9, 3)), np.full(9, -100), "no dev cell has a known label"),
        (*drawn(FEWEST_CELLS - 1, 2.0), f"{FEWEST_CELLS - 1} dev cells are too few"),
        (np.zeros((90, 1)), np.zeros(90, dtype=int), "there is but one class"),
        (np.full((90, 2), np.nan), np.zeros(90, dtype=int), "returns nan"),
        (np.eye(2)[[0, 1] * 50] * 20, np.array([0, 1] * 50), "no dev cell has a wrong label"),
    ],
)
def test_where_cells_cannot_tell_a_temperature_it_is_one_and_a_note_says_why(logits, truth, note):
    found = fit_temperature(logits, truth)
    assert found["temperature"] == 1 and found["nll_before"] == found["nll_after"]
    assert note in found["note"] and "not calibrated" in found["note"]


def test_a_model_that_knows_nothing_is_made_as_unsure_as_can_be():
    logits, truth = drawn(400, 1.0)
    found = fit_temperature(-logits, truth)
    assert found["temperature"] == pytest.approx(20, rel=1e-3) and "does not help" in found["note"]


def test_labels_that_are_always_right_are_not_made_certain():
    logits = np.eye(3)[np.arange(60) % 3] * 2.0
    found = fit_temperature(logits, np.arange(60) % 3)
    sure = scaled_probabilities(logits, found["temperature"]).max()
    assert 0.9 < sure < 0.999 and found["nll_after"] < found["nll_before"]


def test_no_temperature_changes_a_label_or_overflows():
    logits = np.random.default_rng(2).normal(size=(400, 5)) * np.logspace(-3, 3, 400)[:, None]
    for temperature in (0.05, 0.7, 1.0, 3.0, 20.0):
        found = scaled_probabilities(logits, temperature)
        assert (found.argmax(axis=1) == logits.argmax(axis=1)).all()
        assert found.sum(axis=1) == pytest.approx(1)
        assert np.isfinite(scaled_log_probabilities(logits, temperature)).all()
        several = scaled_probabilities(logits, temperature, several=True)
        assert ((several > 0.5) == (logits > 0))[np.abs(logits) > 1e-9].all()
    assert scaled_probabilities(logits) == pytest.approx(softmax(logits, axis=1))


def test_coverage_points_count_the_cells_that_are_at_least_as_sure():
    confidence, right = np.array([0.9, 0.6, 0.9, 0.8, 0.5]), np.array([True, False, False, True, True])
    points = coverage_points(confidence, right)
    assert [(point["threshold"], point["n"]) for point in points] == [(0.9, 2), (0.8, 3), (0.6, 4), (0.5, 5)]
    assert [point["risk"] for point in points] == pytest.approx([1 / 2, 1 / 3, 2 / 4, 2 / 5])
    generator = np.random.default_rng(0)
    confidence, right = generator.random(5000), generator.random(5000) < 0.8
    points = coverage_points(confidence, right)
    assert len(points) == 200 and points[-1]["n"] == 5000
    for point in points[::20]:
        kept = confidence >= point["threshold"]
        assert (point["n"], point["risk"]) == (kept.sum(), pytest.approx(1 - right[kept].mean()))


def test_the_threshold_is_the_lowest_that_reaches_the_accuracy_with_one_more_wrong_cell():
    right = np.array([True] * 60 + [False, True] * 20)
    confidence = np.linspace(0.99, 0.4, 100)
    found = pick_threshold(coverage_points(confidence, right), 0.95)
    kept = confidence >= found["threshold"]
    assert ((~right[kept]).sum() + 1) / (kept.sum() + 1) <= 0.05
    assert found["share"] == pytest.approx(1 - kept.mean()) and found["accuracy"] == pytest.approx(right[kept].mean())
    lower = confidence >= confidence[kept.sum() + 1]
    assert ((~right[lower]).sum() + 1) / (lower.sum() + 1) > 0.05
    assert pick_threshold(coverage_points(confidence, right), 0.5)["threshold"] == 0
    none = pick_threshold(coverage_points(confidence, right), 0.999)
    assert none["threshold"] is None and "at best 100.0%" in none["note"]
    assert pick_threshold([], 0.9)["threshold"] is None


def test_a_fine_tuning_ends_with_what_its_dev_cells_say_of_the_published_weights(cases):
    spec = cases.spec(stage="finetune", task__max_steps=4, task__max_epochs=None)
    summary, events = cases.train(spec)
    folder = cases.folder / "run" / "model"
    found = read_calibration(folder)["celltype"]
    assert (found["n"], summary["dev_cells"]) == (30, 30)
    assert found["coverage"][-1]["n"] == 30 and set(found["unknown"]) >= {"threshold", "share", "accuracy"}
    assert any("celltype: temperature" in event.get("message", "") for event in events)

    counted = StopAtLook()
    cases.train(spec, counted)
    # The last look is before the last batch of dev cells: all else is done, and going on does no more than that.
    assert cases.train(spec, StopAtLook(counted.looks - 1))[0] is None
    assert (folder / "model.safetensors").exists() and not (folder / "calibration.json").exists()
    again, _ = cases.train(spec)
    assert again["steps"] == 4 and read_calibration(folder)["celltype"] == found


def test_a_model_without_labels_has_nothing_to_calibrate(tmp_path):
    run = run_config("pretrain")
    assert calibrate(run, None, tmp_path, lambda: True, print) == read_calibration(tmp_path) == {}


def test_of_several_classes_a_cell_the_least_sure_answer_counts():
    several = np.array([[0.9, 0.2, 0.6]])
    assert confidence_of(several, several=True) == pytest.approx([0.6]) and confidence_of(several) == pytest.approx(
        [0.9]
    )
