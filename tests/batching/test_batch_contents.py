"""What stands where in a batch: against a plain reading of the cells, for any cells and settings."""

import numpy as np
import pytest
import torch
from batching_cases import (
    CLS,
    N_GENES,
    PAD,
    SEP,
    UNK,
    MemoryStore,
    cells,
    column_ids,
    make_builder,
    many_cells,
    settings,
)
from hypothesis import HealthCheck, given
from hypothesis import settings as limits
from hypothesis import strategies as st

from bmfm_pipeline.batching import BatchBuilder, BatchingConfig, FieldSpec
from bmfm_pipeline.errors import DataError

FEW = limits(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def expected_genes(store, row, unknown, config) -> list[tuple[int, float]]:
    entries = [entry for entry in store.cell(row) if config["limit_genes"] is None or entry[0] not in unknown]
    if config["sequence_order"] == "sorted":
        entries = sorted(entries, key=lambda entry: -entry[1])
    return entries


@FEW
@given(rows=cells, config=settings, unknown=st.sets(st.integers(0, N_GENES - 1), max_size=20), tokenized=st.booleans())
def test_any_cells_under_any_settings(rows, config, unknown, tokenized):
    store = MemoryStore(rows)
    builder = make_builder(store, unknown, tokenized=tokenized, mlm=False, **config)
    batch = builder.build(np.arange(len(rows)))
    ids, attention = batch["input_ids"].numpy(), batch["attention_mask"].numpy()
    assert batch["input_ids"].dtype == (torch.int64 if tokenized else torch.float32)
    assert "labels" not in batch
    room = min(config["max_length"] - 2 if config["truncation"] else 10**6, config["max_mfi_data_len"] or 10**6)
    known = column_ids(unknown)
    longest = 0
    for row in range(len(rows)):
        entries = expected_genes(store, row, unknown, config)
        n = min(len(entries), room)
        longest = max(longest, n + 2)
        genes, values = ids[row, 0, 1 : n + 1], ids[row, 1, 1 : n + 1]
        shown = [
            (known[gene], value if tokenized is False else (value + 5 if value < 10 else UNK))
            for gene, value in entries
        ]
        found = list(zip(genes.tolist(), values.tolist(), strict=True))
        if config["sequence_order"] == "random":
            assert not set(found) - set(shown)
            assert n < len(entries) or sorted(found) == sorted(shown)
        else:
            assert found == shown[:n]
        for field, flip in ((0, False), (1, not tokenized)):
            special = [-(token + 1) if flip else token for token in (CLS, SEP, PAD)]
            assert ids[row, field, 0] == special[0]
            assert ids[row, field, n + 1] == special[1]
            assert (ids[row, field, n + 2 :] == special[2]).all()
        assert attention[row].tolist() == [1] * (n + 2) + [0] * (ids.shape[2] - n - 2)
    expected = max(longest, config["max_length"]) if config["padding"] == "max_length" else longest
    if config["pad_to_multiple_of"] and config["padding"] is not False:
        expected = -(-expected // config["pad_to_multiple_of"]) * config["pad_to_multiple_of"]
    assert ids.shape == (len(rows), 2, expected)
    assert batch["cell_name"] == [f"cell-{row}" for row in range(len(rows))]
    assert builder.report.unknown_genes == len(unknown)
    if tokenized and not config["truncation"] and config["max_mfi_data_len"] in (None, 100):
        kept = [entry for row in range(len(rows)) for entry in expected_genes(store, row, unknown, config)]
        assert builder.report.values_outside_vocabulary == sum(value >= 10 for _, value in kept)


@FEW
@given(values=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=N_GENES))
def test_sorting_floats_is_stable_and_descending(values):
    store = MemoryStore([dict(enumerate(values))], dtype=np.float32)
    builder = make_builder(store, mlm=False, sequence_order="sorted", max_length=64)
    genes = builder.build(np.array([0]))["input_ids"][0, 0, 1 : len(values) + 1].numpy() - 5
    stored = [value for _, value in store.cell(0)]
    assert genes.tolist() == sorted(range(len(values)), key=lambda gene: -stored[gene])


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.uint16, np.int64, np.float32, np.float64])
def test_value_types_give_the_same_batch(dtype):
    rows = np.arange(16)
    expected = make_builder(many_cells(16), sequence_order="sorted", mlm=False).build(rows)["input_ids"]
    assert torch.equal(
        make_builder(many_cells(16, dtype=dtype), sequence_order="sorted", mlm=False).build(rows)["input_ids"], expected
    )


def test_random_order_is_a_fair_permutation():
    """Every gene comes first, and is kept when 6 of 20 fit, equally often."""
    store = many_cells(1, genes_per_cell=20)
    builder = make_builder(store, mlm=False, sequence_order="random", max_length=8, pad_to_multiple_of=8)
    draws = np.stack([builder.build(np.array([0]), epoch)["input_ids"][0, 0, 1:7].numpy() for epoch in range(4000)])
    assert all(len(set(draw)) == 6 for draw in draws.tolist())
    for counts, expected in (
        (np.unique(draws[:, 0], return_counts=True)[1], 200),
        (np.unique(draws, return_counts=True)[1], 1200),
    ):
        assert len(counts) == 20
        assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)


