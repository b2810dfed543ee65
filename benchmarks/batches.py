"""Speed of batch building: cells per second of BatchBuilder and of a DataLoader around it. Prints one JSON line.

python benchmarks/batches.py                      # synthetic cells, about 525 expressed genes each
python benchmarks/batches.py --file processed.h5ad  # any processed file; benchmarks/processed.py makes a large one

`us_per_batch` says where the time goes: the kernels, what lies around them, and beside these a plain copy of as many bytes
as the batch holds (`copy_of_batch`) and as its rows hold in the file (`copy_of_rows`).
"""

import argparse
import json
import resource
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from measuring import hardware


class SyntheticStore:
    """Cells with `genes_per_cell` expressed genes on average (uniform columns, bins 1..9), CSR in memory."""

    def __init__(self, n_cells: int, n_genes: int, genes_per_cell: int, seed: int = 0):
        generator = np.random.default_rng(seed)
        sizes = np.clip(generator.normal(genes_per_cell, genes_per_cell / 4, n_cells), 1, n_genes).astype(np.int64)
        self.indptr = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self.indices = np.concatenate(
            [np.sort(generator.choice(n_genes, size, replace=False)) for size in sizes]
        ).astype(np.int32)
        self.data = generator.integers(1, 10, self.indptr[-1]).astype(np.int8)
        self.shape = (n_cells, n_genes)
        self.obs_names = np.array([f"cell-{number}" for number in range(n_cells)], dtype=object)


def make_builder(store, arguments):
    """Genes and expressions, expressions masked, every gene known."""
    from bmfm_pipeline.batching import BatchBuilder, BatchingConfig, FieldSpec

    n_genes = store.shape[1]
    top = int(np.ceil(float(np.max(store.data, initial=0)))) + 1
    genes = FieldSpec(
        "genes",
        "genes",
        is_masked=arguments.mask_genes,
        vocab_size=n_genes + 5,
        column_ids=np.arange(5, n_genes + 5, dtype=np.int32),
    )
    values = FieldSpec(
        "expressions",
        "values",
        tokenized=not arguments.continuous,
        is_masked=True,
        vocab_size=top + 5,
        value_ids=None if arguments.continuous else np.arange(5, top + 5, dtype=np.int32),
    )
    config = BatchingConfig(
        collation_strategy="language_modeling",
        max_length=arguments.max_length,
        sequence_order=None if arguments.order == "none" else arguments.order,
        mask_ratio=arguments.mask_ratio,
        switch_ratio=arguments.switch_ratio,
    )
    return BatchBuilder(store, [genes, values], config)


def timed_batches(builder, batches: list[np.ndarray], seconds: float) -> tuple[float, float]:
    """(cells per second of wall time, CPU milliseconds per cell), repeating the batches for at least `seconds`."""
    cells, epoch = 0, 0
    began, cpu = time.perf_counter(), time.process_time()
    while (spent := time.perf_counter() - began) < seconds:
        for rows in batches:
            builder.build(rows, epoch)
            cells += len(rows)
        epoch += 1
    return cells / spent, (time.process_time() - cpu) * 1e3 / cells


