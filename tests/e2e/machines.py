"""Real processes for the end-to-end tests: the command line, a Prefect server with workers, and none left behind."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
MARK = "BMFM_TEST_MARK"
# Prefect waits a minute for its SQLite database where another of its connections holds it, and answers then.
BUSY_SECONDS = 90
DEPLOYED = ("zheng68k-mini", "zheng68k", "file", "demo")
# A model that trains in a second; written sizes also keep the laptop preset away.
TINY_MODEL = [
    "model.hidden_size=32",
    "model.num_hidden_layers=1",
    "model.num_attention_heads=2",
    "model.intermediate_size=64",
    "data_module.max_length=64",
]


class Machine:
    """As good as a computer of its own: environment, home and workspace in one folder, its processes counted."""

    def __init__(self, folder: Path, **environment: str):
        self.folder = folder
        self.workspace = folder / "workspace"
        self.state = folder / "workspace.state"
        home = folder / "home"
        home.mkdir(parents=True)
        own = ("BMFM_", "PREFECT_", "MLFLOW_")
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith(own)}
        self.environment |= {
            MARK: uuid.uuid4().hex,
            "HOME": str(home),
            "XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache")),
            "BMFM_WORKSPACE": str(self.workspace),
            # Trainings that run at the same time would otherwise wait for each other's threads at every step.
            "OMP_NUM_THREADS": "1",
            **environment,
        }

    def start(self, *command: Any, log: Path | None = None, **environment: str) -> subprocess.Popen:
        """A process in a session of its own; output goes to `log`, or to pipes."""
        program = BIN / str(command[0])
        words = [str(program if program.exists() else command[0]), *map(str, command[1:])]
        with contextlib.ExitStack() as stack:
            if log is None:
                out, err = subprocess.PIPE, subprocess.PIPE
            else:
                out, err = stack.enter_context(open(log, "ab")), subprocess.STDOUT
            return subprocess.Popen(
                words,
                cwd=self.folder if command[0] != "prefect" else ROOT,
                env={**self.environment, **environment},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                text=True,
                start_new_session=True,
            )

    def run(self, *command: Any, seconds: float = 240, **environment: str) -> subprocess.CompletedProcess:
        """Run to the end; what does not end in time is ended, and what it said is in the error."""
        process = self.start(*command, **environment)
        return finished(process, seconds)

    def processes(self) -> list[psutil.Process]:
        """Everything alive that was started for this machine, however far down and in whatever session."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == self.environment[MARK] and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def training_children(self) -> list[psutil.Process]:
        return [process for process in self.processes() if "bmfm_pipeline.training.child" in _command_line(process)]

    def end(self) -> None:
        """End whatever is left: politely first, so that servers close their database."""
        left = self.processes()
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.terminate()
        psutil.wait_procs(left, timeout=10)
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        wait_for(lambda: not self.processes(), 10, "every process to be gone")


def _command_line(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.Error):
        return process.cmdline()
    return []


