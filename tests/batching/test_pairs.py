"""Pairs of control and perturbed cells: who stands beside whom, what the model sees, and what it is asked for."""

import numpy as np
import pytest

from bmfm_pipeline.batching import BatchBuilder, BatchingConfig, FieldSpec
from bmfm_pipeline.batching.pairs import PairTable
from bmfm_pipeline.errors import DataError

from .batching_cases import CLS, SEP, MemoryStore

# Columns 0..3 are measured, 4 and 5 are target genes without a value.
CELLS = [
    {0: 1.0, 1: 2.0},  # control
    {0: 3.0, 3: 1.0},  # control
    {0: 5.0, 1: 1.0, 2: 4.0},  # perturbed at 2
    {1: 7.0},  # perturbed at 4
    {0: 2.0, 3: 6.0},  # perturbed at 2 and 5
]
MEAN = np.array([1.0, 2.0, 3.0, 4.0])
TARGETS = [np.array([2]), np.array([4]), np.array([2, 5])]


def store():
    return MemoryStore(CELLS, dtype=np.float32, n_genes=4)


def table(**options):
    settings = {
        "names": ["G2", "G4", "G2_G5"],
        "perturbations": np.array([-1, -1, 0, 1, 2]),
        "targets": TARGETS,
        "measured": 4,
        "controls": np.array([0, 1]),
        "train_mean": MEAN,
    }
    return PairTable(**{**settings, **options})


def builder(pairs=None, ids=range(5, 11), labels=("label_expressions",), show="all", **settings):
    values = {"role": "values", "tokenized": False}
    fields = [
        FieldSpec("genes", "genes", vocab_size=11, column_ids=np.array(list(ids), np.int32)),
        FieldSpec("expressions", **values),
        FieldSpec("perturbations", "values", value_ids=np.array([5, 6], np.int32), vocab_size=7, layer="perturbations"),
        *(FieldSpec(name, **values, is_input=False, layer=name, signed=name.startswith("delta")) for name in labels),
    ]
    config = BatchingConfig(
        collation_strategy="sequence_labeling", mlm=False, max_length=settings.pop("max_length", 16), expose_zeros=show == "all",
        padding="longest", pad_to_multiple_of=None, **settings,
    )  # fmt: skip
    return BatchBuilder(store(), fields, config, pairs=pairs or table())


def read(batch, row=0):
    """[(gene token, expression, flag, *labels)] of one pair, without padding."""
    length = int(batch["attention_mask"][row].sum())
    ids = batch["input_ids"][row, :, :length].numpy()
    labels = [values[row, :length].numpy() for values in batch["labels"].values()]
    assert ids[0, 0] == CLS and ids[0, -1] == SEP
    assert all(values[0] == values[-1] == -100 for values in labels)
    return [
        tuple(float(value) for value in column)
        for column in zip(*ids[:, 1:-1], *(v[1:-1] for v in labels), strict=True)
    ]


def of_control(batch, row):
    return store().cell(int(batch["control_cell_name"][row].rpartition("-")[2]))


def test_the_model_sees_the_control_cell_and_is_asked_for_the_perturbed_one():
    batch = builder().build(np.array([2]), epoch=0)
    control = dict(of_control(batch, 0))
    assert batch["perturbed_genes"] == ["G2"] and batch["cell_name"] == ["cell-2"]
    entries = {token - 5: (value, flag, label) for token, value, flag, label in read(batch)}
    assert set(entries) == {0, 1, 2, 3}, "every measured gene, and no target of another perturbation"
    for column, (value, flag, label) in entries.items():
        assert value == control.get(column, 0)
        assert flag == (6 if column == 2 else 5)
        assert label == CELLS[2].get(column, 0)


def test_a_target_that_was_not_measured_stands_there_without_value_or_label():
    first = read(builder().build(np.array([3])))[0]
    assert first == (9, -1, 6, -100), "token, [UNK], flagged, no label"


def test_perturbed_genes_come_first_and_survive_truncation():
    short = builder(max_length=4).build(np.array([4]))
    assert sorted(entry[0] for entry in read(short)) == [7, 10]
    assert {entry[2] for entry in read(short)} == {6}


def test_a_target_without_a_token_is_kept_as_unknown():
    first = read(builder(ids=[5, 6, 7, 8, 0, 0]).build(np.array([3])))[0]
    assert first == (0, -1, 6, -100)


def test_differences_are_from_the_control_cell_and_from_the_mean_and_may_be_negative():
    batch = builder(labels=("delta_expressions", "delta_baseline_expressions")).build(np.array([3]))
    control, entries = dict(of_control(batch, 0)), read(batch)[1:]
    for token, _, _, delta, from_mean in entries:
        column = int(token) - 5
        assert delta == pytest.approx(CELLS[3].get(column, 0) - control.get(column, 0))
        assert from_mean == pytest.approx(CELLS[3].get(column, 0) - MEAN[column])
    assert min(entry[4] for entry in entries) < 0


def test_hidden_zeros_show_the_control_cell_and_the_targets_or_also_the_perturbed_cell():
    plain = builder(show="no_zeros").build(np.array([2]))
    assert {entry[0] - 5 for entry in read(plain)} == {2, *dict(of_control(plain, 0))}
    wide = builder(table(show="label_nonzeros"), show="label_nonzeros").build(np.array([2]))
    assert {entry[0] - 5 for entry in read(wide)} == {0, 1, 2, *dict(of_control(wide, 0))}


def test_partners_are_drawn_anew_by_epoch_and_depend_on_nothing_else():
    own = builder(table(controls=np.array([0, 1, 2, 3])))
    epochs = [own.build(np.array([4]), epoch)["control_cell_name"][0] for epoch in range(20)]
    assert len(set(epochs)) == 4
    again = builder(table(controls=np.array([0, 1, 2, 3])))
    both = [again.build(np.array([2, 4]), epoch)["control_cell_name"][1] for epoch in range(20)]
    assert both == epochs, "neither other cells of the batch nor the builder matter"
    other = builder(table(controls=np.array([0, 1, 2, 3])), seed=7)
    assert [other.build(np.array([4]), epoch)["control_cell_name"][0] for epoch in range(20)] != epochs


def test_matched_pairs_stay_within_their_group_and_those_without_a_control_are_counted():
    groups = np.array([0, 1, 1, 0, 2])
    own = builder(table(groups=groups))
    for epoch in range(6):
        names = own.build(np.array([2, 3, 4]), epoch)["control_cell_name"]
        assert names[:2] == ["cell-1", "cell-0"] and names[2] in ("cell-0", "cell-1")
    assert own.pairs.without_partner_in_group() == 1


def test_a_control_cell_is_never_its_own_partner_unless_asked():
    names = [builder().build(np.array([0, 1]), epoch)["control_cell_name"] for epoch in range(5)]
    assert names == [["cell-1", "cell-0"]] * 5
    assert builder(table(with_itself=True)).build(np.array([0, 3]))["control_cell_name"] == ["cell-0", "cell-3"]


def test_without_control_cells_there_are_no_pairs():
    with pytest.raises(DataError, match="no control cell"):
        table(controls=np.array([], dtype=np.int64))
