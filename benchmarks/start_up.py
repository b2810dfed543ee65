"""Start-up: `bmfm --help`, `bmfm plan`, importing pytorch_lightning, and process start to first training batch. One JSON line.

python benchmarks/start_up.py [--runs 5]
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from measuring import bmfm, hardware, measured

TINY = [
    "model.hidden_size=64",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=2",
    "model.intermediate_size=128",
]


def median_of(command: list[str], runs: int) -> float:
    return round(statistics.median(measured(command)["wall_s"] for _ in range(runs)), 2)


def first_batch(folder: str, number: int) -> float:
    """Seconds from the start of the training process to its first batch, as the training itself reports them."""
    words = ["pretrain", "zheng68k-mini", "--json", "--workspace", f"{folder}/workspace", *TINY]
    done = measured(bmfm(*words, "task.max_steps=1", f"seed.seed_value={number}"))
    uri = json.loads(done["output"].splitlines()[-1])["artefacts"]["pretrain"]
    return json.loads((Path(uri) / "artefact.json").read_text())["summary"]["first_batch_after_s"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = {
            "benchmark": "start_up",
            "help_s": median_of(bmfm("--help"), arguments.runs),
            "plan_s": median_of(bmfm("plan", "zheng68k-mini", "--workspace", f"{folder}/plan"), arguments.runs),
            "import_pytorch_lightning_s": median_of([sys.executable, "-c", "import pytorch_lightning"], arguments.runs),
            "first_batch_s": statistics.median(first_batch(folder, number) for number in range(arguments.runs)),
        }
    print(json.dumps({**result, "runs": arguments.runs, "hardware": hardware()}))


if __name__ == "__main__":
    main()
