"""Loaders side by side: this package, scDataset and anndata's AnnLoader over one processed file. Prints one JSON line for each.

pip install 'bmfm-pipeline[bench]'                    # scdataset, for this comparison alone
python benchmarks/loaders.py --file processed.h5ad    # any h5ad with CSR X; without it a synthetic one is made

Raw rows: batches of rows of X in random order, in the form in which each loader hands them out: CSR (this package, scDataset) or a dense
tensor (AnnLoader by its default, CSR with `sparse`). Full batches: tokens, masks and attention as a model takes them. The other two
have no such step, so their rows go through the very kernels that this package uses: what differs is how rows are come by. scDataset
reads blocks of neighbouring cells and shuffles within several batches' worth; with a block of one cell its order is as random as
that of the others. Everything runs in one process and one thread.
"""

import argparse
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from batches import make_builder
from measuring import hardware
from processed import write_processed


class HandedOver:
    """A store whose rows are those that another loader has just read, so that our builder can make a batch of them."""

    contiguous = False

    def __init__(self, store):
        self.shape, self.obs_names, self.data = store.shape, store.obs_names, store.data
        self.rows = None

    def gather(self, rows: np.ndarray):
        return self.rows.indptr, self.rows.indices, self.rows.data


class Rows:
    """A sparse matrix as scDataset asks for one: with a length, rows by a list of numbers."""

    def __init__(self, matrix):
        self.matrix = matrix

    def __len__(self) -> int:
        return self.matrix.shape[0]

    def __getitem__(self, rows):
        return self.matrix[rows]


def endless(loader) -> Iterator:
    while True:
        yield from loader


def rows_of_this_package(store, arguments) -> Iterator:
    random = np.random.default_rng(0)
    while True:
        order = random.permutation(store.shape[0])
        for start in range(0, len(order) - arguments.batch + 1, arguments.batch):
            yield store.matrix.rows(order[start : start + arguments.batch])


def batches_of_this_package(store, arguments) -> Iterator:
    from bmfm_pipeline.batching import CellDataset, EpochBatchSampler, make_loader

    cells = CellDataset(make_builder(store, arguments), np.arange(store.shape[0]))
    return endless(make_loader(cells, EpochBatchSampler(store.shape[0], arguments.batch, shuffle=True, seed=1)))


def rows_of_scdataset(matrix, arguments, block: int, fetch: int) -> Iterator:
    from scdataset import BlockShuffling, scDataset
    from torch.utils.data import DataLoader

    strategy = BlockShuffling(block_size=block)
    dataset = scDataset(Rows(matrix), strategy, batch_size=arguments.batch, fetch_factor=fetch, drop_last=True, seed=1)
    return endless(DataLoader(dataset, batch_size=None, num_workers=0))


def rows_of_annloader(adata, arguments, sparse: bool) -> Iterator:
    from anndata.experimental import AnnLoader

    loader = AnnLoader(
        adata, batch_size=arguments.batch, shuffle=True, drop_last=True, use_default_converter=not sparse
    )
    return (view.X for view in endless(loader))


def tokenised(rows: Iterator, store, arguments) -> Iterator:
    """Full batches of rows that another loader reads."""
    handed = HandedOver(store)
    builder = make_builder(handed, arguments)
    numbers = np.arange(arguments.batch)
    for read in rows:
        handed.rows = read
        yield builder.build(numbers, 0)


def measure(make: Callable[[], Iterator], batch: int, seconds: float) -> dict:
    """Cells per second and CPU milliseconds per cell of an endless loader, after its first batch, which is timed apart."""
    began = time.perf_counter()
    batches = make()
    next(batches)
    first = time.perf_counter() - began
    cells, began, cpu = 0, time.perf_counter(), time.process_time()
    while (spent := time.perf_counter() - began) < seconds or not cells:
        next(batches)
        cells += batch
    return {
        "cells_per_s": round(cells / spent),
        "cpu_ms_per_cell": round((time.process_time() - cpu) * 1e3 / cells, 5),
        "first_batch_s": round(first, 3),
    }


def contenders(path: str, arguments) -> Iterator[tuple[str, str, str, Callable[[], Iterator]]]:
    """(loader, what it gives, where its rows lie, function that starts it)."""
    import anndata
    from scipy import sparse

    from bmfm_pipeline.data.store import CellStore

    store = CellStore(path)
    here = "this package"
    yield here, "raw rows, CSR", "memory-mapped file", partial(rows_of_this_package, store, arguments)
    yield here, "full batches", "memory-mapped file", partial(batches_of_this_package, store, arguments)
    loaded = anndata.read_h5ad(path)
    # Whole numbers of one size, as scipy makes them itself: with two it would convert all of them at every look-up.
    loaded.X = sparse.csr_matrix((loaded.X.data, loaded.X.indices.astype(np.int32), loaded.X.indptr.astype(np.int32)))
    places = {"file": anndata.read_h5ad(path, backed="r"), "memory": loaded}
    for place, adata in places.items():
        for block, fetch in ((16, 256), (1, 16)):
            name = f"scDataset, blocks of {block}, fetch factor {fetch}"
            rows = partial(rows_of_scdataset, adata.X, arguments, block, fetch)
            yield name, "raw rows, CSR", place, rows
            yield name, "full batches", place, lambda rows=rows: tokenised(rows(), store, arguments)
        dense = partial(rows_of_annloader, adata, arguments, False)
        sparse = partial(rows_of_annloader, adata, arguments, True)
        yield "AnnLoader", "raw rows, dense", place, dense
        yield "AnnLoader", "raw rows, CSR", place, sparse
        yield "AnnLoader", "full batches", place, lambda rows=sparse: tokenised(rows(), store, arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", help="an h5ad whose X is CSR; default: a synthetic one of 68,579 x 20,000")
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=5.0)
    arguments = parser.parse_args()

    import torch

    if importlib.util.find_spec("scdataset") is None:
        print(
            json.dumps(
                {"benchmark": "loaders", "skipped": "scdataset is not installed; pip install 'bmfm-pipeline[bench]'"}
            )
        )
        return
    torch.set_num_threads(1)
    work = SimpleNamespace(
        batch=arguments.batch, max_length=arguments.max_length, order="random", mask_genes=False, continuous=False,
        mask_ratio=0.5, switch_ratio=0.5,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.file or str(write_processed(Path(folder) / "processed.h5ad"))
        for loader, gives, place, make in contenders(path, work):
            found = {"benchmark": "loaders", "loader": loader, "gives": gives, "rows_in": place}
            found |= measure(make, arguments.batch, arguments.seconds)
            found |= {"batch": arguments.batch, "max_length": arguments.max_length, "file": Path(path).name}
            print(json.dumps({**found, "hardware": hardware()}), flush=True)


if __name__ == "__main__":
    main()
