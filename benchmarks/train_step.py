"""Speed of a training step: batches from a loader, forward, loss, backward, AdamW. Prints one JSON line.

python benchmarks/train_step.py                                    # 2 layers of 64, expressions masked, synthetic cells
python benchmarks/train_step.py --mask-genes                       # the 94,911-gene vocabulary is predicted too
python benchmarks/train_step.py --layers 4 --hidden 256 --heads 4 --file processed.h5ad
python benchmarks/train_step.py --gpu                              # 12 layers of 768 in bf16, batch after batch size

Needs torch, transformers, numpy and numba; h5py for --file. Beside the package's own step, a naive one is timed in the same run: every
position is computed, padding included, and all of them are scored over the whole vocabulary, with dropout, attention and cross-entropy
as torch has them. Both start from the same weights, and their losses on the first batch are compared without dropout.

FLOPs of a step count products of matrices only, forward once and backward twice: 6 x weights of Linear layers x positions they are
applied to, and 12 x H x layers x sum of squared lengths for attention, padding left out. MFU is their rate over the highest rate of
a square product measured in the same run; `mfu_by_cpu_time` compares both by seconds of CPU time, for a machine that others use too.
"""

import argparse
import contextlib
import json
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
from measuring import hardware
from train_cells import StoredCells, make_loader_of

PRECISIONS = {"32": None, "bf16": "bfloat16", "16": "float16"}


def build(arguments, loader_fields: list[dict]):
    """(model with fresh weights, objectives) that predict the masked fields."""
    import torch

    from bmfm_pipeline.models import build_model
    from bmfm_pipeline.objectives import build_objectives

    torch.manual_seed(0)
    options = {
        "model_type": arguments.model,
        "hidden_size": arguments.hidden,
        "num_hidden_layers": arguments.layers,
        "num_attention_heads": arguments.heads,
        "hidden_dropout_prob": arguments.dropout,
        "attention_probs_dropout_prob": arguments.attention_dropout,
        "intermediate_size": arguments.intermediate or 4 * arguments.hidden,
    }
    model = build_model(options, loader_fields)
    losses = [{"field_name": f["field_name"], "name": "cross_entropy"} for f in loader_fields if f["is_masked"]]
    return model, build_objectives(losses, loader_fields)


@contextlib.contextmanager
def plain_torch():
    """Dropout, attention with dropout and cross-entropy as torch has them."""
    from bmfm_pipeline.models import attention, dropout
    from bmfm_pipeline.objectives import many_classes

    places = [(attention, "in_host_memory"), (dropout, "in_host_memory"), (many_classes, "is_worth_it")]
    kept = [getattr(module, name) for module, name in places]
    for module, name in places:
        setattr(module, name, lambda _: False)
    try:
        yield
    finally:
        for (module, name), function in zip(places, kept, strict=True):
            setattr(module, name, function)


def naive_loss(model, objectives, batch):
    """Every position computed and scored, padding included."""
    return objectives.compute(model(batch["input_ids"], batch["attention_mask"]).logits, batch["labels"]).total


def lean_loss(model, objectives, batch):
    """Only what is read: padding left out, scores at predicted positions."""
    output = model(batch["input_ids"], batch["attention_mask"], positions=batch["positions"], packing=batch["packing"])
    return objectives.compute(output.logits, batch["labels"], batch["positions"]).total


def on_device(batch: dict, objectives, device: str, naive: bool) -> dict:
    """What a step needs of a batch, on its device; `tokens` and `squares` are the sums of the cells' lengths and of their squares."""
    from bmfm_pipeline.models.packing import Packing

    lengths = batch["attention_mask"].sum(dim=1).double()
    moved = {
        "tokens": float(lengths.sum()),
        "squares": float(lengths.square().sum()),
        "padded": batch["attention_mask"].numel(),
        "cells": len(lengths),
        "mask": batch["attention_mask"],
    }
    positions = objectives.positions(batch["labels"])
    moved["predicted"] = {name: len(found) for name, found in positions.items()}
    mask, packing = (batch["attention_mask"], None) if naive else Packing.of(batch["attention_mask"])
    moved["packing"] = None if packing is None else packing.to(device, non_blocking=True)
    moved["attention_mask"] = None if mask is None else mask.to(device, non_blocking=True)
    moved["input_ids"] = batch["input_ids"].to(device, non_blocking=True)
    for key, tensors in (("labels", batch["labels"]), ("positions", positions)):
        moved[key] = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
    return moved


