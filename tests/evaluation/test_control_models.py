"""Controls: fitted on the training cells and nothing else, and equal to doing the same by hand with scikit-learn."""

import logging

import numpy as np
import pytest
from scipy import sparse
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_pipeline

from bmfm_pipeline.errors import ConfigError
from bmfm_pipeline.evaluation.controls import DEFAULT, DESCRIPTIONS, FULL, log_cp10k, run_controls, which_controls
from bmfm_pipeline.evaluation.tables import LABELS
from bmfm_pipeline.evaluation.verdicts import NAMES

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


def run(cells, which=FULL, labels=None, test_rows=None):
    counts, truth, train, test = cells
    return run_controls(
        counts,
        train,
        test if test_rows is None else test_rows,
        {"celltype": truth if labels is None else labels},
        {"celltype": CLASS_NAMES},
        which,
        seed=3,
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
    counts, labels, train, test = cells
    silent = labels.copy()
    silent[train[::3]] = -100
    kept = train[silent[train] >= 0]
    expected = run_controls(counts, kept, test, {"celltype": labels}, {"celltype": CLASS_NAMES}, FULL, seed=3)
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


def test_regression_has_the_mean_of_the_training_cells_and_needs_no_counts(cells):
    _, _, train, test = cells
    values = np.random.default_rng(4).normal(50, 10, 240).astype(np.float32)
    values[train[:9]] = np.nan

    class NoCounts:
        def rows(self, rows):
            raise AssertionError("counts are read for nothing")

    found = run_controls(NoCounts(), train, test, {"age": values}, {"age": []}, DEFAULT)
    assert list(found) == ["train_mean"]
    assert found["train_mean"]["age"].predicted == pytest.approx(np.full(len(test), values[train[9:]].mean()))


@pytest.mark.parametrize("asked", ["default", "full", "logistic_l1", ["pca50_logistic"], []])
def test_majority_and_logistic_regression_are_always_there(asked):
    chosen = which_controls(asked)
    assert chosen[:2] == ("majority", "logistic_l2")
    assert len(chosen) == len(set(chosen))


def test_every_control_has_a_description_a_label_and_a_name_in_verdicts():
    assert {*FULL, "train_mean"} == set(DESCRIPTIONS) == set(NAMES)
    assert set(DESCRIPTIONS) < set(LABELS)


def test_an_unknown_control_is_refused_not_replaced(cells):
    with pytest.raises(ConfigError, match="unknown control knn; known: majority, logistic_l2"):
        run(cells, ["majority", "knn"])


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