def finished(process: subprocess.Popen, seconds: float) -> subprocess.CompletedProcess:
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        pytest.fail(f"{' '.join(process.args)} did not end within {seconds:.0f} s\n{out[-2000:]}\n{err[-4000:]}")
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def wait_for(found, seconds: float, what: str, every: float = 0.1):
    """Poll until `found` returns something true, and return it."""
    until = time.monotonic() + seconds
    while True:
        if value := found():
            return value
        if time.monotonic() > until:
            pytest.fail(f"waited {seconds:.0f} s for {what}")
        time.sleep(every)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class PrefectServer:
    """A server on loopback with a worker for each pool, and the deployments of deployments/prefect.yaml."""

    def __init__(self, machine: Machine, port: int):
        self.machine, self.port = machine, port
        self.page = f"http://127.0.0.1:{port}"
        self.status_before = self.git_status()
        self.process: subprocess.Popen | None = None
        self.workers: dict[str, subprocess.Popen] = {}

    def start(self) -> None:
        """Start the server; it takes seconds until it is `ready`."""
        log = self.machine.folder / "server.log"
        command = ("prefect", "server", "start", "--host", "127.0.0.1", "--port", self.port)
        self.process = self.machine.start(*command, log=log)

    def wait_until_ready(self) -> None:
        wait_for(self.ready, 120, f"the server to answer (its log is {self.machine.folder / 'server.log'})", every=0.3)

    def start_worker(self, pool: str) -> None:
        log = self.machine.folder / f"worker-{pool}.log"
        self.workers[pool] = self.machine.start("prefect", "worker", "start", "--pool", pool, log=log)

    def git_status(self) -> str | None:
        """What git says of the checkout that is deployed from; None when it is none."""
        command = ["git", "status", "--porcelain"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout if done.returncode == 0 else None

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """GET, or POST with a body, under /api."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.page}/api/{path}", data, {"Content-Type": "application/json"})
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        until = time.monotonic() + BUSY_SECONDS
        while True:
            try:
                with opener.open(request, timeout=BUSY_SECONDS) as answer:
                    return json.load(answer)
            except urllib.error.HTTPError as error:
                # Its database is busy: Prefect's own client asks again too.
                if error.code != 503 or time.monotonic() > until:
                    raise
                time.sleep(0.5)

    def ready(self) -> bool:
        try:
            return self.ask("health") is True
        except OSError:
            return False

    def command(self, *words: Any, seconds: float = 120) -> subprocess.CompletedProcess:
        return self.machine.run("prefect", *words, seconds=seconds)

    def create_run(self, deployment: str, **parameters: Any) -> str:
        """The id of a new run of `flow/deployment`."""
        found = self.ask(f"deployments/name/{deployment}")
        body = {"state": {"type": "SCHEDULED"}, **({"parameters": {"parameters": parameters}} if parameters else {})}
        return self.ask(f"deployments/{found['id']}/create_flow_run", body)["id"]

    def flow_run(self, run: str) -> dict[str, Any]:
        return self.ask(f"flow_runs/{run}")

    def wait_until_final(self, run: str, seconds: float) -> dict[str, Any]:
        def final():
            found = self.flow_run(run)
            return found if found["state_type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED") else None

        try:
            return wait_for(final, seconds, f"run {run} to end", every=0.3)
        except BaseException:
            print(self.logs(run))
            raise

    def runs_under(self, run: str) -> list[dict[str, Any]]:
        """Flow runs that run `run` has started, oldest first."""
        return self.ask(
            "flow_runs/filter", {"flow_runs": {"parent_flow_run_id": {"any_": [run]}}, "sort": "START_TIME_ASC"}
        )

    def task_runs(self, run: str) -> list[dict[str, Any]]:
        return self.ask("task_runs/filter", {"flow_runs": {"id": {"any_": [run]}}, "sort": "EXPECTED_START_TIME_ASC"})

    def artifacts(self, run: str) -> list[dict[str, Any]]:
        return self.ask("artifacts/filter", {"flow_runs": {"id": {"any_": [run]}}})

    def logs(self, run: str) -> str:
        lines = self.ask("logs/filter", {"logs": {"flow_run_id": {"any_": [run]}}, "sort": "TIMESTAMP_ASC"})
        return "\n".join(line["message"] for line in lines)


@pytest.fixture(scope="session", name="wait_for")
def _wait_for():
    return wait_for


@pytest.fixture(scope="session", name="finished")
def _finished():
    return finished


@pytest.fixture(scope="session")
def tiny_model() -> list[str]:
    """Overrides for a model that trains in a second; written sizes also keep the laptop preset away."""
    return TINY_MODEL


@pytest.fixture(scope="session")
def revision() -> str | None:
    """The commit that is tested, where the tests run in a checkout."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


@pytest.fixture(scope="module")
def make_machine(tmp_path_factory):
    """A function that makes a machine of this module; whatever still runs there is ended after the module."""
    made = []

    def make(name: str, **environment: str) -> Machine:
        made.append(Machine(tmp_path_factory.mktemp(name), **environment))
        return made[-1]

    yield make
    for machine in made:
        machine.end()


@pytest.fixture(scope="session")
def zheng68k_folder(tmp_path_factory, mini_h5ad) -> Path:
    """A folder as BMFM_TARGETS_ZHENG68K_DATA names it, with 400 cells.

    Each is the sum of two of one type, because the filters want more counts and genes than the cells at hand have, cut
    to 320 genes, because long cells train slowly.
    """
    import anndata
    import numpy as np

    cells = anndata.read_h5ad(mini_h5ad)
    counts = cells.X.toarray() if hasattr(cells.X, "toarray") else np.asarray(cells.X)
    types = cells.obs["celltype"].to_numpy()
    generator = np.random.default_rng(0)
    names = np.repeat(np.unique(types), 40)
    rows = []
    for name in names:
        row = counts[generator.choice(np.flatnonzero(types == name), 2)].sum(axis=0)
        present = np.flatnonzero(row)
        row[generator.choice(present, max(0, len(present) - 320), replace=False)] = 0
        rows.append(row)
    summed = anndata.AnnData(np.stack(rows).astype("float32"), var=cells.var[[]])
    summed.obs_names = [f"cell{number}" for number in range(len(rows))]
    summed.obs["celltype"] = names
    folder = tmp_path_factory.mktemp("zheng68k")
    (folder / "h5ad").mkdir()
    summed.write_h5ad(folder / "h5ad" / "zheng68k.h5ad")
    return folder


def some_deployments(folder: Path) -> Path:
    """The committed prefect.yaml without the deployments of datasets that no test here runs: there are a hundred."""
    whole = yaml.safe_load((ROOT / "deployments" / "prefect.yaml").read_text())
    whole["deployments"] = [entry for entry in whole["deployments"] if entry["name"] in DEPLOYED]
    path = folder / "prefect.yaml"
    path.write_text(yaml.safe_dump(whole, sort_keys=False))
    return path


@pytest.fixture(scope="session")
def server(tmp_path_factory, zheng68k_folder):
    """As a person sets it up: server, pools, `prefect deploy --all` from the top of the checkout, two workers."""
    from flows.local import QUIET

    port = free_port()
    folder = tmp_path_factory.mktemp("server")
    api = f"http://127.0.0.1:{port}/api"
    machine = Machine(
        folder,
        **QUIET,
        PREFECT_HOME=str(folder / "prefect"),
        PREFECT_API_URL=api,
        PREFECT_SERVER_UI_API_URL=api,
        PREFECT_WORKER_QUERY_SECONDS="1",
        BMFM_TARGETS_ZHENG68K_DATA=str(zheng68k_folder),
    )
    started = PrefectServer(machine, port)
    try:
        started.start()
        started.wait_until_ready()
        pools = [machine.start("prefect", "work-pool", "create", pool, "--type", "process") for pool in ("cpu", "gpu")]
        for process in pools:
            assert finished(process, 60).returncode == 0
        deploying = machine.start(
            "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", some_deployments(folder)
        )
        for pool in ("cpu", "gpu"):
            started.start_worker(pool)
        deployed = finished(deploying, 300)
        assert deployed.returncode == 0, deployed.stdout + deployed.stderr
        yield started
    finally:
        machine.end()
