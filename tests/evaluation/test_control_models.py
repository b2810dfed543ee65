"""Controls: fitted on the training cells and nothing else, and equal to doing the same by hand with scikit-learn."""

import logging
from importlib.util import find_spec

import numpy as np
import pytest
from scipy import sparse
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import pairwise_distances
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from bmfm_pipeline.errors import ConfigError
from bmfm_pipeline.evaluation.controls import (
    DEFAULT,
    DESCRIPTIONS,
    FULL,
    VALUES_FULL,
    ControlCells,
    chosen_for,
    control_predictions,
    expand_controls,
    log_cp10k,
    run_controls,
    which_controls,
)
from bmfm_pipeline.evaluation.controls.choice import ALL
from bmfm_pipeline.evaluation.controls.files import read_control, write_control
from bmfm_pipeline.evaluation.controls.fitting import PENALTIES, best_penalty, fit_classes
from bmfm_pipeline.evaluation.controls.values import ROWS_AT_ONCE
from bmfm_pipeline.evaluation.predictions import LabelPredictions
from bmfm_pipeline.evaluation.tables import LABELS
from bmfm_pipeline.evaluation.wording import NAMES

CLASS_NAMES = ["B", "Mono", "NK", "T"]


class Counts:
    """Raw counts as the store offers them."""

    def __init__(self, matrix):
        self.matrix = sparse.csr_matrix(matrix)

    def rows(self, rows):
        return self.matrix[np.asarray(rows)]


@pytest.fixture(scope="module")
def cells():
    """240 cells of 60 genes, four classes with a few marker genes each; counts, labels, training and test rows."""
    generator = np.random.default_rng(0)
    labels = generator.choice(4, 240, p=[0.4, 0.3, 0.2, 0.1])
    rates = generator.gamma(0.5, 1.0, size=60) * np.ones((4, 1))
    for label in range(4):
        rates[label, label * 5 : label * 5 + 5] *= 3
    depth = generator.uniform(0.5, 2, size=(240, 1))
    counts = Counts(generator.poisson(rates[labels] * depth).astype(np.int16))
    order = generator.permutation(240)
    return counts, labels, np.sort(order[:180]), np.sort(order[180:])


def embedding(rows):
    """Embeddings of some rows: eight numbers that say something about the class of a cell, and one that never varies."""
    generator = np.random.default_rng(7)
    noise, centres = generator.normal(size=(240, 8)), generator.normal(size=(4, 8))
    labels = np.random.default_rng(0).choice(4, 240, p=[0.4, 0.3, 0.2, 0.1])
    values = np.hstack([noise + centres[labels], np.ones((240, 1))]).astype(np.float32)
    return values[rows], np.asarray(rows)


def run(cells, which=FULL, labels=None, test_rows=None, train_rows=None):
    counts, truth, train, test = cells
    train = train if train_rows is None else train_rows
    test = test if test_rows is None else test_rows
    return run_controls(
        counts,
        train,
        test,
        {"celltype": truth if labels is None else labels},
        {"celltype": CLASS_NAMES},
        which,
        seed=3,
        embeddings={"train": embedding(train), "test": embedding(test)},
    )


def by_hand(cells, model):
    counts, labels, train, test = cells
    dense = counts.matrix.toarray().astype(np.float64)
    values = np.log1p(dense / dense.sum(axis=1, keepdims=True) * 10_000)
    return model.fit(values[train], labels[train]).predict_proba(values[test])


def test_log_cp10k_is_the_logarithm_of_counts_per_ten_thousand(cells):
    counts = sparse.csr_matrix(np.array([[1, 3, 0], [0, 0, 0], [0, 0, 7]], dtype=np.uint8))
    expected = [[np.log1p(2500), np.log1p(7500), 0], [0, 0, 0], [0, 0, np.log1p(10_000)]]
    assert log_cp10k(counts).toarray() == pytest.approx(np.array(expected), rel=1e-6)
    assert counts.toarray().tolist() == [[1, 3, 0], [0, 0, 0], [0, 0, 7]], "the counts themselves are left alone"


@pytest.mark.parametrize(
    "name, model",
    [
        ("logistic_l2", LogisticRegression(max_iter=300)),
        (
            "logistic_l1",
            OneVsRestClassifier(LogisticRegression(l1_ratio=1, C=0.1, solver="liblinear", random_state=3)),
        ),
        ("pca50_logistic", make_pipeline(PCA(50, svd_solver="full"), LogisticRegression(max_iter=1000))),
    ],
)
def test_controls_equal_scikit_learn_by_hand(cells, name, model):
    found = run(cells, [name])[name]["celltype"]
    expected = by_hand(cells, model)
    # lbfgs in float32 on sparse values stops a little elsewhere than in float64 on dense ones.
    assert found.probabilities == pytest.approx(expected, abs=0.02)
    assert (found.predicted == expected.argmax(axis=1)).mean() > 0.98


