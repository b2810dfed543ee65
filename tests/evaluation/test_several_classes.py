"""Cells with several classes at once: probabilities of each class by itself, scored class by class, stored and read back."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bmfm_pipeline.evaluation import predict_loader
from bmfm_pipeline.evaluation.controls import run_controls
from bmfm_pipeline.evaluation.predictions import Predictions, read_predictions, write_predictions
from bmfm_pipeline.evaluation.several_classes import MOST_CLASSES, by_class, predictions_by_class

NAMES = ["T", "B", "old"]
TRUTH = np.array([[1, 0, 1], [0, 1, 0], [-100, -100, -100], [0, 0, 1]], dtype=np.float32)


class TwoHeads(torch.nn.Module):
    """Says T and old for an odd first token, else B; and the class that the first token names."""

    def __init__(self):
        super().__init__()
        heads = [("tags", True, NAMES), ("kind", False, ["x", "y"])]
        self.config = SimpleNamespace(
            model_labels=[
                SimpleNamespace(name=name, is_multilabel=several, output_size=len(names), class_names=names)
                for name, several, names in heads
            ]
        )

    def forward(self, input_ids, attention_mask, positions):
        odd = input_ids[:, 0, 0] % 2
        tags = torch.stack([2.0 * odd - 1, 1 - 2.0 * odd, 4.0 * odd - 2], dim=1)
        return SimpleNamespace(logits={"tags": tags, "kind": torch.nn.functional.one_hot(odd, 2).float()})


@pytest.fixture
def predicted() -> Predictions:
    ids = torch.tensor([[[1]], [[2]], [[3]], [[4]]])
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids[:, 0]),
        "cell_name": list("abcd"),
        "cell_index": torch.arange(4),
    }
    truth = {"tags": TRUTH, "kind": np.array([1, 0, 1, -100])}
    return predict_loader(TwoHeads(), [batch], {"tags": NAMES, "kind": ["x", "y"]}, truth=truth)


def test_each_class_has_a_probability_of_its_own(predicted):
    tags = predicted.labels["tags"]
    assert tags.predicted.tolist() == [[1, 0, 1], [0, 1, 0], [1, 0, 1], [0, 1, 0]]
    assert tags.probabilities[0] == pytest.approx(1 / (1 + np.exp([-1, 1, -2])))
    assert predicted.labels["kind"].probabilities.sum(axis=1) == pytest.approx(1)


def test_classes_are_scored_one_by_one_and_read_back(predicted, tmp_path):
    predicted.labels = predictions_by_class(predicted.labels, {"tags": TRUTH})
    assert list(predicted.labels) == ["tags: T", "tags: B", "tags: old", "kind"]
    write_predictions(tmp_path / "predictions.parquet", predicted)
    old = read_predictions(tmp_path / "predictions.parquet").labels["tags: old"]
    assert old.class_names == ["no", "yes"]
    assert old.truth.tolist() == [1, 0, -100, 1] and old.predicted.tolist() == [1, 0, 1, 0]
    assert old.known.tolist() == [True, True, False, True]


def test_controls_are_fitted_on_the_same_targets():
    random = np.random.default_rng(0)
    counts = random.poisson(2.0, (60, 8)).astype(np.float32)
    tags = np.stack([counts[:, 0] > 2, counts[:, 1] > 2], axis=1).astype(np.float32)
    tags[5] = -100
    labels, names = by_class({"tags": tags}, {"tags": ["a", "b"]})
    assert labels["tags: a"].dtype == np.int64 and labels["tags: a"][5] == -100
    store = SimpleNamespace(rows=lambda rows: counts[rows])
    found = run_controls(store, np.arange(40), np.arange(40, 60), labels, names, ["majority", "logistic_l2"])
    known = found["logistic_l2"]["tags: a"]
    assert (known.predicted == known.truth).mean() > 0.8


def test_silent_and_rare_ones_of_many_classes_are_left_out(caplog):
    random = np.random.default_rng(0)
    tags = (random.random((200, 80)) < np.linspace(0.5, 0.01, 80)).astype(np.float32)
    tags[:, 3] = -100
    labels, _ = by_class({"tags": tags}, {"tags": [f"c{number}" for number in range(80)]})
    assert len(labels) == MOST_CLASSES and "tags: c3" not in labels and "tags: c0" in labels
    assert "the 50 commonest of 79 classes are scored" in caplog.text
