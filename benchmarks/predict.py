"""Speed of prediction: the whole of `bmfm predict` on a file, and inference alone on batches that lie ready. Prints one JSON line.

python benchmarks/predict.py                       # 2 layers of 64, 512 tokens, 4,000 synthetic cells of about 700 genes
python benchmarks/predict.py --layers 4 --hidden 256 --heads 4 --cells 500
python benchmarks/predict.py --threads 1           # one core

A fresh model is made by one step of fine-tuning on 400 of the cells. `whole_file` covers reading, transforms, batches, the model,
the rows kept on disk and the csv files, after a run over few cells has loaded what is to be loaded. `inference` is the model alone:
with all states of the last layer, as an embedding by mean_pooling needs them, and with those of the first position, as first_token and
pooling_layer do. FLOPs count products of matrices: 2 x weights of Linear layers x positions that they are applied to, and
4 x H x sum of queries x keys for attention, padding left out. MFU is their rate over the highest rate of a square product in this run,
both by CPU time, for a machine that others use too. `loader_wait_ms_per_cell` is the time in which the model waited for a batch,
`rss_before_mb` the memory that the process held before the file was opened.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
from measuring import bmfm, hardware, measured
from train_step import matmul_peak


def write_cells(path: Path, cells: int, genes: int, per_cell: int, seed: int = 0) -> None:
    """Counts of cells with about `per_cell` expressed genes, drawn by a gene's abundance, and a label that means nothing."""
    import anndata
    import pandas as pd
    from scipy import sparse

    generator = np.random.default_rng(seed)
    abundance = generator.normal(0, 1.5, genes)
    sizes = np.clip(generator.normal(per_cell, per_cell / 4, cells), 50, genes // 2).astype(int)
    found = [np.sort(np.argpartition(-(abundance + generator.gumbel(size=genes)), size)[:size]) for size in sizes]
    ends = np.concatenate([[0], np.cumsum(sizes)])
    counts = generator.geometric(0.5, ends[-1]).astype(np.float32)
    matrix = sparse.csr_matrix((counts, np.concatenate(found).astype(np.int32), ends), shape=(cells, genes))
    obs = pd.DataFrame(
        {"celltype": generator.choice([f"type {number}" for number in range(10)], cells)},
        index=[f"cell-{number}" for number in range(cells)],
    )
    var = pd.DataFrame(index=[f"GENE{number}" for number in range(genes)])
    anndata.AnnData(matrix, obs=obs, var=var).write_h5ad(path)


def make_model(folder: Path, cells: Path, arguments) -> str:
    """A model folder, after one step of fine-tuning."""
    words = [
        f"model.hidden_size={arguments.hidden}",
        f"model.num_hidden_layers={arguments.layers}",
        f"model.num_attention_heads={arguments.heads}",
        f"model.intermediate_size={4 * arguments.hidden}",
        f"data_module.max_length={arguments.max_length}",
        f"data_module.batch_size={arguments.batch}",
    ]
    command = bmfm("finetune", str(cells), "label=celltype", *words, "task.max_steps=1", "--json")
    output = measured([*command, "--workspace", str(folder / "workspace")])["output"]
    return json.loads(output.strip().splitlines()[-1])["model"]


@contextlib.contextmanager
def watched(kept: list[dict] | None, waits: list[float]):
    """While inside, prediction hands over how long its model waited for each batch, and the batches where a list is given."""
    from bmfm_pipeline.evaluation import inference

    def batches_of(loader):
        batches = iter(loader)
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            waits.append(time.perf_counter() - began)
            if batch is None:
                return
            if kept is not None:
                kept.append(batch)
            yield batch

    original = inference.predict_loader
    inference.predict_loader = lambda network, loader, *rest, **more: original(
        network, batches_of(loader), *rest, **more
    )
    try:
        yield
    finally:
        inference.predict_loader = original


def memory(name: str) -> int:
    """A line of /proc/self/status, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1]) // 1024


def timed_file(model: str, cells: Path, folder: Path) -> dict[str, float]:
    from bmfm_pipeline.stages.predict import predict_file

    waits: list[float] = []
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory("VmRSS")
    began, cpu = time.perf_counter(), time.process_time()
    with watched(None, waits):
        found = predict_file(model, str(cells), folder / "out", workspace=str(folder / "workspace"))
    wall, cpu = time.perf_counter() - began, time.process_time() - cpu
    return {
        "cells_per_s": round(found["cells"] / wall, 1),
        "cpu_ms_per_cell": round(cpu * 1e3 / found["cells"], 3),
        "cells_per_cpu_s": round(found["cells"] / cpu, 1),
        "loader_wait_ms_per_cell": round(sum(waits) * 1e3 / found["cells"], 4),
        "peak_rss_mb": memory("VmHWM"),
        "rss_before_mb": before,
    }


def ready_batches(model: str, cells: Path) -> list[dict]:
    """Batches as prediction makes them of all cells of a file."""
    from bmfm_pipeline.stages.predict import predict_file

    kept: list[dict] = []
    with watched(kept, []), tempfile.TemporaryDirectory() as folder:
        predict_file(model, str(cells), Path(folder) / "out", workspace=str(Path(folder) / "workspace"))
    return kept


def flops(network, batches: list[dict], first_only: bool) -> float:
    """Of all batches, as the head of this file says."""
    import torch

    config, total = network.config, 0.0
    for batch in batches:
        lengths = batch["attention_mask"].sum(dim=1).double()
        seen, squares, cells = float(lengths.sum()), float(lengths.square().sum()), len(lengths)
        last = f"layer.{config.num_hidden_layers - 1}."
        for name, module in network.backbone.named_modules():
            if not isinstance(module, torch.nn.Linear) or "pooler" in name:
                continue
            few = first_only and last in name and not name.endswith((".key", ".value"))
            total += 2 * module.weight.numel() * (cells if few else seen)
        layers = config.num_hidden_layers
        pairs = (layers - 1) * squares + seen if first_only else layers * squares
        total += 4 * config.hidden_size * pairs
    return total


def timed_inference(network, batches: list[dict], first_only: bool, seconds: float) -> dict[str, float]:
    import torch

    cells = sum(len(batch["cell_name"]) for batch in batches)
    best, best_wall, began = float("inf"), float("inf"), time.perf_counter()
    with torch.inference_mode():
        while time.perf_counter() - began < seconds or best == float("inf"):
            wall, cpu = time.perf_counter(), time.process_time()
            for batch in batches:
                network(batch["input_ids"], batch["attention_mask"], positions={}, first_only=first_only)
            best = min(best, time.process_time() - cpu)
            best_wall = min(best_wall, time.perf_counter() - wall)
    return {
        "cells_per_s": round(cells / best_wall, 1),
        "cpu_ms_per_cell": round(best * 1e3 / cells, 3),
        "cells_per_cpu_s": round(cells / best, 1),
        "gflop_per_cell": round(flops(network, batches, first_only) / cells / 1e9, 3),
        "flops_per_cpu_s": flops(network, batches, first_only) / best,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=4000)
    parser.add_argument("--genes", type=int, default=20000)
    parser.add_argument("--genes-per-cell", type=int, default=700)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=5.0, help="to time inference alone for")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for name, cells in (("cells", arguments.cells), ("few", 400)):
            words = (folder / f"{name}.h5ad", cells, arguments.genes, arguments.genes_per_cell)
            writer = multiprocessing.get_context("spawn").Process(target=write_cells, args=words)
            writer.start()
            writer.join()
        model = make_model(folder, folder / "few.h5ad", arguments)
        batches = ready_batches(model, folder / "few.h5ad")
        whole = timed_file(model, folder / "cells.h5ad", folder)
        from bmfm_pipeline.models import load_model

        network = load_model(Path(model)).eval()
        ways = {"all_positions": False, "first_position": True}
        inference = {name: timed_inference(network, batches, first, arguments.seconds) for name, first in ways.items()}
        _, peak = matmul_peak("cpu", torch.float32)
    for entry in inference.values():
        entry["mfu"] = round(entry.pop("flops_per_cpu_s") / peak, 3)
    print(
        json.dumps(
            {
                "benchmark": "predict",
                "whole_file": whole,
                "inference": inference,
                "matmul_gflops_per_cpu_s": round(peak / 1e9, 1),
                "hardware": hardware(),
                "threads": arguments.threads,
                "cells": arguments.cells,
                "genes_per_cell": arguments.genes_per_cell,
                "layers": arguments.layers,
                "hidden": arguments.hidden,
                "max_length": arguments.max_length,
                "batch": arguments.batch,
                "precision": "32",
            }
        )
    )


if __name__ == "__main__":
    main()
