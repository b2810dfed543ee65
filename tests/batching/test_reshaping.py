"""Zeros, dropout, chromosomes, medians, read depth and flags: what any cells become under any of them, together and alone."""

import numpy as np
import pytest
import torch
from batching_cases import MASK, N_GENES, MemoryStore, cells, column_ids, many_cells
from hypothesis import HealthCheck, given
from hypothesis import settings as limits
from hypothesis import strategies as st

from bmfm_pipeline.batching import BatchBuilder, BatchingConfig, FieldSpec, GeneTables, ZeroExposure, genome_places
from bmfm_pipeline.batching.draws import binomial, poisson, stream
from bmfm_pipeline.batching.kernels import IGNORED
from bmfm_pipeline.errors import ConfigError, DataError

FEW = limits(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
S, T = N_GENES + 5, N_GENES + 6
PLACES = genome_places([f"chr{gene % 4}" if gene % 5 else None for gene in range(N_GENES)], np.arange(N_GENES)[::-1])


def build(
    store, tokenized=False, masked=(), tables=None, layers=(), allowed=None, labels=False, weights=None, **config
):
    """Genes and expressions, further fields from layers of the store, and label_expressions."""
    fields = [
        FieldSpec("genes", "genes", is_masked="genes" in masked, vocab_size=T + 1, column_ids=column_ids()),
        FieldSpec(
            "expressions", "values", tokenized, "expressions" in masked, vocab_size=25, value_ids=np.arange(5, 25)
        ),
        *(FieldSpec(name, "values", value_ids=np.arange(5, 7), layer=name) for name in layers),
    ]
    if labels:
        fields.append(FieldSpec("label_expressions", "values", tokenized=False, is_input=False))
    config = {"max_length": 32, "depth_ids": (S, T), **config}
    options = {"tables": tables, "allowed_columns": allowed, "mask_weights": weights}
    return BatchBuilder(store, fields, BatchingConfig(**config), **options)


def genes_and_values(batch, row: int, field: int = 1) -> tuple[list[int], list[float]]:
    """Gene columns and values of a cell, special tokens left out."""
    last = int(batch["attention_mask"][row].sum()) - 1
    return (batch["input_ids"][row, 0, 1:last] - 5).long().tolist(), batch["input_ids"][row, field, 1:last].tolist()


zeros = st.one_of(
    st.none(),
    st.builds(
        ZeroExposure,
        st.sampled_from(["batch_wise", "random"]),
        st.sampled_from([None, 0.0, 0.3, 0.5, 1.0]),
        st.sampled_from([0.0, 0.5, 1.0]),
        st.sampled_from([1, 4, 10]),
    ),
)
options = st.fixed_dictionaries(
    {
        "sequence_order": st.sampled_from([None, "random", "sorted", "chromosomal"]),
        "max_length": st.sampled_from([16, 32, 64]),
        "max_mfi_data_len": st.sampled_from([None, 3, 9, 100]),
        "padding": st.sampled_from(["max_length", "longest"]),
        "truncation": st.booleans(),
        "sequence_dropout_factor": st.sampled_from([None, 0.0, 0.4, 3, 100]),
        "selective_dropout": st.sampled_from([0.0, 0.3]),
        "rda_transform": st.sampled_from([None, "downsample", "poisson_downsample", "equal", 500]),
        "seed": st.sampled_from([0, 2**63 + 11]),
    }
)


@FEW
@given(
    rows=cells, config=options, exposed=st.booleans(), zeros=zeros, masked=st.booleans(), medians=st.booleans(),
    allowed=st.sets(st.integers(0, N_GENES - 1), min_size=5), flags=st.sets(st.integers(0, N_GENES - 1), max_size=4),
    tokenized=st.booleans(),
)  # fmt: skip
def test_any_cells_under_any_options(rows, config, exposed, zeros, masked, medians, allowed, flags, tokenized):
    store = MemoryStore(rows)
    store.perturbations = MemoryStore([dict.fromkeys(flags, 1)] * len(rows))
    table = np.where(np.arange(N_GENES) % 7, 1.0, np.nan).astype(np.float32) if medians else None
    tables = GeneTables(medians=table, places=PLACES[0], chromosomes=PLACES[1])
    builder = build(
        store, tokenized, ("expressions",) if masked else (), tables, ("perturbations",), allowed, masked, change_ratio=0.5,
        expose_zeros=exposed, zeros=zeros if exposed else None, wced_targets=() if masked else ("input", "non_input", "all"), **config,
    )  # fmt: skip
    everything, lead = np.arange(len(rows)), 2 if config["rda_transform"] else 0
    batch = builder.build(everything, 3)
    again = builder.build(everything, 3)
    assert torch.equal(batch["input_ids"], again["input_ids"])
    ids, attention = batch["input_ids"], batch["attention_mask"]
    assert not torch.isnan(ids.float()).any()
    room = config["max_mfi_data_len"] or 10**6
    if config["truncation"]:
        room = min(room, config["max_length"] - 2)
    usable = {gene for gene in allowed if not medians or gene % 7}
    for row in range(len(rows)):
        last = int(attention[row].sum()) - 1
        assert attention[row].tolist() == [1] * (last + 1) + [0] * (ids.shape[2] - last - 1)
        assert ids[row, 0, [0, last]].tolist() == [3, 1]
        assert (ids[row, 0, last + 1 :] == 2).all()
        assert lead <= last - 1 <= max(room, lead)
        if lead:
            assert ids[row, 0, 1:3].tolist() == [S, T]
            assert ids[row, 2, 1:3].tolist() == [5, 5]
        genes = (ids[row, 0, 1 + lead : last] - 5).long().tolist()
        assert set(genes) <= usable
        stored = {gene: value for gene, value in store.cell(row) if value > 0 or not exposed}
        if not exposed:
            assert set(genes) <= set(stored)
        if config["sequence_order"] == "chromosomal":
            own = [gene for gene in genes if stored.get(gene, 0) > 0 and gene not in flags]
            assert all(PLACES[0][gene] >= 0 for gene in own)
        else:
            assert len(set(genes)) == len(genes)
        told = ids[row, 2, 1 + lead : last].tolist()
        assert told == sorted(told, reverse=True)
        assert told == [6 if gene in flags else 5 for gene in genes]
        if config["rda_transform"] is None and not masked:
            shown = ids[row, 1, 1:last].tolist()
            expected = [stored.get(gene, 0) for gene in genes]
            assert shown == [value + 5 for value in expected] if tokenized else shown == expected
    if masked:
        labels = batch["labels"]["expressions"]
        assert ((labels == IGNORED) | (labels >= 0)).all()
        hidden = ids[:, 1] == (MASK if tokenized else -(MASK + 1))
        assert not (hidden & (labels == IGNORED)).any()
        places = torch.arange(ids.shape[2])
        real = (places > lead) & (places < attention.sum(1, keepdim=True) - 1)
        assert not ((labels != IGNORED) & ~real).any()
    else:
        check_whole_cells(batch, store, usable, exposed, lead)


def check_whole_cells(batch, store, usable: set[int], exposed: bool, lead: int) -> None:
    """Inputs and non-inputs share out all targets; each is the value of its gene, and no unknown gene has one."""
    sets = batch["labels"]["expressions"]
    told = {name: target != IGNORED for name, target in sets.items()}
    assert torch.equal(told["input"] | told["non_input"], told["all"])
    assert not (told["input"] & told["non_input"]).any()
    assert torch.equal(torch.maximum(sets["input"], sets["non_input"]), sets["all"])
    for row, target in enumerate(told["all"]):
        last = int(batch["attention_mask"][row].sum()) - 1
        stored = {gene for gene, _ in store.cell(row)} & usable
        assert set((target.nonzero().flatten() - 5).tolist()) == (usable if exposed else stored)
        seen = set((batch["input_ids"][row, 0, 1 + lead : last] - 5).long().tolist())
        assert set((told["input"][row].nonzero().flatten() - 5).tolist()) == seen


@FEW
@given(rows=cells, config=options, data=st.data())
def test_neighbours_change_nothing(rows, config, data):
    """Each cell alone gives what the whole batch gives, wherever zeros are not those of the batch."""
    tables = GeneTables(places=PLACES[0], chromosomes=PLACES[1])
    config["expose_zeros"] = data.draw(st.booleans())
    if config["expose_zeros"]:
        config["zeros"] = data.draw(st.sampled_from([None, ZeroExposure("random", None, 0.5)]))
    builder = build(MemoryStore(rows), masked=("genes", "expressions"), tables=tables, labels=True, **config)
    whole = builder.build(np.arange(len(rows)), 2)
    for row in range(len(rows)):
        alone = builder.build(np.array([row]), 2)
        length = int(alone["attention_mask"].sum())
        assert length == int(whole["attention_mask"][row].sum())
        assert torch.equal(alone["input_ids"][0, :, :length], whole["input_ids"][row, :, :length])
        for field, labels in alone["labels"].items():
            assert torch.equal(labels[0, :length], whole["labels"][field][row, :length])


def test_zeros_of_the_batch_depend_on_its_cells_and_not_on_their_order():
    store = many_cells(6, genes_per_cell=8)
    builder = build(store, expose_zeros=True, zeros=ZeroExposure("batch_wise", 0.5))
    first, turned = builder.build(np.arange(6), 1), builder.build(np.arange(6)[::-1], 1)
    assert torch.equal(first["input_ids"], turned["input_ids"].flip(0))
    fewer = builder.build(np.arange(2), 1)
    genes = [set(genes_and_values(fewer, row)[0]) for row in (0, 1)]
    both = {gene for row in (0, 1) for gene, _ in store.cell(row)}
    assert all(both <= shown for shown in genes), "genes of the batch come first"


def test_outside_training_zeros_do_not_depend_on_the_cells_beside():
    store = many_cells(6, genes_per_cell=8)
    builder = build(store, expose_zeros=True, zeros=ZeroExposure("batch_wise", 0.5))
    whole = builder.build(np.arange(6), 0, training=False)["input_ids"]
    alone = torch.cat([builder.build(np.array([row]), 0, training=False)["input_ids"] for row in range(6)])
    assert torch.equal(whole, alone)


def test_zeros_take_turns_with_expressed_genes():
    store = MemoryStore([{gene: 1 for gene in range(0, 20)}, {gene: 1 for gene in range(20, 40)}])
    builder = build(store, max_length=32, expose_zeros=True, zeros=ZeroExposure("batch_wise", 0.25, granularity=4))
    _, values = genes_and_values(builder.build(np.arange(2)), 0)
    assert values[:24] == [1, 0, 0, 0] * 6


def test_all_zeros_are_shown_in_the_order_of_columns_or_after_sorted_genes():
    store = MemoryStore([{5: 2, 3: 7, 30: 1}])
    wide = {"max_length": 64, "expose_zeros": True}
    genes, values = genes_and_values(build(store, **wide).build([0]), 0)
    assert genes == list(range(N_GENES))
    assert sum(values) == 10
    genes, values = genes_and_values(build(store, sequence_order="sorted", **wide).build([0]), 0)
    assert genes == [3, 5, 30, *(gene for gene in range(N_GENES) if gene not in (3, 5, 30))]
    assert values[:4] == [7, 2, 1, 0]
    genes, _ = genes_and_values(build(store, sequence_order="random", **wide).build([0]), 0)
    assert sorted(genes) == list(range(N_GENES)) != genes


def test_dropout_and_reduction_belong_to_training():
    store = many_cells(40, low=200, high=400)
    plain = build(store).build(np.arange(40))["input_ids"]
    for config in ({"sequence_dropout_factor": 0.5}, {"sequence_dropout_factor": 5}, {"selective_dropout": 0.5}):
        builder = build(store, **config)
        assert torch.equal(builder.build(np.arange(40), training=False)["input_ids"], plain)
        assert not torch.equal(builder.build(np.arange(40))["input_ids"], plain)
    builder = build(store, rda_transform="downsample", mlm=False)
    equal = build(store, rda_transform="equal", mlm=False).build(np.arange(40))["input_ids"]
    assert torch.equal(builder.build(np.arange(40), training=False)["input_ids"], equal)
    assert not torch.equal(builder.build(np.arange(40))["input_ids"], equal)
    masked = build(store, masked=("expressions",), labels=True, rda_transform="downsample")
    shown = masked.build(np.arange(40), training=False)["input_ids"][:, 1, 1:3]
    assert (shown[:, 0] < shown[:, 1]).any(), "masked values are predicted from fewer reads in evaluation too"


@pytest.mark.parametrize("mode", ["downsample", "poisson_downsample"])
def test_labels_of_reduced_cells_are_their_values_before_on_the_same_scale(mode):
    store = many_cells(60, low=100, high=400)
    builder = build(store, masked=("expressions",), labels=True, rda_transform=mode, change_ratio=1.0, mask_ratio=0.0)
    batch = builder.build(np.arange(60))
    shown, labels = batch["input_ids"][:, 1, 3:23], batch["labels"]["expressions"][:, 3:23]
    counts = torch.tensor([[dict(store.cell(row))[gene - 5] for gene in genes] for row, genes in
                           enumerate(batch["input_ids"][:, 0, 3:23].int().tolist())])  # fmt: skip
    scale = 1.0 if mode == "poisson_downsample" else 1e4 / counts.sum(1, keepdim=True)
    torch.testing.assert_close(labels, torch.log1p(counts * scale).float())
    reads = torch.expm1(batch["input_ids"][:, 1, 1:3].double())
    torch.testing.assert_close(reads[:, 1], counts.sum(1).double(), rtol=1e-5, atol=0)
    own = torch.expm1(shown.double()) * (1 if mode == "poisson_downsample" else reads[:, :1] / 1e4)
    torch.testing.assert_close(own.sum(1), reads[:, 0], rtol=1e-4, atol=1e-4)
    assert (own.round() <= counts).all()


def test_reduction_of_values_that_are_no_counts_is_refused():
    store = MemoryStore([{1: 2.0}, {1: 2.0, 3: 0.5}], dtype=np.float32)
    with pytest.raises(DataError, match=r"cell 'cell-1' holds values that are no whole numbers.*rda_transform=equal"):
        build(store, rda_transform="downsample").build(np.arange(2))
    assert build(store, rda_transform="equal").build(np.arange(2))["input_ids"][1, 1, 1] > 0


def test_read_depth_comes_from_the_counts_that_the_store_keeps():
    store = many_cells(3)
    store.counts = MemoryStore([{gene: 100 * value for gene, value in store.cell(row)} for row in range(3)])
    batch = build(store, rda_transform=5000, values_from="counts", mlm=False).build(np.arange(3))
    totals = [sum(value for _, value in store.counts.cell(row)) for row in range(3)]
    np.testing.assert_allclose(batch["input_ids"][:, 1, 1].numpy(), np.log1p(totals), rtol=1e-6)
    np.testing.assert_allclose(batch["input_ids"][:, 1, 2].numpy(), np.log1p(5000), rtol=1e-6)
    with pytest.raises(DataError, match="no matrix 'counts'"):
        build(many_cells(3), rda_transform=5000, values_from="counts")


def test_read_depths_stand_behind_any_prefix_and_are_never_masked():
    store = many_cells(30)
    config = {
        "prefix_ids": (7, 8, 9),
        "rda_transform": "equal",
        "change_ratio": 1.0,
        "prevent_attention_to_masked": True,
    }
    batch = build(store, masked=("expressions",), labels=True, **config).build(np.arange(30))
    assert batch["input_ids"][0, 0, :5].tolist() == [7, 8, 9, S, T]
    labels = batch["labels"]["expressions"]
    assert (labels[:, :5] == IGNORED).all() and (labels[:, 5:25] != IGNORED).all()
    assert (batch["input_ids"][:, 1, 3:5] > 0).all()
    attention = batch["attention_mask"]
    assert attention[:, 6, 6].all() and not attention[:, 6, :5].any(), "a masked gene sees no special position"
    assert attention[:, 0, :5].all()


def test_chromosomes():
    """Genes follow their positions, chromosome by chromosome; expressed ones are drawn by the logarithm of their values."""
    store = MemoryStore([{gene: 1 if gene % 2 else 7 for gene in range(N_GENES)}])
    tables = GeneTables(places=PLACES[0], chromosomes=PLACES[1])
    builder = build(store, tables=tables, sequence_order="chromosomal", max_length=32, mlm=False)
    assert builder.report.genes_without_position == N_GENES // 5
    drawn, firsts = np.zeros(N_GENES), []
    for epoch in range(400):
        genes, _ = genes_and_values(builder.build([0], epoch), 0)
        assert len(genes) == 30
        chromosomes = [gene % 4 for gene in genes]
        changes = [a for a, b in zip(chromosomes, [*chromosomes[1:], None], strict=True) if a != b]
        assert len(set(changes)) == len(changes), "each chromosome is one stretch"
        for number in set(chromosomes):
            own = [gene for gene in genes if gene % 4 == number]
            assert own == sorted(own, reverse=True), "start coordinates descend with the number of these genes"
        np.add.at(drawn, genes, 1)
        firsts.append(changes[0])
    assert (drawn[::5] == 0).all()
    known = np.arange(N_GENES) % 5 > 0
    rate = drawn[known & (np.arange(N_GENES) % 2 == 0)].mean() / drawn[known & (np.arange(N_GENES) % 2 == 1)].mean()
    assert abs(rate - 3) < 0.3  # log1p(7) / log1p(1)
    assert np.abs(np.bincount(firsts, minlength=4) - 100).max() < 5 * np.sqrt(75)


def test_flagged_genes_come_first_and_survive_the_cut():
    store = many_cells(5)
    store.perturbations = MemoryStore([{39: 0} | {gene: 1 for gene, _ in store.cell(row)[-2:]} for row in range(5)])
    batch = build(store, layers=("perturbations",), max_length=16, sequence_order="sorted").build(np.arange(5))
    for row in range(5):
        genes, told = genes_and_values(batch, row, 2)
        assert set(genes[:2]) == {gene for gene, _ in store.cell(row)[-2:]}
        assert told == [6, 6] + [5] * 12
        values = genes_and_values(batch, row)[1]
        assert values[2:] == sorted(values[2:], reverse=True)


def test_medians_divide_and_genes_without_one_are_counted():
    table = np.full(N_GENES, 2, np.float32)
    table[[4, 6]] = np.nan
    store = MemoryStore([{3: 8, 4: 5, 5: 6}])
    builder = build(store, tables=GeneTables(medians=table), log_normalize_transform=True, mlm=False)
    genes, values = genes_and_values(builder.build([0]), 0)
    assert genes == [3, 5]
    np.testing.assert_allclose(values, np.log1p(np.array([4, 3]) * 1e4 / 8), rtol=1e-6)
    assert builder.report.genes_without_median == 2


def test_only_allowed_genes_enter():
    store = many_cells(10)
    builder = build(store, allowed={1, 2, 3, 30})
    batch = builder.build(np.arange(10))
    for row in range(10):
        expected = [(gene, value) for gene, value in store.cell(row) if gene in (1, 2, 3, 30)]
        assert list(zip(*genes_and_values(batch, row), strict=True)) == expected
    assert builder.report.genes_not_allowed == N_GENES - 4
    with pytest.raises(DataError, match=r"gene columns are 0\.\.39"):
        build(store, allowed={40})


class GatheredStore(MemoryStore):
    """A store that is not one matrix: it hands out the rows asked for."""

    contiguous = False

    def __init__(self, store):
        self.inner, self.obs_names, self.var_names, self.shape = store, store.obs_names, store.var_names, store.shape

    def gather(self, rows):
        sizes = [slice(self.inner.indptr[row], self.inner.indptr[row + 1]) for row in rows]
        indptr = np.cumsum([0, *(size.stop - size.start for size in sizes)])
        parts = [np.concatenate([array[size] for size in sizes]) for array in (self.inner.indices, self.inner.data)]
        return indptr, *parts


@pytest.mark.parametrize(
    "config", [{}, {"sequence_order": "sorted"}, {"sequence_order": "random", "rda_transform": "equal"}]
)
def test_a_store_that_gathers_rows_gives_the_same_batches(config):
    store = many_cells(20)
    store.counts = many_cells(20, seed=1)
    gathered = GatheredStore(store)
    gathered.counts = GatheredStore(store.counts)
    rows = np.array([7, 0, 19, 3])
    fields = dict(masked=("expressions",), labels=True, **config)
    expected, found = (build(which, **fields).build(rows, 5) for which in (store, gathered))
    assert torch.equal(expected["input_ids"], found["input_ids"])
    assert torch.equal(expected["labels"]["expressions"], found["labels"]["expressions"])


def test_mask_weights_hold_from_an_epoch_on():
    store, rows = many_cells(50), np.arange(50)
    builder = build(store, masked=("expressions",), change_ratio=0.3)
    never = np.where(np.arange(N_GENES) < 20, 0, 1).astype(np.float32)
    before = builder.build(rows, 4)
    builder.set_mask_weights(never, from_epoch=5)
    assert torch.equal(builder.build(rows, 4)["input_ids"], before["input_ids"]), "an epoch begun goes on as it was"
    batch = builder.build(rows, 5)
    chosen = batch["input_ids"][:, 0][batch["labels"]["expressions"] != IGNORED]
    assert (chosen >= 25).all()
    shown = builder.build(rows, 0, training=False)["labels"]["expressions"] != IGNORED
    assert not torch.equal(shown, before["labels"]["expressions"] != IGNORED)
    uniform = build(store, masked=("expressions",), change_ratio=0.3, weigh_evaluation=False, weights=never)
    held = uniform.build(rows, 0, training=False)
    assert (held["input_ids"][:, 0][held["labels"]["expressions"] != IGNORED] < 25).any()
    for wrong in (never[:5], -never, never * np.nan):
        with pytest.raises(DataError, match="mask_weights"):
            builder.set_mask_weights(wrong)


def test_dropout_weights_can_be_changed():
    store = many_cells(50)
    builder = build(store, selective_dropout=0.5)
    builder.set_dropout_weights(np.where(np.arange(N_GENES) < 20, 0, 1).astype(np.float32))
    kept = [set(genes_and_values(builder.build(np.arange(50)), row)[0]) for row in range(50)]
    low = [{gene for gene, _ in store.cell(row) if gene < 20} for row in range(50)]
    assert all(one <= two for one, two in zip(low, kept, strict=True))
    assert sum(map(len, kept)) < 50 * 20
    with pytest.raises(DataError, match="0 for every gene"):
        builder.set_dropout_weights(np.zeros(N_GENES, np.float32))
    with pytest.raises(DataError, match="dropout_weights has 3 entries"):
        builder.set_dropout_weights(np.ones(3, np.float32))


def test_tables_that_do_not_fit_are_refused():
    with pytest.raises(DataError, match="medians has 3 entries, there are 40 gene columns"):
        build(many_cells(2), tables=GeneTables(medians=np.ones(3, np.float32)))
    with pytest.raises(DataError, match="above 0"):
        build(many_cells(2), tables=GeneTables(medians=np.zeros(N_GENES, np.float32)))
    with pytest.raises(ConfigError, match="needs gene_positions"):
        build(many_cells(2), sequence_order="chromosomal")


@pytest.mark.parametrize(("n", "p"), [(1, 0.3), (12, 0.5), (40, 0.9), (300, 0.1), (300, 0.7), (50_000, 0.02)])
def test_binomial_draws(n, p):
    found = np.array([binomial(np.uint64(stream(1, 0, i, 9)), n, p) for i in range(4000)])
    assert 0 <= found.min() <= found.max() <= n
    variance = n * p * (1 - p)
    assert abs(found.mean() - n * p) < 4.5 * np.sqrt(variance / 4000)
    assert abs(found.var() / variance - 1) < 4.5 * np.sqrt((2 + 1 / variance) / 4000)


@pytest.mark.parametrize("mean", [0.05, 1.7, 9.5, 12.0, 900.0])
def test_poisson_draws(mean):
    found = np.array([poisson(np.uint64(stream(1, 0, i, 9)), mean) for i in range(4000)])
    assert abs(found.mean() - mean) < 4.5 * np.sqrt(mean / 4000)
    assert abs(found.var() / mean - 1) < 4.5 * np.sqrt((2 + 1 / mean) / 4000)
