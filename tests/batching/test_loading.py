"""Samplers and loaders: the same batches for any worker count, resumable order, shards, balance; kernels with and without a cache."""

import itertools
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from batching_cases import MemoryStore, make_builder, many_cells
from torch.utils.data import DataLoader

from bmfm_pipeline.batching import CellDataset, EpochBatchSampler, balancing_weights, choose_rows, make_loader
from bmfm_pipeline.errors import ConfigError, DataError


def as_it_is(batch):
    return batch


def same(first: list[dict], second: list[dict]) -> bool:
    assert len(first) == len(second)
    return all(
        one["cell_name"] == two["cell_name"]
        and torch.equal(one["input_ids"], two["input_ids"])
        and all(torch.equal(one["labels"][name], two["labels"][name]) for name in one["labels"])
        for one, two in zip(first, second, strict=True)
    )


def one_epoch(builder, workers: int, epoch: int = 1, batch_size: int = 7) -> list[dict]:
    rows = np.arange(5, 60)
    sampler = EpochBatchSampler(len(rows), batch_size, shuffle=True, seed=3)
    sampler.set_epoch(epoch)
    return list(make_loader(CellDataset(builder, rows), sampler, workers))


@pytest.mark.parametrize("workers", [1, 2, 16])
def test_worker_count_changes_nothing(workers):
    builder = make_builder(many_cells(64), sequence_order="random", switch_ratio=0.5, mask_ratio=0.5)
    expected = one_epoch(builder, 0)
    assert sum(len(batch["cell_name"]) for batch in expected) == 55
    assert same(one_epoch(builder, workers), expected)
    assert not same(one_epoch(builder, workers, epoch=2), expected)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_worker_processes_give_the_same_batches_and_counts(context):
    """The dataset can also be used with processes: it pickles, and their counts arrive."""
    builder = make_builder(many_cells(64, high=14), sequence_order="random")
    expected = one_epoch(builder, 0)
    outside = builder.report.values_outside_vocabulary
    assert outside > 0
    other = make_builder(many_cells(64, high=14), sequence_order="random")
    other.report.share()
    sampler = EpochBatchSampler(55, 7, shuffle=True, seed=3)
    sampler.set_epoch(1)
    loader = DataLoader(
        CellDataset(other, np.arange(5, 60)),
        batch_sampler=sampler,
        num_workers=2,
        collate_fn=as_it_is,
        multiprocessing_context=context,
    )
    assert same(list(loader), expected)
    assert other.report.values_outside_vocabulary == outside
    assert other.report.cells_built == 55


class ReopeningStore(MemoryStore):
    """Pickles as what it was made from, like a store of memory maps."""

    opened = 0

    def __init__(self):
        type(self).opened += 1
        self.__dict__.update(many_cells(64).__dict__)

    def __reduce__(self):
        return ReopeningStore, ()


def test_pickling_reopens_the_store_and_copies_no_cells():
    builder = make_builder(ReopeningStore(), sequence_order="random")
    before = ReopeningStore.opened
    text = pickle.dumps(builder)
    assert len(text) < builder.store.data.nbytes + builder.store.indices.nbytes + 12000
    copy = pickle.loads(text)
    assert ReopeningStore.opened == before + 1
    assert same([copy.build(np.arange(8), 4)], [builder.build(np.arange(8), 4)])


def test_evaluation_is_the_same_in_every_epoch():
    rows, builder = np.arange(20), make_builder(many_cells(64), sequence_order="random")
    sampler = EpochBatchSampler(20, 8, shuffle=False)
    for evaluation in (True, False):
        loader = make_loader(CellDataset(builder, rows, evaluation=evaluation), sampler)
        sampler.set_epoch(0)
        first = list(loader)
        sampler.set_epoch(5)
        assert same(list(loader), first) == evaluation


def test_an_error_in_a_thread_reaches_the_training_loop():
    store = MemoryStore([{1: 1.0}] * 20 + [{1: -1.0}], dtype=np.float32)
    builder = make_builder(store, tokenized=False)
    loader = make_loader(CellDataset(builder, np.arange(21)), EpochBatchSampler(21, 4, shuffle=False), 2)
    seen = 0
    with pytest.raises(DataError, match="cell-20"):
        for _ in loader:
            seen += 1
    assert seen == 5


def test_leaving_early_leaves_no_thread_building():
    builder = make_builder(many_cells(64))
    loader = make_loader(CellDataset(builder, np.arange(64)), EpochBatchSampler(64, 1, shuffle=False), 2)
    iterator = iter(loader)
    next(iterator)
    iterator.close()
    assert builder.report.cells_built < 20


def indices(sampler) -> list[list[int]]:
    return [[index for _, index in batch] for batch in sampler]


