"""Square roots of shares: what a cell's counts become, wherever they are read and however the cell is reshaped."""

import numpy as np
import pytest
from batching_cases import make_builder, many_cells

from bmfm_pipeline.errors import ConfigError


def as_numbers(store, **settings):
    return make_builder(
        store,
        masked=settings.pop("masked", ()),
        tokenized=False,
        sqrt_normalize_transform=True,
        max_length=64,
        **settings,
    )


def by_gene(batch, row: int) -> dict[int, float]:
    """{gene column: value} of one cell of a batch."""
    genes, values = batch["input_ids"][row].numpy()
    return {int(gene) - 5: float(value) for gene, value in zip(genes, values, strict=True) if gene >= 5}


@pytest.mark.parametrize(
    "more", [{}, {"sequence_order": "random"}, {"sequence_order": "sorted"}, {"expose_zeros": True}]
)
def test_a_value_is_the_root_of_its_share_of_ten_thousand_reads_of_the_cell(more):
    store = many_cells(8, seed=3)
    batch = as_numbers(store, **more).build(np.arange(8))
    for row in range(8):
        cell = dict(store.cell(row))
        total = sum(cell.values())
        found = {gene: value for gene, value in by_gene(batch, row).items() if value}
        assert found == pytest.approx({gene: np.sqrt(1e4 * count / total) for gene, count in cell.items()}, rel=1e-5)
        assert sum(value**2 for value in found.values()) == pytest.approx(1e4, rel=1e-4)


def test_the_total_is_the_whole_cells_also_where_it_is_cut():
    store = many_cells(4, seed=4)
    whole, cut = (as_numbers(store, sequence_order="random") for _ in range(2))
    cut.config = cut.config.__class__(**{**vars(cut.config), "max_length": 16})
    short, long = cut.build(np.arange(4)), whole.build(np.arange(4))
    for row in range(4):
        seen = by_gene(short, row)
        assert 0 < len(seen) <= 14
        assert seen.items() <= by_gene(long, row).items()


def test_masked_values_are_predicted_on_the_same_scale():
    store = many_cells(8, seed=5)
    plain = as_numbers(store).build(np.arange(8))
    batch = as_numbers(store, masked=("expressions",), change_ratio=0.5).build(np.arange(8))
    labels, shown = batch["labels"]["expressions"].numpy(), batch["input_ids"][:, 1].numpy()
    hidden = labels != -100
    assert hidden.any() and (shown[hidden] < 0).all()
    np.testing.assert_allclose(labels[hidden], plain["input_ids"][:, 1].numpy()[hidden], rtol=1e-6)


def test_whole_cell_targets_are_on_the_same_scale():
    store = many_cells(3, seed=6)
    batch = as_numbers(store, wced_targets=("all",)).build(np.arange(3))
    targets = batch["labels"]["expressions"]["all"].numpy()
    for row in range(3):
        expected = {gene: np.sqrt(1e4 * n / sum(dict(store.cell(row)).values())) for gene, n in store.cell(row)}
        places = np.flatnonzero(targets[row] != -100)
        assert dict(zip((places - 5).tolist(), targets[row, places].tolist(), strict=True)) == pytest.approx(expected)


@pytest.mark.parametrize("other", [{"log_normalize_transform": True}, {"rda_transform": "equal", "depth_ids": (5, 6)}])
def test_one_normalisation_is_enough(other):
    with pytest.raises(ConfigError, match="keep one"):
        as_numbers(many_cells(2), **other)
