"""A share of the training cells: nested, by class, fixed by the seed of the split, the same for models and controls."""

import numpy as np
import pytest
from training_cases import run_config

from bmfm_pipeline.config import compose
from bmfm_pipeline.training import build_data_module
from bmfm_pipeline.training.prepared import PreparedData


def config(fraction, **changed):
    return run_config(data_module__limit_dataset_samples=None, data_module__train_fraction=fraction, **changed)


@pytest.fixture(scope="module")
def cells(prepared) -> PreparedData:
    return PreparedData(prepared)


def test_a_share_holds_the_smaller_ones_and_every_class(cells):
    whole = cells.training_rows(config(None))
    labels = cells.labels(config(None))["celltype"]
    sizes = np.bincount(labels[whole])
    before = np.array([], dtype=int)
    for fraction in (0.02, 0.1, 0.25, 0.5, 0.75):
        rows = cells.training_rows(config(fraction))
        assert np.isin(before, rows).all() and np.isin(rows, whole).all() and (np.diff(rows) > 0).all()
        assert np.bincount(labels[rows]).tolist() == np.maximum(1, np.floor(fraction * sizes + 0.5)).tolist()
        before = rows
    assert len(cells.training_rows(config(1.0))) == len(whole) == 504


def test_it_follows_the_seed_of_the_split_and_not_that_of_the_training(cells):
    def rows(state: int, seed: int = 1234):
        changed = {"data_module__transform_kwargs": {"random_state": state}, "seed__seed_value": seed}
        return cells.training_rows(config(0.25, **changed))

    assert np.array_equal(rows(5), rows(5, seed=9))
    assert len(rows(6)) == len(rows(5)) and not np.array_equal(rows(6), rows(5))


def test_a_limit_takes_part_of_the_share(cells):
    run = run_config(data_module__limit_dataset_samples={"train": 20}, data_module__train_fraction=0.25)
    rows = cells.training_rows(run)
    assert len(rows) == 20 and np.isin(rows, cells.training_rows(config(0.25))).all()


def test_training_reads_these_cells_and_counts_these_classes(cells, prepared):
    run = config(0.1)
    data = build_data_module(run, prepared)
    data.setup("fit")
    rows = cells.training_rows(run)
    assert np.array_equal(data.rows["train"], rows)
    assert [len(data.rows[split]) for split in ("dev", "test")] == [56, 140]
    assert cells.class_tables(run)["celltype"].counts.sum() == len(rows) == 50
    assert cells.training_sentence(run).startswith(
        "data_module.train_fraction 0.1: 50 of 504 training cells; 3 classes have"
    )


def test_it_enters_the_key_of_fine_tuning_and_all_is_the_same_as_none():
    def view(value):
        overrides = ["label_columns=[{label_column_name: celltype}]", f"data_module.train_fraction={value}"]
        return compose("fine_tune_train_config", overrides).key_view("finetune")

    assert view("null") == view("1") == view("1.0") != view("0.5")
