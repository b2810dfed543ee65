"""The pictures of docs/images: `make screenshots`. A server and workers of its own, one real run of zheng68k-mini, headless Chromium.

Everything else lies in a folder that is removed at the end, and no process is left. Needs Chromium; about ten minutes on two cores.
"""

import argparse
import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

TOP = Path(__file__).resolve().parents[2]
IMAGES = TOP / "docs" / "images"
sys.path[:0] = [str(TOP), str(TOP / "tests" / "evaluation")]

from browser import CHROMIUM, Browser  # noqa: E402 - the browser of the tests

BIN = Path(sys.executable).parent
MOST_BYTES = 150_000
COLOURS = (128, 64, 32)
WIDE, TALL, PHONE = 1280, 900, 390
SECONDS = 300.0
RUN_SECONDS = 1800.0
SETTLE = 1.5  # seconds for what fades in
GRAPH = 10.0  # seconds until the graph of a run is laid out


class Stack:
    """Prefect and MLflow by `bmfm ui`, deployments by `bmfm deploy`, a worker for each pool; `close` ends all of them."""

    def __init__(self, folder: Path):
        self.folder, self.prefect, self.mlflow = folder, _free_port(), _free_port()
        self.page = f"http://127.0.0.1:{self.prefect}"
        own = ("BMFM_", "PREFECT_", "MLFLOW_")
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith(own)}
        self.environment |= {
            "BMFM_WORKSPACE": str(folder / "workspace"),
            "HOME": str(folder),
            "XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache")),
            "PREFECT_HOME": str(folder / "prefect"),
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "no_proxy": "127.0.0.1",
        }
        self._processes: list[subprocess.Popen] = []

    def start(self) -> None:
        ports = ("--prefect-port", str(self.prefect), "--mlflow-port", str(self.mlflow))
        self._begin("bmfm", "ui", *ports)
        for address in (f"{self.page}/api/health", f"http://127.0.0.1:{self.mlflow}/health"):
            _until(lambda address=address: _answers(address), SECONDS, address)
        self.environment |= {
            "PREFECT_API_URL": f"{self.page}/api",
            "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{self.mlflow}",
        }
        subprocess.run([BIN / "bmfm", "deploy"], env=self.environment, cwd=TOP, check=True, capture_output=True)
        for pool in ("cpu", "gpu"):
            self._begin("prefect", "worker", "start", "--pool", pool)

    def _begin(self, program: str, *words: str) -> None:
        with open(self.folder / f"{program}-{len(self._processes)}.log", "wb") as log:
            self._processes.append(
                subprocess.Popen(
                    [BIN / program, *words],
                    env=self.environment,
                    cwd=TOP,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            )

    def close(self) -> None:
        for process in reversed(self._processes):  # workers before the server that they talk to
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.page}/api/{path}", data, {"Content-Type": "application/json"})
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
            return json.load(answer)

    def artifact(self, key: str) -> dict[str, Any] | None:
        found = self.ask("artifacts/filter", {"artifacts": {"key": {"any_": [key]}}, "sort": "CREATED_DESC"})
        return found[0] if found else None


class Camera:
    """Opens pages, waits until they show what they are opened for, and keeps small pictures of them."""

    def __init__(self, folder: Path, images: Path):
        self.browser, self.images = Browser(folder), images
        images.mkdir(parents=True, exist_ok=True)

    def open(self, url: str, *words: str, width: int = WIDE, height: int = TALL) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 700}
        self.browser.ask("Emulation.setDeviceMetricsOverride", **size)
        light = [{"name": "prefers-color-scheme", "value": "light"}]
        self.browser.ask("Emulation.setEmulatedMedia", features=light)
        self.browser.ask("Page.navigate", url=url)
        self.wait(*words)

    def wait(self, *words: str) -> None:
        text = "document.body ? document.body.innerText : ''"
        try:
            _until(lambda: all(word in self.browser.evaluate(text) for word in words), SECONDS, f"{words} on the page")
        except SystemExit:
            print(f"the page says:\n{self.browser.evaluate(text)[:2000]}", flush=True)
            raise
        time.sleep(SETTLE)

    def take(self, name: str) -> None:
        from PIL import Image

        raw = self.images / f".{name}.png"
        self.browser.screenshot(raw, whole=False)
        with Image.open(raw) as picture:
            flat = picture.convert("RGB")
        raw.unlink()
        for colours in COLOURS:
            packed = io.BytesIO()
            flat.quantize(colours, dither=Image.Dither.NONE).save(packed, "png", optimize=True)
            if packed.tell() < MOST_BYTES:
                break
        else:
            raise SystemExit(f"{name}: {packed.tell():,} bytes with {colours} colours; show less of the page")
        (self.images / f"{name}.png").write_bytes(packed.getvalue())
        print(f"{self.images / name}.png  {packed.tell():,} bytes", flush=True)