def test_rounding_is_to_the_nearest_even_whole_number():
    store = MemoryStore([{0: 0.5, 1: 1.5, 2: 2.4999, 3: 9.5, 4: np.nan, 5: -1.0, 6: 1e30}], dtype=np.float32)
    builder = make_builder(store, mlm=False)
    values = builder.build(np.array([0]))["input_ids"][0, 1, 1:8].tolist()
    assert values == [5, 7, 7, UNK, UNK, UNK, UNK]
    assert builder.report.values_outside_vocabulary == 4


@pytest.mark.parametrize("value", [-0.5, np.nan, np.inf])
def test_continuous_values_that_collide_with_special_tokens_are_refused(value):
    store = MemoryStore([{3: 1.0}, {4: 2.0, 7: value}], dtype=np.float32)
    with pytest.raises(DataError, match=r"cell 'cell-1', gene 'GENE7'"):
        make_builder(store, tokenized=False, mlm=False).build(np.array([0, 1]))


def test_cells_without_a_known_gene_are_counted_and_kept():
    builder = make_builder(MemoryStore([{}, {1: 3}, {2: 4}]), unknown=[1], masked=("expressions",))
    batch = builder.build(np.arange(3))
    assert batch["attention_mask"].sum(1).tolist() == [2, 2, 3]
    assert builder.report.cells_without_genes == 2
    assert builder.report.cells_built == 3
    assert builder.report.unknown_gene_examples == ["GENE1"]


def test_prefix_and_normalisation():
    store = MemoryStore([{0: 1, 1: 3}])
    builder = make_builder(
        store,
        tokenized=False,
        mlm=False,
        prefix_ids=(5, 6),
        log_normalize_transform=True,
        padding="longest",
        pad_to_multiple_of=None,
    )
    batch = builder.build(np.array([0]))
    expected = [-6.0, -7.0, np.log1p(1e4 / 5), np.log1p(3e4 / 5), -2.0]
    np.testing.assert_allclose(batch["input_ids"][0, 1].numpy(), expected, rtol=1e-6)
    assert batch["input_ids"][0, 0].tolist() == [5, 6, 5, 6, 1]


def test_labels_of_columns():
    store = many_cells(6)
    labels = {"celltype": np.array([0, 1, -100, 2, 1, 0]), "age": np.linspace(0, 1, 6, dtype=np.float32)}
    rows = np.array([4, 2, 0])
    batch = make_builder(store, labels=labels, collation_strategy="sequence_classification").build(rows)
    assert batch["labels"]["celltype"].tolist() == [1, -100, 0]
    assert batch["labels"]["celltype"].dtype == torch.int64
    assert batch["labels"]["age"].dtype == torch.float32
    assert batch["cell_index"].tolist() == rows.tolist()
    assert set(make_builder(store, labels=labels, mlm=False).build(rows)["labels"]) == {"celltype", "age"}
    assert set(make_builder(store, labels=labels).build(rows)["labels"]) == {"celltype", "age", "expressions"}
    only = make_builder(store, labels=labels, collation_strategy="language_modeling").build(rows)
    assert set(only["labels"]) == {"expressions"}


@pytest.mark.parametrize("rows", [[6], [-1]])
def test_rows_outside_the_store_are_refused(rows):
    with pytest.raises(DataError, match=r"rows 0\.\.5"):
        make_builder(many_cells(6)).build(np.array(rows))


def test_arrays_that_do_not_fit_the_store_are_refused():
    store = many_cells(4)
    with pytest.raises(DataError, match="40 gene columns"):
        BatchBuilder(store, [FieldSpec("genes", "genes", column_ids=column_ids()[:39])], BatchingConfig())
    with pytest.raises(DataError, match="labels of 'celltype' are 3"):
        make_builder(store, labels={"celltype": np.zeros(3, np.int64)})
    broken = many_cells(4)
    broken.indptr[-1] += 7
    with pytest.raises(DataError, match="do not fit"):
        make_builder(broken)


@pytest.mark.parametrize("order", [None, "random", "sorted"])
def test_a_gene_column_that_does_not_exist_is_refused(order):
    """A damaged file must not read memory it does not own."""
    store = many_cells(4)
    builder = make_builder(store, sequence_order=order)
    store.indices[store.indptr[2]] = 10**6
    builder.build(np.array([0, 1]))
    with pytest.raises(DataError, match="cell 'cell-2' names a gene column outside 0..39".replace("..", r"\.\.")):
        builder.build(np.array([0, 1, 2]))


def test_the_batch_does_not_share_the_rows_given():
    rows = np.arange(3)
    batch = make_builder(many_cells(4)).build(rows)
    rows[:] = 3
    assert batch["cell_index"].tolist() == [0, 1, 2]
