"""Fixtures shared by all tests: golden vectors and real data where the environment offers them, and the demonstration cells.

Two processes run the tests side by side (pytest-xdist): a module stays in one of them, and modules that share a server too.
"""

import os
import signal
import sys
from pathlib import Path

import pytest

SIDE_BY_SIDE = "PYTEST_XDIST_WORKER" in os.environ
if SIDE_BY_SIDE:
    # Threads of processes that run side by side would wait for each other at every step. Libraries read this when they are loaded.
    for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
        os.environ.setdefault(_name, "1")

# Fixtures of tests/e2e and tests/faults: real processes, and the one Prefect server with its workers.
from machines import (  # noqa: E402, F401
    _finished,
    _wait_for,
    make_machine,
    revision,
    server,
    tiny_model,
    zheng68k_folder,
)

os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

# Started in the background, tests inherit an ignored Ctrl-C, and so would every process that they start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

DATA_VARIABLES = ("BMFM_GOLDEN_DIR", "BMFM_DATA_DIR", "BMFM_SEED_FILE")
# The longest first, so that no process is left alone with them at the end.
LONGEST = (
    "tests/e2e/test_prefect_server",
    "tests/e2e",
    "tests/faults",
    "tests/docs",
    "tests/flows",
    "tests/commands",
    "tests/training",
)
# Modules that use the one Prefect server with its workers.
ON_THE_SERVER = (
    "test_deploying.py",
    "test_prefect_server.py",
    "test_scheduled_reevaluation.py",
    "test_server_pages.py",
    "test_prefect_runs.py",
)


def pytest_collection_modifyitems(items):
    def place(item) -> int:
        if item.path.name in ON_THE_SERVER:
            return 0
        return next((rank for rank, start in enumerate(LONGEST) if item.nodeid.startswith(start)), len(LONGEST))

    items.sort(key=place)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Whole modules go to a process, and those on the one Prefect server to the same."""
    from xdist.scheduler import LoadScopeScheduling

    class ByModule(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            module = nodeid.split("::")[0]
            return "server" if module.endswith(ON_THE_SERVER) else module

    return ByModule(config, log)


def _folder(variable: str, what: str) -> Path:
    folder = os.environ.get(variable)
    if not folder or not Path(folder).is_dir():
        pytest.skip(f"{what}: ${variable} is not set to a folder")
    return Path(folder)


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    return _folder("BMFM_GOLDEN_DIR", "golden vectors")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    return _folder("BMFM_DATA_DIR", "real data")


@pytest.fixture(scope="session")
def mini_h5ad(tmp_path_factory) -> Path:
    """The 700 real Zheng68K cells that ship inside scanpy, as counts."""
    from bmfm_pipeline.data.sources import zheng68k_mini

    path = tmp_path_factory.mktemp("zheng68k-mini") / "zheng68k-mini.h5ad"
    zheng68k_mini.build(path)
    return path


@pytest.fixture(scope="session")
def prepared(mini_h5ad, tmp_path_factory) -> Path:
    """The folder of the preprocess artefact of the 700 real cells."""
    from bmfm_pipeline.stages import plan_stage, run_stage

    workspace = tmp_path_factory.mktemp("training-workspace")
    jobs = plan_stage("preprocess", str(mini_h5ad), label="celltype", workspace=str(workspace))
    return Path(run_stage(jobs[-1])["uri"])


@pytest.fixture(autouse=SIDE_BY_SIDE)
def _threads_stay_one():
    """Whatever a test before this one has set; a compiled loop of numba sets as many as there are processors, for torch too."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(scope="module")
def one_thread():
    """Models this small are trained faster by one thread than by several that wait for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # for the children
        yield
    torch.set_num_threads(before)


@pytest.fixture
def cases(prepared, tmp_path):
    """Tiny trainings on those cells."""
    from training_cases import Cases

    return Cases(prepared, tmp_path)


@pytest.fixture(scope="session")
def s3_server():
    """A real S3 server on loopback."""
    from s3_server import S3Server

    started = S3Server()
    yield started
    started.stop()


@pytest.fixture
def s3(s3_server, monkeypatch):
    """An empty bucket on it, with the environment that leads there."""
    from s3_server import Bucket

    return Bucket(s3_server, monkeypatch)


@pytest.fixture(autouse=True)
def _own_places(tmp_path, monkeypatch):
    """No test writes a workspace, MLflow store or Prefect home outside its own folder."""
    monkeypatch.setenv("BMFM_WORKSPACE", str(tmp_path / "workspace"))
    monkeypatch.delenv("BMFM_STATE", raising=False)
    monkeypatch.setenv("BMFM_DATA_HOME", str(tmp_path / "data-home"))
    monkeypatch.delenv("BMFM_DATASETS", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("BMFM_CACHE_DIR", str(tmp_path / "cache"))
    for variable in [name for name in os.environ if name.startswith("BMFM_TARGETS_")]:
        monkeypatch.delenv(variable)


@pytest.fixture
def say(record_property):
    """Say a line in the summary at the end, from whichever process the test runs in."""
    return lambda line: record_property("said", line)


def pytest_terminal_summary(terminalreporter):
    for report in terminalreporter.stats.get("passed", []):
        for line in [text for name, text in report.user_properties if name == "said"]:
            terminalreporter.write_line(line)
    for variable in DATA_VARIABLES:
        if count := sum(
            f"${variable} is not set" in str(report.longrepr) for report in terminalreporter.stats.get("skipped", [])
        ):
            terminalreporter.write_line(f"{count} tests skipped because ${variable} is not set")
