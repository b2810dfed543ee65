"""Fixtures shared by all tests: golden vectors and real data where the environment offers them, and the demonstration cells."""

import os
import signal
from pathlib import Path

import pytest

os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

# Started in the background, tests inherit an ignored Ctrl-C, and so would every process that they start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

SKIPPED_FOR_DATA: dict[str, int] = {}


def _folder(variable: str, what: str) -> Path:
    folder = os.environ.get(variable)
    if not folder or not Path(folder).is_dir():
        SKIPPED_FOR_DATA[variable] = SKIPPED_FOR_DATA.get(variable, 0) + 1
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


@pytest.fixture(autouse=True)
def _own_places(tmp_path, monkeypatch):
    """No test writes a workspace, MLflow store or Prefect home outside its own folder."""
    monkeypatch.setenv("BMFM_WORKSPACE", str(tmp_path / "workspace"))
    monkeypatch.delenv("BMFM_STATE", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for variable in [name for name in os.environ if name.startswith("BMFM_TARGETS_")]:
        monkeypatch.delenv(variable)


def pytest_terminal_summary(terminalreporter):
    for variable, fixtures in SKIPPED_FOR_DATA.items():
        count = sum(variable in str(report.longrepr) for report in terminalreporter.stats.get("skipped", []))
        terminalreporter.write_line(f"{count} tests skipped because ${variable} is not set ({fixtures} fixture)")
