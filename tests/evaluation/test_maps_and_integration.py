"""Maps of embeddings and the scores of how batches mix, on real cells; numbers of reference are those of scib-metrics 0.5.10."""

import json

import numpy as np
import pytest

from bmfm_pipeline.errors import DataError
from bmfm_pipeline.evaluation.embedding_map import embedding_map
from bmfm_pipeline.evaluation.integration import BATCH, BIO, integration_scores, perplexity_weights
from bmfm_pipeline.evaluation.predictions import LabelPredictions, Predictions
from bmfm_pipeline.evaluation.umap import place_beside, umap


@pytest.fixture(scope="module")
def blood():
    """(principal components of 700 blood cells, their labels, UMAP coordinates that scanpy ships)."""
    import scanpy

    cells = scanpy.datasets.pbmc68k_reduced()
    points = np.ascontiguousarray(cells.obsm["X_pca"][:, :20], dtype=np.float64)
    return points, cells.obs["bulk_labels"].astype(str).to_numpy(dtype=object), cells.obsm["X_umap"]


@pytest.fixture(scope="module")
def shifted(blood):
    """The same with three batches, one of them noisier."""
    generator = np.random.default_rng(1)
    batches = generator.choice(["a", "b", "c"], len(blood[0]), p=[0.5, 0.3, 0.2]).astype(object)
    points = blood[0].copy()
    points[batches == "b"] += 0.7 * generator.normal(size=20)
    return points, blood[1], batches


def test_a_map_keeps_neighbours_together_as_well_as_umap_learn_does_and_follows_from_its_seed(blood):
    from sklearn.manifold import trustworthiness

    points, _, shipped = blood
    layout = umap(points, seed=3)
    assert layout.shape == (700, 2) and layout.dtype == np.float32
    assert trustworthiness(points, layout, n_neighbors=15) > trustworthiness(points, shipped, n_neighbors=15) - 0.02
    assert np.array_equal(layout, umap(points, seed=3)) and not np.array_equal(layout, umap(points, seed=4))
    some = points[::2].astype(np.float32)
    rest = points[1::2].astype(np.float32).copy()
    rest[5] = np.nan
    placed = place_beside(rest, some, layout[::2])
    assert np.isnan(placed[5]).all()
    whole = np.delete(placed, 5, axis=0)
    assert trustworthiness(np.delete(rest, 5, axis=0), whole, n_neighbors=15) > 0.9


def test_equal_points_few_points_and_none(blood):
    assert np.isfinite(umap(np.ones((30, 4)))).all()
    assert umap(blood[0][:3]).shape == (3, 2) and np.isfinite(umap(np.arange(10.0)[:, None])).all()
    with pytest.raises(DataError, match="at least 3 cells"):
        umap(blood[0][:2])


def test_scores_are_those_of_scib(shifted):
    scores, notes = integration_scores(*shifted)
    value = {name: entry["value"] for name, entry in scores.items()}
    assert notes == [] and all(entry["n"] == 700 for entry in scores.values())
    assert value["silhouette_label"] == pytest.approx(0.57687736, abs=1e-5)
    assert value["silhouette_batch"] == pytest.approx(0.9019407, abs=1e-5)
    assert value["ilisi"] == pytest.approx(0.446836, abs=1e-4)
    assert value["clisi"] == pytest.approx(0.943426, abs=2e-3)  # there of 89 neighbours
    assert value["bio_conservation"] == pytest.approx(np.mean([value[name] for name in BIO]))
    assert value["total"] == pytest.approx(
        0.6 * value["bio_conservation"] + 0.4 * np.mean([value[name] for name in BATCH])
    )


def test_batches_that_lie_apart_score_worse_than_mixed_ones(blood):
    points, labels, _ = blood
    batches = np.array(["a", "b"], dtype=object)[np.arange(len(points)) % 2]
    apart = points + np.where(batches == "b", 40.0, 0.0)[:, None]
    mixed, parted = (integration_scores(where, labels, batches)[0] for where in (points, apart))
    for name in ("ilisi", "silhouette_batch", "graph_connectivity"):
        assert mixed[name]["value"] > parted[name]["value"] + 0.1, name
    assert mixed["ilisi"]["value"] > 0.9 and parted["ilisi"]["value"] < 0.01


