"""Predictions survive their parquet file; what is cut off above 256 classes makes no metric better."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from bmfm_pipeline.errors import DataError
from bmfm_pipeline.evaluation.metrics import Metric
from bmfm_pipeline.evaluation.predictions import (
    MANY_CLASSES,
    TOP,
    LabelPredictions,
    Predictions,
    read_control_predictions,
    read_predictions,
    write_control_predictions,
    write_predictions,
)

ODD_NAMES = [
    "CD4+, naive",
    'the "other" one',
    "γδ T 細胞",
    "<script>alert(1)</script>",
    "",
    " trailing ",
    "None",
    "nan",
    "a\nb",
]


def classes(n=50, names=tuple(ODD_NAMES), seed=0, unknown=5):
    generator = np.random.default_rng(seed)
    names = list(names)
    probabilities = generator.dirichlet(np.full(len(names), 0.3), size=n)
    truth = generator.integers(0, len(names), n)
    truth[:unknown] = -100
    return LabelPredictions(truth, probabilities.argmax(axis=1), probabilities, names)


def cells(n=50):
    return [f"AAAC-{i}" for i in range(n)]


def round_trip(tmp_path, predictions):
    write_predictions(tmp_path / "predictions.parquet", predictions)
    return read_predictions(tmp_path / "predictions.parquet")


def test_class_predictions_come_back_with_unknown_truth_and_odd_names(tmp_path):
    label = classes()
    back = round_trip(tmp_path, Predictions(cells(), {"celltype": label}))
    found = back.labels["celltype"]
    assert back.cells == cells()
    assert found.class_names == ODD_NAMES
    assert found.truth.tolist() == label.truth.tolist()
    assert found.predicted.tolist() == label.predicted.tolist()
    assert found.known.sum() == 45
    assert found.probabilities == pytest.approx(label.probabilities, abs=5e-4)  # float16 has 11 bits
    assert not found.only_top


def test_the_file_can_be_read_without_the_project(tmp_path):
    label = classes()
    write_predictions(tmp_path / "predictions.parquet", Predictions(cells(), {"celltype": label}))
    table = pq.read_table(tmp_path / "predictions.parquet").to_pandas()
    assert list(table) == ["cell", "split", "celltype", "celltype_predicted", "celltype_probabilities"]
    assert set(table["split"]) == {"test"}
    assert table["celltype"].isna().sum() == 5
    assert table["celltype_predicted"].tolist() == [ODD_NAMES[i] for i in label.predicted]
    assert table["celltype_probabilities"].iloc[0].dtype == np.float16


def test_a_cell_without_a_prediction_has_an_empty_one(tmp_path):
    label = LabelPredictions(np.array([0, 1, -100]), np.array([1, -100, 0]), None, ["B", "T"])
    found = round_trip(tmp_path, Predictions(cells(3), {"celltype": label})).labels["celltype"]
    assert found.truth.tolist() == [0, 1, -100]
    assert found.predicted.tolist() == [1, -100, 0]
    assert found.probabilities is None


def test_regression_predictions_come_back(tmp_path):
    truth = np.array([1.5, np.nan, -100.0])
    label = LabelPredictions(truth, np.array([1.25, 2.0, 3.0]))
    found = round_trip(tmp_path, Predictions(cells(3), {"age": label})).labels["age"]
    assert found.is_regression
    assert found.truth == pytest.approx(truth, nan_ok=True)
    assert found.predicted.tolist() == [1.25, 2.0, 3.0]
    assert found.known.tolist() == [True, False, True]


def test_several_label_columns_keep_apart_even_with_clashing_names(tmp_path):
    labels = {
        "celltype_predicted": classes(seed=1),
        "celltype": classes(seed=2, names=("B", "T")),
        "cell": classes(seed=3),
        "split": LabelPredictions(np.arange(50.0), np.arange(50.0) + 1),
    }
    back = round_trip(tmp_path, Predictions(cells(), labels))
    assert back.cells == cells()
    for name, label in labels.items():
        assert back.labels[name].predicted.tolist() == label.predicted.tolist(), name
        assert back.labels[name].truth.tolist() == label.truth.tolist(), name
        assert back.labels[name].class_names == label.class_names, name


@pytest.mark.parametrize("n_classes", [MANY_CLASSES, MANY_CLASSES + 1])
def test_above_256_classes_the_twenty_largest_probabilities_are_kept(tmp_path, n_classes):
    names = [f"class {i}" for i in range(n_classes)]
    label = classes(names=names)
    found = round_trip(tmp_path, Predictions(cells(), {"celltype": label})).labels["celltype"]
    assert found.truth.tolist() == label.truth.tolist()
    assert found.predicted.tolist() == label.predicted.tolist()
    assert found.only_top == (n_classes > MANY_CLASSES)
    if not found.only_top:
        assert found.probabilities == pytest.approx(label.probabilities, abs=5e-4)
        return
    assert (found.probabilities > 0).sum(axis=1).max() <= TOP
    assert found.probabilities.argmax(axis=1).tolist() == label.predicted.tolist()
    largest = np.sort(label.probabilities, axis=1)[:, -TOP:]
    assert np.sort(found.probabilities, axis=1)[:, -TOP:] == pytest.approx(largest, abs=5e-4)
    table = pq.read_table(tmp_path / "predictions.parquet").to_pandas()
    known = label.truth >= 0
    expected = label.probabilities[np.arange(50), np.maximum(label.truth, 0)]
    assert table["celltype_true_probability"][known].to_numpy() == pytest.approx(expected[known], rel=1e-6)
    assert table["celltype_true_probability"][~known].isna().all()


def test_cut_probabilities_do_not_make_a_random_model_look_good(tmp_path):
    generator = np.random.default_rng(0)
    n, names = 3000, [f"class {i}" for i in range(300)]
    probabilities = generator.dirichlet(np.ones(300), size=n)
    label = LabelPredictions(generator.integers(0, 300, n), probabilities.argmax(axis=1), probabilities, names)
    found = round_trip(tmp_path, Predictions(cells(n), {"celltype": label})).labels["celltype"]
    # 300 areas of ten positives each scatter by .09, so their mean by .005.
    assert Metric("auroc", found.truth, found.probabilities).value() == pytest.approx(0.5, abs=0.02)


def test_no_cells_is_a_file_too(tmp_path):
    label = LabelPredictions(np.zeros(0, dtype=int), np.zeros(0, dtype=int), np.zeros((0, 3)), ["a", "b", "c"])
    found = round_trip(tmp_path, Predictions([], {"celltype": label})).labels["celltype"]
    assert found.probabilities.shape == (0, 3)
    assert len(found.truth) == 0


@pytest.mark.parametrize("n_classes", [9, MANY_CLASSES + 1])
def test_controls_come_back_beside_the_model_and_at_the_same_resolution(tmp_path, n_classes):
    names = [f"class {i}" for i in range(n_classes)]
    model = Predictions(cells(), {"celltype": classes(names=names), "age": LabelPredictions(np.ones(50), np.ones(50))})
    control = classes(names=names, seed=4)
    plain = LabelPredictions(np.ones(50), np.full(50, 0.25))
    path = tmp_path / "controls.json"
    write_control_predictions(path, {"logistic_l2": {"celltype": control}, "train_mean": {"age": plain}})
    found = read_control_predictions(path, model)
    back = found["logistic_l2"]["celltype"]
    assert back.predicted.tolist() == control.predicted.tolist()
    assert back.truth is model.labels["celltype"].truth
    assert back.class_names == names
    assert found["train_mean"]["age"].predicted.tolist() == [0.25] * 50
    assert found["train_mean"]["age"].probabilities is None
    if n_classes <= MANY_CLASSES:
        assert back.probabilities == pytest.approx(control.probabilities, abs=1e-5)
    else:
        assert ((back.probabilities > 0).sum(axis=1) <= TOP).all()
        assert back.only_top


def test_controls_of_other_cells_are_refused(tmp_path):
    path = tmp_path / "controls.json"
    write_control_predictions(path, {"majority": {"celltype": classes(n=20)}})
    with pytest.raises(DataError, match="20 predictions, the model 50"):
        read_control_predictions(path, Predictions(cells(), {"celltype": classes()}))
