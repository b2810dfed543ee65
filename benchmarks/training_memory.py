"""Memory of training steps: forward, loss, backward, AdamW in float32 on the CPU. One JSON line for each configuration.

python benchmarks/training_memory.py                         # the table of docs/memory.md; some minutes
python benchmarks/training_memory.py --only "12 x 768"       # the configurations with this in their name
python benchmarks/training_memory.py --predict               # without training: what prediction takes

Each configuration runs in a process of its own, on synthetic cells that all fill the context. Peaks are those of the process less
what it held when everything was imported and before the model was built. `fixed_mb` is the formula: 16 bytes a parameter (weights,
gradients, two moments of AdamW; 4 in prediction). Two sizes of batch give `cell_mb`, what a further cell takes, and
`units` = cell_mb in bytes / (4 x tokens x layers x hidden size): how many vectors of the model's width a layer keeps of a token.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
from measuring import hardware

GENES = 94_911  # a vocabulary of all genes of public cells
CASES = [
    # name, network, layers, width, heads, tokens, vocabulary, genes masked too, two batch sizes
    ("2 x 64, 512 tokens", "scbert", 2, 64, 2, 512, 20_000, False, (32, 64)),
    ("2 x 64, 512 tokens, 94,911 genes masked", "scbert", 2, 64, 2, 512, GENES, True, (8, 16)),
    ("4 x 256, 512 tokens", "scbert", 4, 256, 4, 512, 20_000, False, (8, 16)),
    ("4 x 256, 2048 tokens", "scbert", 4, 256, 4, 2048, 20_000, False, (2, 4)),
    ("12 x 768, 512 tokens", "scbert", 12, 768, 12, 512, 20_000, False, (1, 3)),
    ("12 x 768, 512 tokens, 94,911 genes", "scbert", 12, 768, 12, 512, GENES, False, (1, 3)),
    ("llama 12 x 384, 1024 tokens", "scllama", 12, 384, 12, 1024, 20_000, False, (1, 3)),
]
MB = 1e6


def parameters_of(case: tuple, batch: int, checkpointing: bool) -> SimpleNamespace:
    _, network, layers, hidden, heads, tokens, vocabulary, mask_genes, _ = case
    return SimpleNamespace(
        model=network,
        layers=layers,
        hidden=hidden,
        heads=heads,
        intermediate=None,
        dropout=0.1,
        attention_dropout=0.0,
        max_length=tokens,
        vocabulary=vocabulary,
        mask_genes=mask_genes,
        batch=batch,
        cells=4 * batch,
        genes_per_cell=4 * tokens,  # so that every cell is cut to the context
        loader_threads=0,
        checkpointing=checkpointing,
    )


def measure(arguments: SimpleNamespace, predict: bool) -> dict[str, float]:
    """Parameters, and the peak of two steps (of one pass in prediction) beyond the imports, in bytes."""
    import torch
    from train_cells import StoredCells, make_loader_of
    from train_step import build, lean_loss, on_device

    from bmfm_pipeline.models.host_memory import keep_freed_memory
    from bmfm_pipeline.training.memory import HostMemory

    keep_freed_memory()
    loader, fields = make_loader_of(StoredCells.synthetic(arguments), arguments)
    batches = iter(loader)
    build(
        SimpleNamespace(**{**vars(arguments), "layers": 1, "hidden": 8, "heads": 2}), fields
    )  # what is imported on the way
    next(batches)
    memory = HostMemory()
    memory.start()
    before = memory.held()
    model, objectives = build(arguments, fields)
    if predict:
        model.eval()
        batch = on_device(next(batches), objectives, "cpu", naive=False)
        with torch.inference_mode():
            model(batch["input_ids"], batch["attention_mask"], positions={})
    else:
        if arguments.checkpointing:
            model.gradient_checkpointing_enable()
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        for _ in range(2):
            batch = on_device(next(batches), objectives, "cpu", naive=False)
            loss = lean_loss(model, objectives, batch)
            optimizer.zero_grad()  # where Lightning does it too
            loss.backward()
            optimizer.step()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"parameters": parameters, "peak": memory.peak() - before}


def report(case: tuple, checkpointing: bool, predict: bool) -> dict:
    """What the sizes of a configuration take, each measured in a fresh process."""
    name, _, layers, hidden, _, tokens, vocabulary, _, batches = case
    found = []
    for batch in batches:
        words = [
            "--one",
            name,
            str(batch),
            *(["--checkpointing"] if checkpointing else []),
            *(["--predict"] if predict else []),
        ]
        done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{name}, batch {batch}: ended with {done.returncode}:\n{done.stderr[-2000:]}")
        found.append(json.loads(done.stdout.splitlines()[-1]))
    few, many = (entry["peak"] for entry in found)
    cell = (many - few) / (batches[1] - batches[0])
    parameters = found[0]["parameters"]
    return {
        "what": name,
        "task": "predict" if predict else "train",
        "gradient_checkpointing": checkpointing,
        "parameters_m": round(parameters / 1e6, 2),
        "vocabulary": vocabulary,
        "fixed_mb": round((4 if predict else 16) * parameters / MB),
        "batches": list(batches),
        "peak_mb": [round(few / MB), round(many / MB)],
        "cell_mb": round(cell / MB, 2),
        "units": round(cell / (4 * tokens * layers * hidden), 1),
        "hardware": hardware(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="part of the name of the configurations to measure")
    parser.add_argument("--predict", action="store_true")
    parser.add_argument(
        "--checkpointing", action="store_true", help="with gradient checkpointing alone (default: both)"
    )
    parser.add_argument("--one", nargs=2, metavar=("NAME", "BATCH"), help=argparse.SUPPRESS)
    known = parser.parse_args()
    if known.one:
        case = next(case for case in CASES if case[0] == known.one[0])
        print(json.dumps(measure(parameters_of(case, int(known.one[1]), known.checkpointing), known.predict)))
        return
    for case in [case for case in CASES if known.only in case[0]]:
        for checkpointing in [False] if known.predict else [True] if known.checkpointing else [False, True]:
            print(json.dumps(report(case, checkpointing, known.predict)), flush=True)


if __name__ == "__main__":
    main()
