"""confused.json: the pairs a model confuses most, and genes with means and effect sizes computed by hand beside it."""

import numpy as np
import pytest
from scipy import sparse

from bmfm_pipeline.evaluation import confused
from bmfm_pipeline.evaluation.confused import confused_pairs, describe_confused
from bmfm_pipeline.evaluation.predictions import LabelPredictions

NAMES = ["B", "T", "NK"]
GENES = ["MS4A1", "CD3D", "NKG7", "ACTB"]


@pytest.fixture
def cells():
    """30 training and 30 test cells, ten of each class; four of the B cells in the test have the values of T cells, and are called T."""
    generator = np.random.default_rng(1)
    classes = np.tile(np.repeat([0, 1, 2], 10), 2)
    values = generator.poisson(1, (60, 4)).astype(np.float64)
    values[classes == 0, 0] += 6
    values[classes == 1, 1] += 4
    values[classes == 2, 2] += 5
    predicted = classes[30:].copy()
    predicted[:4] = 1
    values[30:34] = values[10:14]
    predicted[25] = 0
    return sparse.csr_matrix(values), classes, LabelPredictions(classes[30:], predicted, None, NAMES)


def described(cells, **options):
    values, classes, predictions = cells
    return describe_confused(
        {"celltype": predictions}, np.arange(30, 60), {"celltype": classes}, np.arange(30), lambda rows: values[rows], GENES, **options
    )  # fmt: skip


def test_pairs_come_by_their_cells_with_their_share_of_the_class(cells):
    pairs = confused_pairs(cells[2])
    assert pairs[0] == {"true": "B", "predicted": "T", "cells": 4, "of": 10, "share": 0.4}
    assert [(pair["true"], pair["predicted"]) for pair in pairs] == [("B", "T"), ("NK", "B")]
    assert len(confused_pairs(cells[2], most=1)) == 1


def test_cells_without_a_known_class_are_no_confusion():
    found = confused_pairs(LabelPredictions(np.array([-100, 0]), np.array([1, 0]), None, NAMES))
    assert found == []


def test_genes_have_the_means_and_effects_of_their_cells(cells):
    values, classes, predictions = cells
    pair = described(cells)["labels"]["celltype"][0]
    dense = values.toarray()
    own, other = dense[:30][classes[:30] == 0], dense[:30][classes[:30] == 1]
    differences = other.mean(axis=0) - own.mean(axis=0)
    order = np.argsort(-np.abs(differences))
    assert [gene["gene"] for gene in pair["genes_of_classes"]] == [GENES[index] for index in order]
    first, index = pair["genes_of_classes"][0], order[0]
    pooled = np.sqrt((own[:, index].var(ddof=1) + other[:, index].var(ddof=1)) / 2)
    assert first["difference"] == pytest.approx(differences[index])
    assert first["effect"] == pytest.approx(differences[index] / pooled)
    assert first["mean_confused"] == pytest.approx(dense[30:34, index].mean())
    assert pair["training_cells"] == {"true": 10, "predicted": 10}
    right = dense[30:][(classes[30:] == 0) & (predictions.predicted == 0)]
    gene = pair["genes_of_confused"][0]
    at = GENES.index(gene["gene"])
    assert pair["right_cells"] == 6 and gene["mean_right"] == pytest.approx(right[:, at].mean())
    assert gene["difference"] == pytest.approx(dense[30:34, at].mean() - right[:, at].mean())


def test_confused_cells_that_look_like_the_other_class_lie_near_it(cells):
    pairs = described(cells)["labels"]["celltype"]
    assert pairs[0]["position"] > 0.8
    assert pairs[1]["position"] < 0.3, "the NK cell called B has the values of an NK cell"
    assert pairs[1]["genes_of_confused"] == [], "one cell says nothing about genes"


def test_chunks_and_many_cells_do_not_change_the_numbers(cells, monkeypatch):
    whole = described(cells)
    monkeypatch.setattr(confused, "CHUNK", 7)
    in_chunks = described(cells)
    for one, other in zip(whole["labels"]["celltype"], in_chunks["labels"]["celltype"], strict=True):
        assert one["position"] == pytest.approx(other["position"])
        assert [gene["gene"] for gene in one["genes_of_classes"]] == [
            gene["gene"] for gene in other["genes_of_classes"]
        ]
    monkeypatch.setattr(confused, "MOST_CELLS", 5)
    few = described(cells, seed=3)["labels"]["celltype"][0]
    assert few["training_cells"] == {"true": 5, "predicted": 5}
    assert few == described(cells, seed=3)["labels"]["celltype"][0]


def test_numbers_and_perfect_predictions_have_no_pairs(cells):
    values, classes, _ = cells
    perfect = LabelPredictions(classes[30:], classes[30:], None, NAMES)
    ages = LabelPredictions(np.linspace(0, 1, 30), np.zeros(30))
    labels = {"celltype": perfect, "age": ages}
    found = describe_confused(
        labels, np.arange(30, 60), {"celltype": classes}, np.arange(30), lambda rows: values[rows], GENES
    )
    assert found["labels"] == {}