def test_l1_control_really_is_sparse(cells):
    """The same model with the L2 penalty gives other probabilities."""
    ridge = OneVsRestClassifier(LogisticRegression(C=0.1, solver="liblinear", random_state=3))
    found = run(cells, ["logistic_l1"])["logistic_l1"]["celltype"].probabilities
    assert np.abs(found - by_hand(cells, ridge)).max() > 0.05


def test_majority_is_the_commonest_class_of_the_training_cells(cells):
    _, labels, train, test = cells
    found = run(cells, ["majority"])["majority"]["celltype"]
    shares = np.bincount(labels[train], minlength=4) / len(train)
    assert set(found.predicted) == {shares.argmax()}
    assert found.probabilities[0] == pytest.approx(shares)
    assert found.truth.tolist() == labels[test].tolist()


def test_labels_of_test_cells_do_not_matter(cells):
    _, labels, _, test = cells
    before = run(cells)
    shuffled = labels.copy()
    shuffled[test] = np.random.default_rng(1).permutation(labels[test])
    hidden = labels.copy()
    hidden[test] = -100
    for other in (shuffled, hidden):
        after = run(cells, labels=other)
        for name in FULL:
            left, right = before[name]["celltype"], after[name]["celltype"]
            assert left.probabilities.tolist() == right.probabilities.tolist(), name
            assert right.truth.tolist() == other[test].tolist()


def test_other_test_cells_do_not_matter(cells):
    """Each test cell is scored alone: a part of them, in another order, has the same predictions."""
    test = cells[3]
    some = np.random.default_rng(2).permutation(len(test))[:20]
    whole, part = run(cells), run(cells, test_rows=test[some])
    for name in FULL:
        expected = whole[name]["celltype"].probabilities[some]
        assert part[name]["celltype"].probabilities == pytest.approx(expected, abs=1e-6), name


def test_training_labels_do_matter(cells):
    _, labels, train, _ = cells
    shuffled = labels.copy()
    shuffled[train] = np.random.default_rng(1).permutation(labels[train])
    before, after = run(cells), run(cells, labels=shuffled)
    for name in set(FULL) - {"majority"}:
        assert (before[name]["celltype"].predicted != after[name]["celltype"].predicted).any(), name


def test_training_cells_without_a_label_are_left_out(cells):
    _, labels, train, _ = cells
    silent = labels.copy()
    silent[train[::3]] = -100
    kept = train[silent[train] >= 0]
    expected = run(cells, labels=labels, train_rows=kept)
    found = run(cells, labels=silent)
    for name in FULL:
        assert found[name]["celltype"].probabilities == pytest.approx(expected[name]["celltype"].probabilities)


def test_a_class_that_training_lacks_has_probability_zero(cells):
    _, labels, train, _ = cells
    without = labels.copy()
    without[train] = np.where(labels[train] == 1, 0, labels[train])
    found = run(cells, labels=without)
    for name in FULL:
        probabilities = found[name]["celltype"].probabilities
        assert probabilities.shape[1] == 4
        assert (probabilities[:, 1] == 0).all()
        assert probabilities.sum(axis=1) == pytest.approx(1)


def test_one_class_in_training_is_always_predicted(cells):
    labels = np.full(240, 2)
    for predictions in run(cells, labels=labels).values():
        assert set(predictions["celltype"].predicted) == {2}


def test_a_label_unknown_in_all_training_cells_has_no_control(cells, caplog):
    _, labels, train, _ = cells
    unknown = labels.copy()
    unknown[train] = -100
    with caplog.at_level(logging.WARNING):
        assert run(cells, labels=unknown) == {}
    assert "no training cell has a known celltype" in caplog.text


def test_the_mean_of_the_training_cells_needs_no_counts(cells):
    _, _, train, test = cells
    values = np.random.default_rng(4).normal(50, 10, 240).astype(np.float32)
    values[train[:9]] = np.nan

    class NoCounts:
        def rows(self, rows):
            raise AssertionError("counts are read for nothing")

    found = run_controls(NoCounts(), train, test, {"age": values}, {"age": []}, ["train_mean"])
    assert list(found) == ["train_mean"]
    assert found["train_mean"]["age"].predicted == pytest.approx(np.full(len(test), values[train[9:]].mean()))


