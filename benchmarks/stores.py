"""Speed of stores: rows per second of random batches, and cells per second of batches built from them. Prints one JSON line.

python benchmarks/stores.py                # 20,000 cells x 20,000 genes, about 525 expressed each
python benchmarks/stores.py --cells 2000 --seconds 1
"""

import argparse
import json
import resource
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from batches import SyntheticStore
from measuring import hardware


def write_h5ad(path: Path, cells, genes: list[str], first: int = 0) -> Path:
    """The cells as a processed h5ad."""
    import pandas as pd
    from scipy import sparse

    from bmfm_pipeline.data.processed import ProcessedWriter

    obs = pd.DataFrame(index=[f"cell-{first + number}" for number in range(cells.shape[0])])
    with ProcessedWriter(path, obs, genes, cells.shape) as writer:
        writer.matrix("X", np.diff(cells.indptr), cells.data.dtype)
        writer.fill("X", sparse.csr_matrix(cells))
    return path


def make_stores(folder: Path, cells: int, genes: int) -> dict:
    """{kind: function that opens it}."""
    import anndata
    from scipy import sparse

    from bmfm_pipeline.data.stores import CellStore, JoinedStore, MemoryStore, ZarrStore, write_zarr

    made = SyntheticStore(cells, genes, 525)
    matrix = sparse.csr_matrix((made.data, made.indices, made.indptr), shape=made.shape)
    names = [f"GENE{number}" for number in range(genes)]
    whole = write_h5ad(folder / "cells.h5ad", matrix, names)
    half = cells // 2
    order = np.random.default_rng(1).permutation(genes)
    shuffled = matrix[half:][:, order]
    shuffled.sort_indices()
    parts = [
        write_h5ad(folder / "first.h5ad", matrix[:half], names),
        write_h5ad(folder / "second.h5ad", shuffled, [names[column] for column in order], half),
    ]
    same = write_h5ad(folder / "same.h5ad", matrix[half:], names, half)
    mapped = CellStore(whole)
    write_zarr(mapped, folder / "small.zarr")
    write_zarr(mapped, folder / "sharded.zarr", chunks_per_file=64)
    anndata.read_h5ad(whole).write_zarr(folder / "default.zarr")
    little = 16 << 20
    return {
        "h5ad, mapped": lambda: CellStore(whole),
        "in memory": lambda: MemoryStore(matrix, mapped.obs_names, names),
        "two h5ad, same genes": lambda: JoinedStore([CellStore(parts[0]), CellStore(same)]),
        "two h5ad, genes in another order": lambda: JoinedStore([CellStore(path) for path in parts], names),
        "zarr, chunks of 8,192, all in the cache": lambda: ZarrStore(folder / "small.zarr"),
        "zarr, chunks of 8,192, cache of 16 MB": lambda: ZarrStore(folder / "small.zarr", little),
        "zarr, 64 chunks a file, cache of 16 MB": lambda: ZarrStore(folder / "sharded.zarr", little),
        "zarr, anndata's chunks, all in the cache": lambda: ZarrStore(folder / "default.zarr"),
        "zarr, anndata's chunks, cache of 16 MB": lambda: ZarrStore(folder / "default.zarr", little),
    }


def make_builder(store):
    """Genes and bins 0..9, bins masked, 512 tokens in random order."""
    from bmfm_pipeline.batching import BatchBuilder, BatchingConfig, FieldSpec

    genes = np.arange(5, store.shape[1] + 5, dtype=np.int32)
    fields = [
        FieldSpec("genes", "genes", vocab_size=len(genes) + 5, column_ids=genes),
        FieldSpec("expressions", "values", is_masked=True, vocab_size=15, value_ids=np.arange(5, 15, dtype=np.int32)),
    ]
    return BatchBuilder(store, fields, BatchingConfig(max_length=512, switch_ratio=0.5, mask_ratio=0.5))


def rate(call, batches: list[np.ndarray], seconds: float) -> dict[str, float]:
    """Rows per second of `call(rows)`, of wall time and of CPU time."""
    for rows in batches[:3]:
        call(rows)
    done, began, cpu = 0, time.perf_counter(), time.process_time()
    while (spent := time.perf_counter() - began) < seconds:
        rows = batches[(done // len(batches[0])) % len(batches)]
        call(rows)
        done += len(rows)
    return {"per_s": round(done / spent), "per_cpu_s": round(done / (time.process_time() - cpu))}


def main() -> None:
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=20_000)
    parser.add_argument("--genes", type=int, default=20_000)
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=3.0)
    arguments = parser.parse_args()
    order = np.random.default_rng(0).permutation(arguments.cells)
    batches = [
        order[start : start + arguments.batch] for start in range(0, arguments.cells - arguments.batch, arguments.batch)
    ]
    results = {}
    with tempfile.TemporaryDirectory() as name:
        for kind, opened in make_stores(Path(name), arguments.cells, arguments.genes).items():
            began = time.perf_counter()
            store = opened()
            opening = time.perf_counter() - began
            if "all in the cache" in kind:
                store.gather(np.arange(arguments.cells))
            builder = make_builder(store)
            results[kind] = {
                "open_s": round(opening, 3),
                "rows": rate(store.gather, batches, arguments.seconds),
                "cells_built": rate(builder.build, batches, arguments.seconds),
            }
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(
        json.dumps(
            {"benchmark": "stores", "hardware": hardware(), "cells": arguments.cells, "genes": arguments.genes,
             "batch": arguments.batch, "peak_rss_mb": peak, "stores": results}
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
