"""What Prefect costs: `bmfm run` with a server running against the stage functions called one after another in one process.

python benchmarks/orchestration.py --runs 3      # prints one JSON line; medians, each run in a fresh workspace

Both plan, record in MLflow and train in a child process, so the difference is Prefect: its import, its client, states, logs and artifacts.
CPU seconds count children, and the server's own are given apart.
"""

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from measuring import bmfm, hardware, measured

SMALL = [
    "model.hidden_size=32", "model.num_hidden_layers=1", "model.num_attention_heads=2", "model.intermediate_size=64",
    "data_module.max_length=64", "task.max_steps=20",
]  # fmt: skip
BARE = """
import json, sys
from bmfm_pipeline.stages import plan_pipeline, run_stage
for job in plan_pipeline("zheng68k-mini", overrides=json.loads(sys.argv[2]), workspace=sys.argv[1]):
    run_stage(job)
"""


@contextlib.contextmanager
def server(home: Path) -> Iterator[tuple[dict[str, str], int]]:
    """A Prefect server of its own on loopback: (the environment that leads there, its process id)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = {
        "PREFECT_HOME": str(home),
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
    }
    command = [str(Path(sys.executable).parent / "prefect"), "--no-prompt", "server", "start", "--host", "127.0.0.1"]
    with open(home.with_suffix(".log"), "wb") as log:
        process = subprocess.Popen(
            [*command, "--port", port], env={**os.environ, **environment}, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        until = time.monotonic() + 600
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{environment['PREFECT_API_URL']}/health", timeout=5).read()
                break
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"the server did not start:\n{home.with_suffix('.log').read_text()[-2000:]}")
            time.sleep(0.2)
        yield environment, process.pid
    finally:
        process.terminate()
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def cpu_of(pid: int) -> float:
    """CPU seconds that a process and its living children have used."""
    total = 0.0
    for process in [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]:
        fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    runs = parser.parse_args().runs
    found: dict[str, list[dict]] = {"bare": [], "run": [], "again": []}
    served = []
    with tempfile.TemporaryDirectory() as folder, server(Path(folder) / "prefect") as (environment, pid):
        for number in range(runs):
            place = f"{folder}/{number}"
            found["bare"].append(measured([sys.executable, "-c", BARE, f"{place}-bare", json.dumps(SMALL)]))
            words = bmfm("run", "zheng68k-mini", "--workspace", f"{place}-run", *SMALL)
            before = cpu_of(pid)
            found["run"].append(measured(words, **environment))
            served.append(round(cpu_of(pid) - before, 2))
            found["again"].append(measured(words, **environment))
    numbers = {
        f"{name}_{unit}": round(statistics.median(entry[unit] for entry in entries), 2)
        for name, entries in found.items()
        for unit in ("wall_s", "cpu_s")
    }
    print(
        json.dumps(
            {
                "benchmark": "orchestration",
                **numbers,
                "overhead_wall_s": round(numbers["run_wall_s"] - numbers["bare_wall_s"], 2),
                "overhead_cpu_s": round(numbers["run_cpu_s"] - numbers["bare_cpu_s"], 2),
                "server_cpu_s": statistics.median(served),
                "load": round(os.getloadavg()[0], 1),
                "runs": runs,
                "hardware": hardware(),
            }
        )
    )


if __name__ == "__main__":
    main()
