"""Masking: what may be selected, what becomes of it, how often, and that nothing but (seed, epoch, cell) decides it."""

import numpy as np
import pytest
import torch
from batching_cases import (
    MASK,
    N_GENES,
    UNK,
    MemoryStore,
    cells,
    column_ids,
    make_builder,
    many_cells,
    ratios,
    settings,
)
from hypothesis import HealthCheck, given
from hypothesis import settings as limits
from hypothesis import strategies as st

from bmfm_pipeline.batching import BatchBuilder, BatchingConfig, FieldSpec, gene_mask_weights
from bmfm_pipeline.batching.kernels import IGNORED

FEW = limits(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
BOTH = ("genes", "expressions")


def real_positions(batch) -> torch.Tensor:
    lengths = batch["attention_mask"].sum(1, keepdim=True)
    places = torch.arange(batch["input_ids"].shape[2])
    return (places > 0) & (places < lengths - 1)


@FEW
@given(
    rows=cells,
    config=settings,
    ratio=ratios,
    masked=st.sampled_from([BOTH, ("genes",), ("expressions",)]),
    tokenized=st.booleans(),
    together=st.booleans(),
    unknown=st.sets(st.integers(0, N_GENES - 1), max_size=10),
)
def test_invariants(rows, config, ratio, masked, tokenized, together, unknown):
    change, mask, switch = ratio
    together = together and switch == 0
    config = {
        **config,
        "change_ratio": change,
        "mask_ratio": mask,
        "switch_ratio": switch,
        "comask_across_fields": together,
    }
    store, everything = MemoryStore(rows), np.arange(len(rows))
    before = make_builder(store, unknown, tokenized=tokenized, mlm=False, **config).build(everything, 3)
    after = make_builder(store, unknown, masked, tokenized=tokenized, **config).build(everything, 3)
    real = real_positions(before)
    assert set(after["labels"]) == set(masked)
    hidden = {}
    for number, field in enumerate(BOTH):
        was, now = before["input_ids"][:, number], after["input_ids"][:, number]
        if field not in masked:
            assert torch.equal(was, now)
            continue
        labels = after["labels"][field]
        continuous = field == "expressions" and not tokenized
        assert labels.dtype == (torch.float32 if continuous else torch.int64)
        selected = labels != IGNORED
        assert not (selected & ~real).any()
        assert torch.equal(was[~selected], now[~selected])
        assert torch.equal(labels[selected], was[selected].to(labels.dtype))
        hidden[field] = now == (-(MASK + 1) if continuous else MASK)
        assert not (hidden[field] & ~selected).any()
        if not continuous and not together:
            assert not (selected & (was == UNK)).any()
        switched = now[selected & ~hidden[field]]
        if continuous:
            assert (switched >= 0).all()
        elif not together:
            assert (switched >= 5).all()
            assert (switched < (N_GENES + 5 if field == "genes" else 15)).all()
        if mask == 0:
            assert not hidden[field].any()
        if mask == 1:
            assert torch.equal(hidden[field], selected)
    if len(masked) == 2:
        if together:
            assert torch.equal(hidden["genes"], hidden["expressions"])
        else:
            assert not (hidden["genes"] & hidden["expressions"]).any()


@FEW
@given(rows=cells, config=settings, ratio=ratios, tokenized=st.booleans(), data=st.data())
def test_neighbours_and_batch_shape_change_nothing(rows, config, ratio, tokenized, data):
    """Each cell alone, and any partition of the cells, gives what the whole batch gives."""
    config = {**config, **dict(zip(("change_ratio", "mask_ratio", "switch_ratio"), ratio, strict=True))}
    builder = make_builder(MemoryStore(rows), masked=BOTH, tokenized=tokenized, **config)
    order = np.array(data.draw(st.permutations(range(len(rows)))))
    cut = data.draw(st.integers(0, len(rows)))
    whole = builder.build(np.arange(len(rows)), 2)
    for part in (order[:cut], order[cut:], *([row] for row in order)):
        batch = builder.build(np.array(part, dtype=np.int64), 2)
        for place, row in enumerate(part):
            length = int(batch["attention_mask"][place].sum())
            assert length == int(whole["attention_mask"][row].sum())
            assert torch.equal(batch["input_ids"][place, :, :length], whole["input_ids"][row, :, :length])
            for field, labels in batch["labels"].items():
                assert torch.equal(labels[place, :length], whole["labels"][field][row, :length])


def test_seed_and_epoch_decide():
    store, rows = many_cells(32), np.arange(32)
    builder = make_builder(store, sequence_order="random")
    first, again, later = builder.build(rows, 0), builder.build(rows, 0), builder.build(rows, 1)
    other = make_builder(store, sequence_order="random", seed=99).build(rows, 0)
    same = make_builder(store, sequence_order="random").build(rows, 0)
    for batch, equal in ((again, True), (same, True), (later, False), (other, False)):
        assert torch.equal(first["input_ids"], batch["input_ids"]) == equal
        assert torch.equal(first["labels"]["expressions"], batch["labels"]["expressions"]) == equal


@pytest.mark.parametrize("padding", ["longest", "max_length"])
def test_rate_of_each_field_is_exact_over_real_positions(padding):
    """Padding and special tokens do not enter the rate, nor does the first field lower that of the second."""
    store = many_cells(200, genes_per_cell=20)
    config = {"change_ratio": 0.3, "mask_ratio": 0.8, "switch_ratio": 0.1, "max_length": 256, "padding": padding}
    builder = make_builder(store, masked=BOTH, **config)
    batches = [builder.build(np.arange(200), epoch) for epoch in range(25)]
    total = 25 * 200 * 20
    error = 5 * np.sqrt(0.3 * 0.7 / total)
    for number, field in enumerate(BOTH):
        selected = sum(int((batch["labels"][field] != IGNORED).sum()) for batch in batches) / total
        hidden = sum(int((batch["input_ids"][:, number] == MASK).sum()) for batch in batches) / total
        assert abs(selected - 0.3) < error
        assert abs(hidden - 0.24) < error


def test_unknown_values_raise_the_rate_elsewhere():
    """Half of the values have no token: the other half is selected twice as often, so that the share of the cell is kept."""
    store = MemoryStore([{gene: 3 if gene % 2 else 99 for gene in range(N_GENES)}] * 500)
    builder = make_builder(store, change_ratio=0.2, max_length=64)
    labels = builder.build(np.arange(500))["labels"]["expressions"]
    assert abs(float((labels != IGNORED).sum()) / (500 * N_GENES) - 0.2) < 0.02
    assert set(labels[labels != IGNORED].tolist()) == {8}
    full = make_builder(store, change_ratio=0.9, max_length=64).build(np.arange(500))["labels"]["expressions"]
    assert int((full != IGNORED).sum()) == 500 * N_GENES // 2


def test_switched_tokens_are_uniform_and_never_special():
    ids = column_ids()
    barred = (7, 30, 31)
    fields = [
        FieldSpec("genes", "genes", is_masked=True, vocab_size=N_GENES + 5, column_ids=ids, never_switch=barred),
        FieldSpec("expressions", "values", value_ids=np.arange(5, 15), vocab_size=15),
    ]
    config = BatchingConfig(change_ratio=1.0, mask_ratio=0.0, switch_ratio=1.0, max_length=32)
    store = many_cells(300)
    builder = BatchBuilder(store, fields, config)
    drawn = torch.cat(
        [builder.build(np.arange(300), epoch)["input_ids"][:, 0, 1:21].reshape(-1) for epoch in range(10)]
    )
    counts = np.bincount(drawn.numpy(), minlength=N_GENES + 5)
    allowed = np.array([token for token in range(5, N_GENES + 5) if token not in barred])
    assert counts.sum() == counts[allowed].sum()
    expected = len(drawn) / len(allowed)
    assert np.abs(counts[allowed] - expected).max() < 5 * np.sqrt(expected)


def test_switched_continuous_values_come_from_other_positions_of_the_cell():
    store = MemoryStore([{gene: 100 * cell + gene + 1 for gene in range(20)} for cell in range(50)], dtype=np.float32)
    builder = make_builder(store, tokenized=False, change_ratio=1.0, mask_ratio=0.0, switch_ratio=1.0)
    plain = make_builder(store, tokenized=False, mlm=False).build(np.arange(50))["input_ids"][:, 1, 1:21]
    found = builder.build(np.arange(50))["input_ids"][:, 1, 1:21]
    assert (found != plain).all()
    assert all(set(now.tolist()) <= set(was.tolist()) for now, was in zip(found, plain, strict=True))
    lonely = make_builder(
        MemoryStore([{3: 2.5}], np.float32), tokenized=False, change_ratio=1.0, mask_ratio=0.0, switch_ratio=1.0
    )
    assert lonely.build(np.array([0]))["input_ids"][0, 1, 1] == 2.5


def test_weights_of_genes():
    store = many_cells(400)
    weights = gene_mask_weights(store.var_names, [("GENE1", 0.0), ("GENE2$", 4.0)])
    assert weights[[1, 10, 19]].tolist() == [0, 0, 0]
    assert weights[2] == 4
    assert weights[20] == 1
    builder = make_builder(store, masked=BOTH, weights=weights, change_ratio=0.1)
    plain = make_builder(store, mlm=False).build(np.arange(400))["input_ids"][:, 0]
    never = torch.isin(plain, torch.tensor([5 + gene for gene in (1, *range(10, 20))]))
    often, usual = plain == 7, torch.isin(plain, torch.tensor([8, 9, 25, 40]))
    # Genes masked often leave fewer places to the second field.
    for number, low, high in ((0, 3.2, 4.5), (1, 1.6, 2.6)):
        picked = [builder.build(np.arange(400), epoch)["labels"][BOTH[number]] != IGNORED for epoch in range(40)]
        rate = torch.stack(picked).float().mean(0)
        assert not rate[never].any()
        assert low < float(rate[often].mean() / rate[usual].mean()) < high
        assert abs(float(rate.sum() / (400 * 20)) - 0.1) < 0.005


@pytest.mark.parametrize("tokenized", [True, False])
def test_labels_from_a_label_field(tokenized):
    """A field label_expressions of raw counts gives the labels, whatever order and sparsity its matrix has."""
    store = many_cells(30)
    store.counts = MemoryStore([{gene: 10 * value for gene, value in store.cell(row)[::2]} for row in range(30)])
    fields = [
        FieldSpec("genes", "genes", vocab_size=N_GENES + 5, column_ids=column_ids()),
        FieldSpec("expressions", "values", is_masked=True, vocab_size=15, value_ids=np.arange(5, 15)),
        FieldSpec(
            "label_expressions",
            "values",
            tokenized=tokenized,
            is_input=False,
            value_ids=np.arange(5, 105),
            layer="counts",
        ),
    ]
    config = BatchingConfig(change_ratio=0.5, max_length=32, sequence_order="random")
    batch = BatchBuilder(store, fields, config).build(np.arange(30), 1)
    assert batch["input_ids"].shape[1] == 2
    labels = batch["labels"]["expressions"]
    assert labels.dtype == (torch.int64 if tokenized else torch.float32)
    for row, place in (labels != IGNORED).nonzero().tolist():
        gene = int(batch["input_ids"][row, 0, place]) - 5
        count = dict(store.counts.cell(row)).get(gene, 0)
        assert labels[row, place] == (count + 5 if tokenized else count)
    assert (labels != IGNORED).any()


def test_label_values_without_a_token_are_not_predicted_but_counted():
    store = MemoryStore([{0: 1, 1: 2}])
    store.counts = MemoryStore([{0: 3, 1: 99}])
    fields = [
        FieldSpec("genes", "genes", vocab_size=N_GENES + 5, column_ids=column_ids()),
        FieldSpec("expressions", "values", is_masked=True, vocab_size=15, value_ids=np.arange(5, 15)),
        FieldSpec("label_expressions", "values", is_input=False, value_ids=np.arange(5, 15), layer="counts"),
    ]
    builder = BatchBuilder(store, fields, BatchingConfig(change_ratio=1.0, max_length=16))
    assert builder.build(np.array([0]))["labels"]["expressions"][0, :4].tolist() == [IGNORED, 8, IGNORED, IGNORED]
    assert builder.report.values_outside_vocabulary == 1


def test_masked_positions_are_hidden_from_attention():
    store = MemoryStore([{0: 1, 1: 2, 2: 3}, {0: 1}])
    builder = make_builder(
        store, prevent_attention_to_masked=True, change_ratio=0.5, max_length=8, pad_to_multiple_of=8
    )
    batch = next(
        batch
        for epoch in range(100)
        if (batch := builder.build(np.arange(2), epoch))["input_ids"][0, 1].tolist()[1:4] == [6, 7, MASK]
    )
    attention = batch["attention_mask"]
    assert attention.shape == (2, 8, 8)
    assert attention[0, :5, :5].tolist() == [
        [1, 1, 1, 0, 1],
        [1, 1, 1, 0, 1],
        [1, 1, 1, 0, 1],
        [0, 1, 1, 1, 0],
        [1, 1, 1, 0, 1],
    ]
    assert not attention[0, 5:].any()
    assert not attention[0, :, 5:].any()