def flat(batches: list[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(batches))


def test_sampler_resumes_where_it_was_left():
    sampler = EpochBatchSampler(23, 4, shuffle=True, seed=1)
    sampler.set_epoch(2)
    whole = indices(sampler)
    assert sorted(flat(whole)) == list(range(23))
    state = json.loads(json.dumps(sampler.state_dict(done=2)))
    fresh = EpochBatchSampler(23, 4, shuffle=True, seed=1)
    fresh.load_state_dict(state)
    fresh.set_epoch(2)
    assert len(fresh) == 6
    assert indices(fresh) == whole[2:]
    assert indices(fresh) == whole
    assert sampler.state_dict(done=6) == {"epoch": 3, "position": 0}
    fresh.load_state_dict(state)
    fresh.set_epoch(3)
    assert len(indices(fresh)) == 6


def test_sampler_orders():
    first, second = (EpochBatchSampler(50, 8, shuffle=True, seed=seed) for seed in (1, 2))
    assert indices(first) == indices(EpochBatchSampler(50, 8, shuffle=True, seed=1))
    assert indices(first) != indices(second)
    before = indices(first)
    first.set_epoch(1)
    assert indices(first) != before
    assert indices(EpochBatchSampler(5, 2, shuffle=False)) == [[0, 1], [2, 3], [4]]
    assert indices(EpochBatchSampler(5, 2, shuffle=False, drop_last=True)) == [[0, 1], [2, 3]]
    assert list(EpochBatchSampler(0, 2, shuffle=True)) == []


def test_replicas_share_an_epoch():
    shards = [EpochBatchSampler(22, 3, shuffle=True, seed=1, num_replicas=4, rank=rank) for rank in range(4)]
    orders = [flat(indices(shard)) for shard in shards]
    assert {len(order) for order in orders} == {6}
    assert {len(indices(shard)) for shard in shards} == {len(shards[0])}
    together = flat(orders)
    assert set(together) == set(range(22))
    assert len(together) == 24
    with pytest.raises(ConfigError, match="rank"):
        EpochBatchSampler(22, 3, shuffle=True, num_replicas=4, rank=4)


def test_balanced_sampling():
    classes = np.array([0] * 900 + [1] * 90 + [2] * 10 + [-100] * 50)
    sampler = EpochBatchSampler(1050, 50, shuffle=True, seed=0, weights=balancing_weights(classes))
    drawn = []
    for epoch in range(6):
        sampler.set_epoch(epoch)
        drawn += flat(indices(sampler))
    counts = np.bincount(classes[drawn] + 100, minlength=103)
    assert counts[0] == 0
    assert np.abs(counts[100:] / len(drawn) - 1 / 3).max() < 0.03
    assert len(drawn) == 6 * 1050
    with pytest.raises(DataError, match="no cell"):
        balancing_weights(np.array([-100, -100]))
    with pytest.raises(DataError, match="sampling weights"):
        EpochBatchSampler(3, 1, shuffle=True, weights=np.zeros(3))


def test_chosen_rows_are_a_seeded_random_subset():
    rows = np.arange(100, 1100)
    chosen = choose_rows(rows, 50, seed=7)
    assert len(set(chosen.tolist())) == 50
    assert (np.diff(chosen) > 0).all()
    assert set(chosen) <= set(rows)
    assert chosen[-1] > 700, "not the first rows"
    assert np.array_equal(chosen, choose_rows(rows, 50, seed=7))
    assert not np.array_equal(chosen, choose_rows(rows, 50, seed=8))
    assert choose_rows(rows, None, 7) is rows
    assert choose_rows(rows, 5000, 7) is rows
    with pytest.raises(ConfigError, match="limit_dataset_samples"):
        choose_rows(rows, 0, 7)


BUILD = """
import sys
sys.path.insert(0, {tests!r})
import numpy as np
from batching_cases import make_builder, many_cells
batch = make_builder(many_cells(8), sequence_order="random").build(np.arange(8), 1)
print(batch["input_ids"].sum().item())
for name in ("pydantic", "anndata", "scanpy", "pytorch_lightning", "mlflow", "prefect", "hydra", "h5py", "pandas"):
    assert name not in sys.modules, name
"""


def run_python(code: str, cache: Path) -> str:
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(cache)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_without_a_folder_for_compiled_kernels(tmp_path):
    """Numba finds no place to keep kernels: they are compiled in the process. Only torch, numpy and numba are imported."""
    no_place = "import numba.core.caching as c; c.CacheImpl._locator_classes = []\n"
    kept_nothing = "from bmfm_pipeline.batching import kernels\nprint(type(kernels.pick_genes._cache).__name__)\n"
    output = run_python(no_place + BUILD.format(tests=os.path.dirname(__file__)) + kept_nothing, tmp_path)
    expected = make_builder(many_cells(8), sequence_order="random").build(np.arange(8), 1)["input_ids"].sum().item()
    assert output.split() == [str(expected), "NullCache"]


def test_compiled_kernels_are_kept(tmp_path):
    run_python(BUILD.format(tests=os.path.dirname(__file__)), tmp_path)
    kept = {path.name.split("-")[0] for path in tmp_path.rglob("*.nbc")}
    assert {"kernels.pick_genes", "kernels.write_fields", "kernels.mask_fields"} <= kept
