"""Cells of other data that a model was trained on are found by their counts, and chance names are no evidence."""

import numpy as np
import pytest
from scipy import sparse

from bmfm_pipeline.data.stores import MemoryStore
from bmfm_pipeline.evaluation.seen_cells import find_seen

GENES = [f"G{number}" for number in range(60)]


@pytest.fixture
def training() -> MemoryStore:
    counts = sparse.csr_matrix(np.random.default_rng(0).poisson(1.2, size=(30, 60)))
    return MemoryStore(counts.astype(np.float32), [f"cell{row}" for row in range(30)], GENES, counts=counts)


def store(training, rows, names, genes=None, change=None):
    """Cells of the training data under other names, their genes in another order beside some that it lacks."""
    order = np.random.default_rng(1).permutation(60)[: genes or 60]
    counts = training.counts.rows(np.asarray(rows)).toarray()[:, order]
    if change is not None:
        counts[change, 0] += 1
    counts = np.concatenate([counts, np.full((len(rows), 2), 7)], axis=1)
    named = [*(GENES[column] for column in order), "OTHER1", "OTHER2"]
    return MemoryStore(sparse.csr_matrix(counts.astype(np.float32)), names, named, counts=sparse.csr_matrix(counts))


def test_renamed_cells_are_found_whatever_the_genes_order_and_only_among_training_rows(training):
    new = store(training, [3, 20, 5], ["a", "b", "c"])
    found = find_seen(new, np.arange(3), training, np.arange(10))
    assert found.seen.tolist() == [True, False, True] and not found.same_name.any() and found.by_counts


def test_the_same_name_with_other_counts_is_another_cell(training):
    new = store(training, [3, 4], ["cell3", "cell7"], change=1)
    found = find_seen(new, np.arange(2), training, np.arange(30))
    assert found.seen.tolist() == [True, False] and found.same_name.tolist() == [True, True]


def test_by_name_where_that_is_asked_for_or_all_that_there_is(training):
    new = store(training, [3, 4], ["cell3", "x"])
    for found in (
        find_seen(new, np.arange(2), training, np.arange(30), by_counts=False),
        find_seen(store(training, [3, 4], ["cell3", "x"], genes=8), np.arange(2), training, np.arange(30)),
    ):
        assert found.seen.tolist() == [True, False] and not found.by_counts


def test_shallow_cells_are_alike_by_chance_unless_they_bear_the_same_name(training):
    counts = sparse.csr_matrix(np.eye(3, 60))
    own = MemoryStore(counts.astype(np.float32), ["a", "b", "c"], GENES, counts=counts)
    other = MemoryStore(counts.astype(np.float32), ["a", "x", "y"], GENES, counts=counts)
    assert find_seen(other, np.arange(3), own, np.arange(3)).seen.tolist() == [True, False, False]
