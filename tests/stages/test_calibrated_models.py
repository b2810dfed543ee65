"""Calibration from end to end on real cells: fitted when training ends, published with the model, measured on test cells, applied in prediction."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.special import log_softmax, softmax

from bmfm_pipeline.errors import ConfigError
from bmfm_pipeline.stages.predict import Asked, predict_file
from bmfm_pipeline.stages.predicting import Predictor
from bmfm_pipeline.stages.predicting.rows import Answers
from bmfm_pipeline.storage import load_artefact, read_json, write_json_atomic

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def fitted(finished) -> dict:
    return read_json(Path(finished.artefacts["finetune"]) / "calibration.json")["celltype"]


@pytest.fixture(scope="module")
def evaluated(finished) -> Path:
    return Path(finished.artefacts["evaluate"])


def middle_of(fitted: dict) -> float:
    """A confidence that half of the dev cells exceed, and none has."""
    half = len(fitted["coverage"]) // 2
    return sum(point["threshold"] for point in fitted["coverage"][half : half + 2]) / 2


@pytest.fixture(scope="module")
def predicted(finished, fitted, tmp_path_factory) -> Path:
    """Every cell, those that are less sure than half of the dev cells unknown."""
    output = tmp_path_factory.mktemp("calibrated")
    middle = middle_of(fitted)
    summary = predict_file(
        finished.artefacts["finetune"], str(finished.file), output, workspace=finished.workspace,
        asked=Asked(unknown_below=middle, tables=("predictions", "probabilities", "logits")),
    )  # fmt: skip
    said = pd.read_csv(output / "predictions.csv", index_col=0)["celltype"]
    assert summary["unknown"] == {"celltype": {"below": middle, "cells": int((said == "unknown").sum())}}
    return output


def test_the_model_carries_the_temperature_of_its_dev_cells(finished, fitted):
    artefact = load_artefact(finished.artefacts["finetune"])
    assert "calibration.json" in artefact.files
    assert "calibration.json" not in load_artefact(finished.artefacts["pretrain"]).files
    assert fitted["n"] == artefact.summary["dev_cells"] == 56
    assert fitted["temperature"] != 1 and fitted["nll_after"] <= fitted["nll_before"]
    card = (Path(finished.artefacts["finetune"]) / "README.md").read_text()
    assert f"at temperature {fitted['temperature']:.3f}, fitted to 56 validation cells" in card


def test_the_test_cells_are_measured_at_that_temperature(evaluated, fitted, predicted):
    entry = read_json(evaluated / "calibration.json")["celltype"]
    assert (entry["temperature"], entry["n_dev"]) == (fitted["temperature"], 56)
    stored = pd.read_parquet(evaluated / "predictions.parquet").set_index("cell")
    logits = pd.read_csv(predicted / "logits.csv", index_col=0).loc[stored.index]
    classes = logits.columns.str.removeprefix("celltype_").tolist()
    truth = np.array([classes.index(name) for name in stored["celltype"]])
    for ending, temperature in (("", fitted["temperature"]), ("_uncalibrated", 1.0)):
        own = log_softmax(logits.to_numpy() / temperature, axis=1)
        squares = ((np.exp(own) - np.eye(len(classes))[truth]) ** 2).sum(axis=1)
        assert entry[f"nll{ending}"]["value"] == pytest.approx(-own[np.arange(140), truth].mean(), abs=1e-4)
        assert entry[f"brier{ending}"]["value"] == pytest.approx(squares.mean(), abs=1e-4)
    # As far as float16 goes, the stored probabilities say the same.
    stretched = np.stack(stored["celltype_probabilities"]).astype(float) ** (1 / fitted["temperature"])
    confidence = (stretched / stretched.sum(axis=1, keepdims=True)).max(axis=1)
    table = pd.read_parquet(evaluated / "confidences.parquet")
    assert table["cell"].tolist() == stored.index.tolist() and set(table["target"]) == {"celltype"}
    assert np.abs(table["confidence"] - confidence).max() < 2e-3
    assert (table["right"] == (stored["celltype"] == stored["celltype_predicted"]).to_numpy()).all()
    assert sum(point["n"] for point in entry["bins"]) == 140 and len(entry["bins"]) == 7


def test_metrics_have_the_scores_of_model_and_controls_and_the_card_a_sentence(evaluated):
    rows = [row for row in read_json(evaluated / "metrics.json") if row["metric"] in ("ece", "brier", "nll")]
    assert {"model", "majority", "logistic_l2"} <= {row["model"] for row in rows}
    for row in rows:
        assert row["ci_low"] <= row["value"] <= row["ci_high"] and row["n"] == 140
        if row["model"] == "model":
            assert row["value"] == read_json(evaluated / "calibration.json")["celltype"][row["metric"]]["value"]
    assert "points off on average" in (evaluated / "README.md").read_text()


def test_prediction_applies_the_temperature_and_calls_unsure_cells_unknown(fitted, predicted):
    labels, shares, logits = (
        pd.read_csv(predicted / f"{name}.csv", index_col=0) for name in ("predictions", "probabilities", "logits")
    )
    assert list(labels.columns) == ["celltype", "reason", "celltype_confidence"]
    assert np.abs(softmax(logits.to_numpy() / fitted["temperature"], axis=1) - shares.to_numpy()).max() < 1e-5
    assert (shares.to_numpy().argmax(axis=1) == logits.to_numpy().argmax(axis=1)).all()
    assert labels["celltype_confidence"].to_numpy() == pytest.approx(shares.max(axis=1).to_numpy(), abs=1e-5)
    middle = middle_of(fitted)
    unknown = labels["celltype"] == "unknown"
    assert (unknown == (labels["celltype_confidence"] < middle)).all() and 100 < unknown.sum() < 600
    named = shares.idxmax(axis=1).str.removeprefix("celltype_")
    assert (labels["celltype"][~unknown] == named[~unknown]).all()


def test_a_threshold_that_dev_cells_cannot_tell_is_asked_for_and_one_that_they_can_is_taken(finished, fitted, tmp_path):
    # This model is right too seldom, however sure it is.
    assert fitted["unknown"]["threshold"] is None
    folder = shutil.copytree(finished.artefacts["finetune"], tmp_path / "model")
    with pytest.raises(ConfigError, match=r"no threshold is known for 'celltype'.*give a number"):
        Answers(Predictor.open(folder), "auto")
    write_json_atomic(folder / "calibration.json", {"celltype": {**fitted, "unknown": {"threshold": 0.3}}})
    assert Answers(Predictor.open(folder), "auto").thresholds == {"celltype": 0.3}
    (folder / "calibration.json").unlink()
    assert Answers(Predictor.open(folder), 0.4).temperatures == {}
    with pytest.raises(ConfigError, match="carries no calibration"):
        Answers(Predictor.open(folder), "auto")