def flops(model, batch: dict) -> float:
    """Of one step, as the head of this file says."""
    import torch

    total, seen = 0.0, batch["tokens"]
    for name, module in model.backbone.named_modules():
        if isinstance(module, torch.nn.Linear) and "pooler" not in name:
            total += 6 * module.weight.numel() * seen
    heads = model.cls.predictions.predictions
    for name, count in batch["predicted"].items():
        total += 6 * count * (heads.transform.dense.weight.numel() + heads.head(f"{name}_token_scores").weight.numel())
    return total + 12 * model.config.hidden_size * model.config.num_hidden_layers * batch["squares"]


def matmul_peak(device: str, dtype) -> tuple[float, float]:
    """The most FLOPs that products of square matrices reach here, in a second of wall time and in one of CPU time."""
    import torch

    best = best_cpu = 0.0
    for size in (1024, 2048) if device == "cpu" else (4096, 8192, 16384):
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        a @ b
        for _ in range(6):
            synchronise(device)
            began, cpu = time.perf_counter(), time.process_time()
            a @ b
            synchronise(device)
            best = max(best, 2 * size**3 / (time.perf_counter() - began))
            best_cpu = max(best_cpu, 2 * size**3 / max(time.process_time() - cpu, 1e-6))
    return best, best_cpu


def synchronise(device: str) -> None:
    import torch

    if device != "cpu":
        torch.cuda.synchronize()