def test_what_is_left_out_or_cannot_be_scored_is_said(shifted):
    points, labels, batches = (part.copy() for part in shifted)
    points[0], labels[1], batches[2] = np.nan, None, None
    scores, notes = integration_scores(points, labels, batches, most=300)
    assert scores["total"]["n"] == 300
    assert notes[0].startswith("integration: 3 cells without a label, a batch or an embedding")
    assert notes[1] == "integration: of 697 cells, a random 300 (seed 0)"
    assert scores == integration_scores(points, labels, batches, most=300)[0]
    one = np.full(len(points), "a", dtype=object)
    scores, notes = integration_scores(points, labels, one)
    assert scores["total"]["value"] is None and "the only batch is 'a'" in notes[-1]
    only = np.where(labels == labels[10], "a", "b").astype(
        object
    )  # batches are labels: nothing can be mixed within one
    scores, notes = integration_scores(points, np.where(only == "a", "x", "y").astype(object), only)
    assert scores["silhouette_batch"]["value"] is None and "silhouette_batch" in notes[-1]


def test_weights_of_neighbours_reach_their_perplexity():
    distances = np.sort(np.random.default_rng(0).gamma(2, size=(20, 90)), axis=1)
    weights = perplexity_weights(distances)
    assert np.exp(-(weights * np.log(weights)).sum(axis=1)) == pytest.approx(np.full(20, 30.0), rel=1e-6)


def predictions_of(labels, cells: int):
    """A label of classes that is right of all cells but the first ten, a number, and cells without a truth."""
    kinds = sorted(set(labels[:cells]))
    truth = np.array([kinds.index(label) for label in labels[:cells]])
    truth[3] = -100
    guess = np.where(np.arange(cells) < 10, (truth + 1) % len(kinds), truth)
    guess[3] = 0
    likely = np.full((cells, len(kinds)), 0.02)
    likely[np.arange(cells), guess] = 1 - 0.02 * (len(kinds) - 1)
    ages = np.arange(cells, dtype=float)
    ages[4] = np.nan
    return Predictions(
        [f"cell {number}" for number in range(cells)],
        {
            "celltype": LabelPredictions(truth, guess, likely, kinds),
            "age": LabelPredictions(ages, np.arange(cells) + 1.0),
        },
    )


def test_a_map_of_test_cells_says_what_is_true_and_what_was_predicted(blood, monkeypatch):
    points, labels, _ = blood
    predictions = predictions_of(labels, 60)
    points = points[:60].astype(np.float32)
    points[7] = np.nan
    batches = np.array(["a", "b"], dtype=object)[np.arange(60) % 2]
    found = json.loads(json.dumps(embedding_map(points, predictions, None, batches, seed=1), allow_nan=False))
    assert found["method"] == "umap" and found["n_of"] == 60 and len(found["x"]) == len(found["y"]) == 59
    assert "cell 7" not in found["cells"] and found["cells"][:2] == ["cell 0", "cell 1"]
    assert found["truth"]["celltype"][3] is None and found["truth"]["age"][4] is None
    assert found["truth"]["celltype"][20] == found["predicted"]["celltype"][20] == labels[21]
    assert found["truth"]["celltype"][0] != found["predicted"]["celltype"][0]
    assert found["predicted"]["age"][0] == 1.0 and list(found["confidence"]) == ["celltype"]
    assert 0 < found["confidence"]["celltype"][0] <= 1
    assert found["integration"]["ilisi"]["n"] == 58 and found["integration"]["ilisi"]["what"]
    assert found["notes"][0] == "integration: labels are the true 'celltype'"
    monkeypatch.setattr("bmfm_pipeline.evaluation.embedding_map.MOST_CELLS", 40)
    some = embedding_map(points, predictions, seed=1)
    assert len(some["cells"]) == 40 and some["n_of"] == 60 and some["integration"] == {}
    assert some["notes"] == ["map: of 59 cells, a random 40 (seed 1)"]
    points[2:] = np.nan
    assert embedding_map(points, predictions) is None