def test_numbers_are_regressed_on_the_same_values_and_embeddings(cells):
    counts, labels, train, test = cells
    values = (labels * 10 + np.random.default_rng(4).normal(size=240)).astype(np.float32)
    values[train[:9]] = np.nan
    embeddings = {"train": embedding(train), "test": embedding(test)}
    found = run_controls(counts, train, test, {"age": values}, {}, FULL + VALUES_FULL, seed=3, embeddings=embeddings)
    assert list(found) == ["linear_probe", "knn", "train_mean", "ridge"]
    errors = {name: ((entry["age"].predicted - values[test]) ** 2).mean() for name, entry in found.items()}
    assert all(errors[name] < errors["train_mean"] for name in ("ridge", "linear_probe", "knn"))
    log = log_cp10k(counts.rows(train[9:])).toarray().astype(np.float64)
    penalty = best_penalty(log_cp10k(counts.rows(train[9:])), values[train[9:]].astype(np.float64), 3)
    by_hand = Ridge(penalty).fit(log, values[train[9:]]).predict(log_cp10k(counts.rows(test)).toarray())
    assert found["ridge"]["age"].predicted == pytest.approx(by_hand, abs=0.02)


def test_the_penalty_of_ridge_follows_the_noise():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(200, 50))
    clean, noise = x[:, 0], generator.normal(size=200)
    assert best_penalty(x, clean, 0) == PENALTIES[0] < best_penalty(x, noise, 0)


def test_embeddings_are_probed_and_searched_as_by_hand(cells):
    _, labels, train, test = cells
    found = run(cells, ["linear_probe", "knn"])
    (x, _), (test_x, _) = embedding(train), embedding(test)
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(x.astype(np.float64), labels[train])
    expected = probe.predict_proba(test_x.astype(np.float64))
    assert found["linear_probe"]["celltype"].probabilities == pytest.approx(expected, abs=1e-3)
    nearest = np.argsort(pairwise_distances(test_x, x, metric="cosine"), axis=1)[:, :15]
    votes = np.stack([np.bincount(row, minlength=4) for row in labels[train][nearest]]) / 15
    assert found["knn"]["celltype"].probabilities == pytest.approx(votes)


def test_embeddings_that_are_not_there_are_an_error(cells):
    counts, labels, train, test = cells
    with pytest.raises(ConfigError, match="knn reads the model's embeddings"):
        run_controls(counts, train, test, {"c": labels}, {"c": CLASS_NAMES}, ["knn"])


@pytest.mark.parametrize("broken", ["no counts at all", "one cell a class", "cells without counts", "two cells"])
def test_poor_data_have_controls_all_the_same(cells, broken):
    counts, labels, train, test = cells
    labels = labels.copy()
    if broken == "no counts at all":
        counts = Counts(counts.matrix * 0)
    elif broken == "cells without counts":
        matrix = counts.matrix.toarray()
        matrix[train[:5]], matrix[test[:5]] = 0, 0
        counts = Counts(matrix)
    elif broken == "one cell a class":
        labels[train] = 0
        labels[train[:3]] = [1, 2, 3]
    else:
        labels[train[2:]] = -100
        labels[train[:2]] = [0, 1]
    found = run((counts, labels, train, test))
    assert set(found) == set(FULL)
    for name, entry in found.items():
        assert entry["celltype"].probabilities.sum(axis=1) == pytest.approx(1, abs=1e-6), name


def test_log_values_of_many_rows_are_those_of_each_by_itself():
    matrix = sparse.random(ROWS_AT_ONCE + 50, 30, 0.1, "csr", random_state=0, data_rvs=lambda n: np.arange(n) % 9 + 1)
    whole, some = log_cp10k(matrix), [0, ROWS_AT_ONCE - 1, ROWS_AT_ONCE, ROWS_AT_ONCE + 49]
    assert whole.dtype == np.float32
    assert np.array_equal(whole[some].toarray(), log_cp10k(matrix[some]).toarray())


@pytest.mark.parametrize("asked", ["auto", "default", "full", ["logistic_l1"], ["pca50_logistic", "no_pretrain"], []])
@pytest.mark.parametrize("n_cells", [9_999, 10_000])
def test_the_default_ones_are_always_there(asked, n_cells):
    assert which_controls(asked, n_cells)[:2] == DEFAULT
    assert which_controls(asked, n_cells, numbers=True)[:2] == ("train_mean", "ridge")


def test_auto_is_full_for_small_data():
    assert expand_controls("auto", 9_999) == expand_controls("full", 10**6)
    assert expand_controls("auto", 10_000) == expand_controls("default", 5)
    assert which_controls("auto", 9_999) == FULL
    assert which_controls(["auto", "no_pretrain"], 10_000) == (*DEFAULT, "no_pretrain")


