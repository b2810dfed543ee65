"""Batches of sequences: what a person would write by hand, masks, the other strand, and independence of neighbours."""

from types import SimpleNamespace

import numpy as np
import pytest

from bmfm_pipeline.batching import BatchingConfig, FieldSpec, SequenceBuilder
from bmfm_pipeline.errors import ConfigError, DataError

TOKENS = [[10, 11, 12], [20], [], [30, 0, 31, 32, 33, 34]]
OTHER = [[12, 11], [21], [], [40, 41, 42, 43]]


def flat(lists, dtype=np.uint16):
    starts = np.concatenate([[0], np.cumsum([len(one) for one in lists])]).astype(np.int64)
    return np.array([token for one in lists for token in one], dtype=dtype), starts


class Arrays(SimpleNamespace):
    def __len__(self):
        return len(self.token_starts) - 1


def store(tokens=TOKENS, other=OTHER):
    (own, starts), found = flat(tokens), flat(other) if other else (None, None)
    arrays = Arrays(tokens=own, token_starts=starts, other_strand=found[0], other_starts=found[1])
    names = np.array([f"s{i}" for i in range(len(tokens))], dtype=object)
    return SimpleNamespace(name="a store", sequences=arrays, obs_names=names, cell_keys=np.arange(len(tokens)) * 17)


def builder(cells=None, masked=False, vocab=64, labels=None, reverse=False, **options):
    defaults = {
        "max_length": 8,
        "pad_to_multiple_of": None,
        "padding": "longest",
        "collation_strategy": "sequence_classification",
        "mlm": False,
    }
    field = FieldSpec("dna_chunks", "values", is_masked=masked, vocab_size=vocab, value_ids=np.zeros(0, np.int32))
    return SequenceBuilder(cells or store(), [field], BatchingConfig(**(defaults | options)), labels, reverse)


def test_tokens_stand_between_cls_and_sep():
    batch = builder(labels={"label": np.array([1, 0, 1, 0])}).build([3, 2, 0])
    assert batch["input_ids"].tolist() == [
        [[3, 30, 0, 31, 32, 33, 34, 1]],
        [[3, 1, 2, 2, 2, 2, 2, 2]],
        [[3, 10, 11, 12, 1, 2, 2, 2]],
    ]
    assert batch["attention_mask"].sum(dim=1).tolist() == [8, 2, 5]
    assert batch["cell_name"] == ["s3", "s2", "s0"] and batch["labels"]["label"].tolist() == [0, 1, 1]


def test_longer_ones_are_cut_and_unknown_pieces_counted():
    made = builder(max_length=5)
    batch = made.build([3, 2])
    assert batch["input_ids"][0, 0].tolist() == [3, 30, 0, 31, 1]
    assert made.report.values_outside_vocabulary == 1 and made.report.cells_without_genes == 1
    assert made.report.cells_built == 2
    assert builder(max_length=16, padding="max_length", pad_to_multiple_of=16).build([1])["input_ids"].shape == (
        1,
        1,
        16,
    )


def test_masks_depend_on_seed_epoch_and_sequence_alone():
    rng = np.random.default_rng(0)
    cells = store([rng.integers(5, 64, size=50).tolist() for _ in range(40)], None)
    options = {
        "masked": True,
        "collation_strategy": "language_modeling",
        "mlm": True,
        "max_length": 64,
        "change_ratio": 0.15,
    }
    made = builder(cells, **options)
    together = made.build(np.arange(40), epoch=3)
    alone = made.build([7], epoch=3)
    length = alone["input_ids"].shape[2]
    assert (together["input_ids"][7, 0, :length] == alone["input_ids"][0, 0]).all()
    assert (together["input_ids"] != made.build(np.arange(40), epoch=4)["input_ids"]).any()
    labels, ids = together["labels"]["dna_chunks"], together["input_ids"][:, 0]
    chosen = labels != -100
    assert 0.10 < chosen.float().mean() * 52 / 50 < 0.20
    assert (ids[chosen] == 4).all()
    plain = builder(cells, max_length=64).build(np.arange(40))["input_ids"][:, 0]
    assert (labels[chosen] == plain[chosen]).all() and (ids[~chosen] == plain[~chosen]).all()


def test_the_other_strand_is_read_in_half_of_the_epochs_of_training():
    made = builder(reverse=True)
    seen = [made.build([0], epoch=epoch)["input_ids"][0, 0].tolist() for epoch in range(200)]
    own, other = [3, 10, 11, 12, 1], [3, 12, 11, 1]
    assert seen.count(own) + seen.count(other) == 200 and 70 < seen.count(other) < 130
    assert all(made.build([0], epoch=epoch, training=False)["input_ids"][0, 0].tolist() == own for epoch in range(20))


def test_what_does_not_fit_is_refused():
    with pytest.raises(DataError, match="without tokens of the other strand"):
        builder(store(other=None), reverse=True)
    with pytest.raises(DataError, match=r"rows 0\.\.9"):
        builder().build([0, 9])
    with pytest.raises(DataError, match="labels of 'label' are 2"):
        builder(labels={"label": np.zeros(2)})
    with pytest.raises(ConfigError, match="weights are given by gene"):
        builder().set_mask_weights(np.ones(3))
    with pytest.raises(ConfigError, match="no room"):
        builder(max_length=2)