def trained(model, objectives, loader, arguments, naive: bool, steps: int) -> dict:
    """Time `steps` steps after some untimed ones; the model is changed."""
    import torch

    device, dtype = arguments.device, PRECISIONS[arguments.precision]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    loss_of = naive_loss if naive else lean_loss
    losses, waited, work, seen = [], 0.0, 0.0, {"cells": 0, "tokens": 0.0, "padded": 0}
    batches = iter(loader)
    model.train()
    for number in range(-arguments.warm_up, steps):
        if number == 0:
            synchronise(device)
            began, cpu, waited = time.perf_counter(), time.process_time(), 0.0
        asked = time.perf_counter()
        built = next(batches)
        waited += time.perf_counter() - asked
        batch = on_device(built, objectives, device, naive)
        torch.manual_seed(number + arguments.warm_up)
        autocast = torch.autocast(device, dtype=getattr(torch, dtype or "bfloat16"), enabled=dtype is not None)
        with autocast:
            loss = loss_of(model, objectives, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        if number >= 0:
            work += flops(model, batch)
            for key in seen:
                seen[key] += batch[key]
    synchronise(device)
    wall, cpu = time.perf_counter() - began, time.process_time() - cpu
    return {
        "cells_per_s": round(seen["cells"] / wall, 2),
        "tokens_per_s": round(seen["tokens"] / wall),
        "ms_per_step": round(wall / steps * 1e3, 1),
        "cpu_s_per_step": round(cpu / steps, 3),
        "share_of_padding": round(1 - seen["tokens"] / seen["padded"], 3),
        "loader_wait_share": round(waited / wall, 4),
        "gflop_per_step": round(work / steps / 1e9, 2),
        "tflop_per_s": round(work / wall / 1e12, 4),
        "tflop_per_cpu_s": round(work / cpu / 1e12, 4),
        "loss_first": round(float(losses[0]), 5),
        "loss_last": round(float(losses[-1]), 5),
    }


def same_loss(model, objectives, batch: dict, arguments) -> dict[str, float]:
    """The loss of both ways on one batch, without dropout."""
    import torch

    model.eval()
    with torch.no_grad():
        lean = lean_loss(model, objectives, on_device(batch, objectives, arguments.device, False))
        with plain_torch():
            naive = naive_loss(model, objectives, on_device(batch, objectives, arguments.device, True))
    return {"lean": round(float(lean), 6), "naive": round(float(naive), 6), "difference": abs(float(lean - naive))}


def peak_memory(device: str) -> dict[str, float]:
    """Highest use so far: of the process in host memory, and of the accelerator since it was last reset."""
    import resource

    import torch

    found = {"peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}
    if device != "cpu":
        found["peak_gpu_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        torch.cuda.reset_peak_memory_stats()
    return found


def measure(arguments, cells, peak: tuple[float, float]) -> dict:
    """One size of batch: the lean step, then the naive one."""
    import torch

    loader, fields = make_loader_of(cells, arguments)
    model, objectives = build(arguments, fields)
    model.to(arguments.device)
    result = {"batch": arguments.batch, "parameters": sum(p.numel() for p in model.parameters())}
    compare = arguments.naive and arguments.device == "cpu"
    first = next(iter(loader)) if compare else None
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()} if arguments.naive else {}
    if arguments.compile:
        from bmfm_pipeline.models.compiling import compile_layers

        compile_layers(model, True, arguments.device, lambda text: print(text, file=sys.stderr))
    result |= trained(model, objectives, loader, arguments, False, arguments.steps) | peak_memory(arguments.device)
    result["mfu"] = round(result["tflop_per_s"] * 1e12 / peak[0], 3)
    if arguments.device == "cpu":
        result["mfu_by_cpu_time"] = round(result["tflop_per_cpu_s"] * 1e12 / peak[1], 3)
    if arguments.naive:
        model.load_state_dict(weights)
        if compare:
            result["loss_of_first_batch"] = same_loss(model, objectives, first, arguments)
            model.load_state_dict(weights)
        try:
            with plain_torch():
                naive = trained(model, objectives, loader, arguments, True, max(1, arguments.naive_steps))
            result["naive"] = naive | peak_memory(arguments.device)
            result["times_naive"] = round(result["cells_per_s"] / naive["cells_per_s"], 2)
        except torch.OutOfMemoryError:
            result["naive"] = {"out_of_memory": True}
    del model
    if arguments.device != "cpu":
        torch.cuda.empty_cache()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="scbert")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--heads", type=int, help="default: one for 64 of width, at least 2")
    parser.add_argument("--intermediate", type=int)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--attention-dropout", type=float, default=0.1)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--batches", type=int, nargs="*", help="with --gpu: sizes to try, until memory ends")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, help="gene tokens, special ones included; 94,911, with --gpu 32,000")
    parser.add_argument("--mask-genes", action="store_true", help="mask and predict genes as well as expressions")
    parser.add_argument("--file", help="a processed file (CSR h5ad) instead of synthetic cells")
    parser.add_argument("--cells", type=int, default=2000, help="synthetic cells")
    parser.add_argument(
        "--genes-per-cell", type=int, default=700, help="synthetic cells: expressed genes, sd a quarter"
    )
    parser.add_argument("--precision", choices=list(PRECISIONS), default="32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument("--loader-threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warm-up", type=int, default=3, help="untimed steps before")
    parser.add_argument("--naive-steps", type=int, default=2)
    parser.add_argument("--no-naive", dest="naive", action="store_false")
    parser.add_argument(
        "--gpu",
        action="store_true",
        help="12 x 768 (110 million parameters) in bf16 on a GPU, without attention dropout",
    )
    arguments = parser.parse_args()
    if arguments.gpu:
        arguments.layers, arguments.hidden, arguments.device, arguments.precision = 12, 768, "cuda", "bf16"
        arguments.attention_dropout, arguments.naive_steps = 0.0, 5
    arguments.vocabulary = arguments.vocabulary or (32_000 if arguments.gpu else 94_911)
    arguments.heads = arguments.heads or max(2, arguments.hidden // 64)
    sizes = arguments.batches or ([16, 32, 64, 128, 256] if arguments.gpu else [arguments.batch])

    import torch

    from bmfm_pipeline.models.host_memory import keep_freed_memory

    keep_freed_memory()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.device != "cpu":
        torch.set_float32_matmul_precision("high")
    cells = StoredCells.of_file(arguments.file) if arguments.file else StoredCells.synthetic(arguments)
    peak = matmul_peak(arguments.device, getattr(torch, PRECISIONS[arguments.precision] or "float32"))
    results = []
    for size in sizes:
        arguments.batch = size
        try:
            results.append(measure(arguments, cells, peak))
        except torch.OutOfMemoryError:
            results.append({"batch": size, "out_of_memory": True})
            break
    best = max(results, key=lambda found: found.get("cells_per_s", 0))
    settings = ("model", "layers", "hidden", "heads", "dropout", "attention_dropout", "max_length", "vocabulary")
    report = {
        "benchmark": "train_step",
        **best,
        "matmul_peak_tflop_per_s": round(peak[0] / 1e12, 4),
        "matmul_peak_tflop_per_cpu_s": round(peak[1] / 1e12, 4),
        "predicted": "genes and expressions" if arguments.mask_genes else "expressions",
        **{name: getattr(arguments, name) for name in (*settings, "precision", "compile")},
        "source": Path(arguments.file).name if arguments.file else "synthetic",
        "genes_per_cell": round(float(np.mean(np.diff(cells.indptr))), 1),
        "threads": torch.get_num_threads(),
        "hardware": torch.cuda.get_device_name() if arguments.device != "cpu" else hardware(),
        "torch": torch.__version__,
    }
    if len(results) > 1:
        report["by_batch"] = results
    print(json.dumps(report))


if __name__ == "__main__":
    main()