def take_all(stack: Stack, camera: Camera, parameters: dict[str, Any]) -> None:
    """One run, and the pages about it in the order in which a person comes to them."""
    form = stack.ask("deployments/name/pretrain/zheng68k-mini")["id"]
    camera.open(f"{stack.page}/v2/deployments", "core_promoter", "preprocess")
    camera.take("deployments")
    camera.open(f"{stack.page}/v2/deployments/deployment/{form}/run", "Learning rate", "Start from", height=1500)
    camera.take("form")

    made = stack.ask("deployments/name/pipeline/zheng68k-mini")["id"]
    body = {"state": {"type": "SCHEDULED"}, "parameters": {"parameters": parameters}}
    run = stack.ask(f"deployments/{made}/create_flow_run", body)["id"]

    def half_way() -> dict[str, Any] | None:
        if stack.ask(f"flow_runs/{run}")["state_type"] in ("FAILED", "CRASHED", "CANCELLED"):
            raise SystemExit(f"the run failed: {stack.ask(f'flow_runs/{run}')['state']['message']}")
        bar = stack.artifact("finetune-train-progress")
        return stack.artifact("finetune-train-course") if bar and bar["data"] >= 50 else None

    course = _until(half_way, RUN_SECONDS, "the fine-tuning to be half done")
    camera.open(f"{stack.page}/v2/artifacts/artifact/{course['id']}", "training loss", "speed")
    camera.take("progress")

    _until(
        lambda: half_way() and stack.ask(f"flow_runs/{run}")["state_type"] == "COMPLETED", RUN_SECONDS, "the run to end"
    )
    # The address that links to a run have: the older pages, whose graph is there at once.
    camera.open(f"{stack.page}/runs/flow-run/{run}", "Completed", "Subflow Runs", "submitted to infrastructure")
    time.sleep(GRAPH)
    camera.take("run")

    named = next(tag for tag in _tags(stack, run) if tag.startswith("mlflow-run:")).removeprefix("mlflow-run:")
    camera.open(
        f"http://127.0.0.1:{stack.mlflow}/#/experiments/1/runs/{named}",
        "Run in Prefect",
        "celltype_accuracy",
        height=1100,
    )
    camera.take("mlflow")

    (report,) = stack.folder.glob("workspace/artefacts/evaluate/*/report.html")
    camera.open(report.as_uri(), "Metrics: celltype", height=1000)
    camera.take("report")
    camera.open(report.as_uri(), "Metrics: celltype", width=PHONE, height=844)
    camera.take("report-phone")


def _tags(stack: Stack, run: str) -> list[str]:
    """Of the evaluation that the pipeline has started."""
    below = stack.ask(
        "flow_runs/filter", {"flow_runs": {"parent_flow_run_id": {"any_": [run]}}, "sort": "START_TIME_DESC"}
    )
    return below[0]["tags"]


def _until(found, seconds: float, what: str) -> Any:
    end = time.monotonic() + seconds
    while True:
        if value := found():
            return value
        if time.monotonic() > end:
            raise SystemExit(f"waited {seconds:.0f} s for {what}")
        time.sleep(0.3)


def _answers(address: str) -> bool:
    try:
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(address, timeout=10).close()
    except OSError:
        return False
    return True


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=IMAGES, help="folder of the pictures (default docs/images)")
    parser.add_argument("--max-steps", type=int, help="of each training (default: as `make demo`)")
    chosen = parser.parse_args()
    if CHROMIUM is None:
        raise SystemExit("no Chromium; install it with `apt-get install chromium`")
    with tempfile.TemporaryDirectory(prefix="bmfm-screenshots-") as folder, contextlib.ExitStack() as ending:
        stack = Stack(Path(folder))
        ending.callback(stack.close)
        stack.start()
        camera = Camera(Path(folder) / "browser", chosen.output)
        ending.callback(camera.browser.close)
        take_all(stack, camera, {} if chosen.max_steps is None else {"max_steps": chosen.max_steps})


if __name__ == "__main__":
    main()