def time_by_part(builder, batches: list[np.ndarray]) -> dict[str, float]:
    """Microseconds of a typical (median) batch spent in each kernel, and outside of kernels."""
    from bmfm_pipeline.batching import kernels

    names = ("rank_genes", "pick_genes", "write_fields", "mask_fields")
    spent: dict[str, list[float]] = {name: [] for name in ("whole", *names)}

    def timed(name, function):
        def call(*arguments):
            began = time.perf_counter()
            result = function(*arguments)
            spent[name].append(time.perf_counter() - began)
            return result

        return call

    originals = {name: getattr(kernels, name) for name in names}
    try:
        for name, function in originals.items():
            setattr(kernels, name, timed(name, function))
        build = timed("whole", builder.build)
        for rows in (batches * (1 + 1000 // len(batches)))[:1000]:
            build(rows, 1)
    finally:
        for name, function in originals.items():
            setattr(kernels, name, function)
    parts = {name: round(float(np.median(times)) * 1e6, 1) for name, times in spent.items() if times}
    parts["outside_kernels"] = round(2 * parts["whole"] - sum(parts.values()), 1)
    return parts


def batch_bytes(builder, rows: np.ndarray) -> int:
    batch = builder.build(rows, 0)
    tensors = [batch["input_ids"], batch["attention_mask"], *batch.get("labels", {}).values()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def row_bytes(store, rows: np.ndarray) -> int:
    stored = int(np.sum(np.diff(store.indptr)[rows]))
    return stored * (store.indices.itemsize + store.data.itemsize)


def copy_us(size: int) -> float:
    """Microseconds in which memory merely copies `size` bytes (median): the floor of anything that writes them."""
    source, times = np.ones(size, dtype=np.uint8), []
    target = np.empty_like(source)
    for _ in range(2000):
        began = time.perf_counter()
        np.copyto(target, source)
        times.append(time.perf_counter() - began)
    return float(np.median(times)) * 1e6


def loader_rate(builder, n_cells: int, batch: int, threads: int, seconds: float) -> dict[str, float]:
    """Cells per second through a DataLoader and CPU milliseconds per cell, after a few batches that start its threads."""
    from bmfm_pipeline.batching import CellDataset, EpochBatchSampler, make_loader

    loader = make_loader(
        CellDataset(builder, np.arange(n_cells)), EpochBatchSampler(n_cells, batch, shuffle=True, seed=1), threads
    )
    cells, began = 0, 0.0
    while True:
        for number, built in enumerate(loader):
            if not began and number == 20:
                began, cpu = time.perf_counter(), time.process_time()
            elif began:
                cells += len(built["cell_name"])
                if time.perf_counter() - began > seconds:
                    spent = time.perf_counter() - began
                    return {
                        "cells_per_s": round(cells / spent),
                        "cpu_ms_per_cell": round((time.process_time() - cpu) * 1e3 / cells, 5),
                    }


def first_batch_of(path: str, arguments) -> dict[str, float]:
    """Seconds from opening a file to its first batch of cells in random order, kernels being compiled already."""
    from bmfm_pipeline.batching import CellDataset, EpochBatchSampler, make_loader
    from bmfm_pipeline.data.store import CellStore

    began = time.perf_counter()
    store = CellStore(path)
    opened = time.perf_counter()
    builder = make_builder(store, arguments)
    made = time.perf_counter()
    n_cells = len(store.indptr) - 1
    sampler = EpochBatchSampler(n_cells, arguments.batch, shuffle=True, seed=1)
    next(iter(make_loader(CellDataset(builder, np.arange(n_cells)), sampler, 0)))
    return {
        "open_s": round(opened - began, 3),
        "builder_s": round(made - opened, 3),
        "first_batch_after_opening_s": round(time.perf_counter() - began, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--file", "--h5ad", dest="h5ad", help="a processed file (CSR, uncompressed) instead of synthetic cells"
    )
    parser.add_argument("--cells", type=int, default=20000)
    parser.add_argument("--genes", type=int, default=20000)
    parser.add_argument("--genes-per-cell", type=int, default=525)
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--order", choices=["none", "random", "sorted"], default="random")
    parser.add_argument("--mask-ratio", type=float, default=0.5)
    parser.add_argument("--switch-ratio", type=float, default=0.5)
    parser.add_argument("--mask-genes", action="store_true", help="mask genes as well as expressions")
    parser.add_argument("--continuous", action="store_true", help="expressions as floats instead of tokens")
    parser.add_argument("--threads", type=int, nargs="*", default=[0, 1, 2], help="loader threads to measure with")
    parser.add_argument("--seconds", type=float, default=3.0)
    arguments = parser.parse_args()

    began = time.perf_counter()
    import torch

    import bmfm_pipeline.batching.builder  # noqa: F401  the import is what is timed

    imports = time.perf_counter() - began
    torch.set_num_threads(1)
    if arguments.h5ad:
        from bmfm_pipeline.data.store import CellStore

        store = CellStore(arguments.h5ad)
    else:
        store = SyntheticStore(arguments.cells, arguments.genes, arguments.genes_per_cell)
    builder = make_builder(store, arguments)
    n_cells = len(store.indptr) - 1
    order = np.random.default_rng(0).permutation(n_cells)
    whole = max(n_cells // arguments.batch, 1)
    batches = [order[i * arguments.batch : (i + 1) * arguments.batch] for i in range(whole)]

    began = time.perf_counter()
    builder.build(batches[0], 0)
    first_batch = time.perf_counter() - began
    cells_per_s, cpu_ms = timed_batches(builder, batches, arguments.seconds)
    loaders = {
        str(threads): loader_rate(builder, n_cells, arguments.batch, threads, arguments.seconds)
        for threads in arguments.threads
    }
    parts = time_by_part(builder, batches)
    written, read = batch_bytes(builder, batches[0]), row_bytes(store, batches[0])
    parts |= {"copy_of_batch": round(copy_us(written), 1), "copy_of_rows": round(copy_us(read), 1)}
    opening = first_batch_of(arguments.h5ad, arguments) if arguments.h5ad else {}
    print(
        json.dumps(
            {
                "benchmark": "batches",
                "cells_per_s": round(cells_per_s),
                "cpu_ms_per_cell": round(cpu_ms, 5),
                "cells_per_cpu_s": round(1e3 / cpu_ms),
                "loader_by_threads": loaders,
                "us_per_batch": parts,
                "bytes_per_batch": {"written": written, "read": read},
                "first_build_s": round(first_batch, 3),
                **opening,
                "imports_s": round(imports, 2),
                "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
                "hardware": hardware(),
                "batch": arguments.batch,
                "max_length": arguments.max_length,
                "order": arguments.order,
                "fields": "genes and expressions masked" if arguments.mask_genes else "expressions masked",
                "values": "continuous" if arguments.continuous else "tokens",
                "mask_ratio": arguments.mask_ratio,
                "switch_ratio": arguments.switch_ratio,
                "cells": n_cells,
                "genes_per_cell": round(float(np.mean(np.diff(store.indptr))), 1),
                "source": Path(arguments.h5ad).name if arguments.h5ad else "synthetic",
            }
        )
    )


if __name__ == "__main__":
    main()
