"""What the study of several splits says of its results: scores by seed, differences pooled over seeds and clustered by cell."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from bmfm_pipeline.evaluation.verdicts import mcnemar

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def study():
    sys.path.insert(0, str(FOLDER))
    try:
        spec = importlib.util.spec_from_file_location("accuracy_study", FOLDER / "accuracy_study.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(FOLDER))
    return module


def result(arm: str, seed: int, wrong: dict[str, int], n: int = 200) -> dict:
    """Of one arm and seed, with so many wrong cells by part of the model or control."""
    generator = np.random.default_rng([seed, 9])
    cells = generator.permutation(400)[:n]
    truth = cells % 4
    guesses = {name: np.where(np.arange(n) < count, (truth + 1) % 4, truth) for name, count in wrong.items()}
    parts = {name: guess.tolist() for name, guess in guesses.items() if not name.startswith("logistic")}
    controls = {name: guess.tolist() for name, guess in guesses.items() if name.startswith("logistic")}
    return {
        "arm": arm, "seed": seed, "settings": [], "cells": [f"cell-{cell}" for cell in cells], "truth": truth.tolist(),
        "predicted": parts, "controls": controls, "cpu_s": {"preprocess": 5.0, "pretrain": 10.0, "finetune": 20.0, "evaluate": 3.0},
    }  # fmt: skip


def two_seeds() -> list[dict]:
    pretrained = {"whole": 10, "encoder": 30, "linear": 14, "logistic_l2": 30, "logistic_sqrt": 14}
    scratch = {"whole": 16, "encoder": 60, "linear": 14, "logistic_l2": 30, "logistic_sqrt": 14}
    return [
        result(arm, seed, wrong) for seed in (0, 1) for arm, wrong in (("pretrained", pretrained), ("scratch", scratch))
    ]


def test_scores_differences_and_intervals(study):
    found = study.summarised(two_seeds(), resamples=500)
    assert found["seeds"] == [0, 1] and found["test_predictions"] == 400 and found["different_cells"] < 400
    assert found["by_seed"]["pretrained.whole"]["accuracy"] == [0.95, 0.95]
    assert found["mean"]["logistic_l2"]["accuracy"] == pytest.approx(0.85)
    against = found["points_and_95_percent_intervals"]["pretrained.whole - logistic_l2"]
    value, low, high = against["accuracy"]
    assert value == pytest.approx(10.0) and 5 < low < 10 < high < 15
    assert against["f1"][0] > 0 and all(p < 1e-4 for p in against["mcnemar_p_by_seed"])
    same = found["points_and_95_percent_intervals"]["pretrained.whole - pretrained.linear"]["accuracy"]
    assert same[0] == pytest.approx(2.0) and same[1] >= 0
    assert found["cpu_s_a_seed"] == {"pretrained": 30.0, "scratch": 30.0}
    json.dumps(found)


def test_p_values_are_those_of_single_seeds(study):
    rows = two_seeds()
    found = study.summarised(rows, resamples=50)["points_and_95_percent_intervals"]
    truth, ours, theirs = (
        np.array(rows[0][key]) if key == "truth" else key for key in ("truth", "whole", "logistic_l2")
    )
    expected = mcnemar(truth, np.array(rows[0]["predicted"][ours]), np.array(rows[0]["controls"][theirs]))
    assert found["pretrained.whole - logistic_l2"]["mcnemar_p_by_seed"][0] == pytest.approx(expected, rel=0.01)


def test_arms_of_one_seed_must_have_been_tested_on_the_same_cells(study):
    rows = two_seeds()
    rows[1]["cells"] = rows[1]["cells"][::-1]
    with pytest.raises(SystemExit, match="different cells"):
        study.summarised(rows)


def test_without_a_file_it_says_what_it_needs(study, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["accuracy_study.py"])
    study.main()
    assert json.loads(capsys.readouterr().out)["skipped"] == "name an h5ad file"