def test_many_classes_scored_one_by_one_keep_few_controls_and_a_note():
    assert chosen_for("tags", "full", 100, several=10) == (FULL, [])
    chosen, notes = chosen_for("tags", "full", 100, several=11)
    assert chosen == (*DEFAULT, "linear_probe")
    assert notes == [
        "tags: logistic_l1, pca50_logistic, knn are left out: 11 classes are scored one by one, and a set of controls is full for up to "
        "10; name them in evaluation.controls to have them"
    ]
    assert chosen_for("tags", ["full", "knn"], 100, several=11)[0] == (*DEFAULT, "linear_probe", "knn")
    chosen, notes = chosen_for("tags", ["celltypist"], 100, several=3)
    assert chosen == DEFAULT and "celltypist is left out: it gives a cell one class" in notes[0]


def test_every_control_has_a_description_a_label_and_a_name_in_verdicts():
    assert set(DESCRIPTIONS) == set(ALL)
    assert set(DESCRIPTIONS) < set(NAMES) and set(DESCRIPTIONS) < set(LABELS)


def test_an_unknown_control_is_refused_not_replaced(cells):
    with pytest.raises(ConfigError, match="unknown control kmeans; known: majority, logistic_l2"):
        run(cells, ["majority", "kmeans"])


@pytest.mark.parametrize("n_classes", [4, 300])
def test_predictions_come_back_from_their_files_for_the_rows_that_are_asked_for(tmp_path, n_classes):
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(400, 3)), generator.integers(0, n_classes, 400)
    probabilities = fit_classes("knn", x[:300], y[:300], x[300:], n_classes, 0)
    names = [f"c{number}" for number in range(n_classes)]
    rows = np.arange(1000, 1100)
    predictions = LabelPredictions(np.zeros(100, dtype=int), probabilities.argmax(axis=1), probabilities, names)
    write_control(tmp_path, rows, {"celltype": predictions}, {"control": "knn"})
    asked = np.array([1099, 1003, 1050])
    found = read_control(tmp_path, asked, {"celltype": y[:3]})["celltype"]
    assert found.predicted.tolist() == predictions.predicted[[99, 3, 50]].tolist()
    assert found.probabilities == pytest.approx(probabilities[[99, 3, 50]], abs=1e-6)
    assert (found.class_names, found.only_top, found.truth.tolist()) == (names, n_classes == 300, y[:3].tolist())
    with pytest.raises(ValueError, match="no prediction for some of the cells"):
        read_control(tmp_path, np.array([1, 1003]))


def test_celltypist_learns_the_classes(cells):
    if find_spec("celltypist") is None:
        pytest.skip("CellTypist is not installed (the extra celltypist)")
    counts, labels, train, test = cells
    matrix = counts.matrix.toarray()
    matrix[test[0]] = 0
    control = ControlCells(Counts(matrix), train, test, 3, genes=[f"G{number}" for number in range(60)])
    found = control_predictions("celltypist", control, labels, CLASS_NAMES)
    assert found.probabilities is None
    assert (found.predicted == labels[test]).mean() > (labels[test] == 0).mean()


def test_controls_learn_the_demonstration_cells(mini_h5ad):
    """700 real cells, ten labels: logistic regression is far above the commonest class (240 of 700 dendritic)."""
    import anndata

    data = anndata.read_h5ad(mini_h5ad)
    column = data.obs["celltype"].astype("category")
    labels = column.cat.codes.to_numpy().astype(np.int64)
    rows = np.random.default_rng(0).permutation(data.n_obs)
    counts = Counts(data.X)
    names = {"celltype": list(column.cat.categories)}
    found = run_controls(counts, rows[:560], rows[560:], {"celltype": labels}, names, DEFAULT)
    scores = {name: (label["celltype"].predicted == labels[rows[560:]]).mean() for name, label in found.items()}
    assert scores["majority"] == pytest.approx(0.34, abs=0.1)
    assert scores["logistic_l2"] > 0.75


def test_l2_control_reaches_the_published_figure_on_sorted_cells(data_dir):
    """3,874 sorted PBMC, 80/20: .905 accuracy with a deviation of .004 between splits, as measured with scikit-learn."""
    import anndata
    from sklearn.model_selection import train_test_split

    data = anndata.read_h5ad(data_dir / "zheng_sorted" / "zheng_sorted_counts.h5ad")
    column = data.obs["celltype"].astype("category")
    labels = column.cat.codes.to_numpy().astype(np.int64)
    train, test = train_test_split(np.arange(data.n_obs), test_size=0.2, stratify=labels, random_state=0)
    names = {"celltype": list(column.cat.categories)}
    found = run_controls(Counts(data.X), train, test, {"celltype": labels}, names, ["logistic_l2"])
    accuracy = (found["logistic_l2"]["celltype"].predicted == labels[test]).mean()
    assert accuracy == pytest.approx(0.905, abs=0.012)
