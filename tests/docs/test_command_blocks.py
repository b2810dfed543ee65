"""Every command block of the README and the quickstart runs as it stands, but for smaller models and a free port."""

import contextlib
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import anndata
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
TOP = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "docs/quickstart.md")
SMALL = (
    "model.hidden_size=32 model.num_hidden_layers=1 model.num_attention_heads=2 model.intermediate_size=64 "
    "data_module.max_length=64 trainer.warmup_steps=1"
)
TRAINS = re.compile(r"^(bmfm (run|plan|pretrain|finetune) |bmfm-targets-scbert )")
# Installing and testing from within the tests would never end: make only says what it would run.
DRY = {"make test": "make -n test", "make venv": "make -n venv"}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (TOP / page).read_text(), flags=re.S)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def write_promoters(folder: Path) -> None:
    """Sequences of 70 letters, half of them with a TATA box."""
    draw = random.Random(0)
    folder.mkdir(parents=True)
    for split, size in {"train": 200, "dev": 40, "test": 60}.items():
        rows = []
        for label in (row % 2 for row in range(size)):
            text = "".join(draw.choices("ACGT", k=70))
            rows.append(f"{text[:20] + 'TATAAAAG' + text[28:] if label else text},{label}")
        (folder / f"{split}.csv").write_text("\n".join(["sequence,label", *rows]) + "\n")


class Place:
    """A copy of the checkout with cells.h5ad beside it, in which commands run as a person would type them."""

    def __init__(self, folder: Path, cells: Path):
        self.folder, self.port = folder, free_port()
        names = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=TOP, capture_output=True, text=True, check=True
        ).stdout.split("\n")  # fmt: skip
        for name in filter(None, names):
            if (TOP / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(TOP / name, folder / name)
        (folder / ".venv").symlink_to(Path(sys.prefix))
        anndata.read_h5ad(cells)[:300].copy().write_h5ad(folder / "cells.h5ad")
        (folder / "data" / "h5ad").mkdir(parents=True)
        shutil.copyfile(cells, folder / "data" / "h5ad" / "zheng68k.h5ad")
        write_promoters(folder / "data" / "GUE" / "prom" / "prom_core_tata")
        hidden = ("BMFM_WORKSPACE", "BMFM_STATE", "PREFECT_API_URL", "MLFLOW_TRACKING_URI")
        self.environment = {name: value for name, value in os.environ.items() if name not in hidden} | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "BMFM_TARGETS_ZHENG68K_DATA": str(folder / "data"),
            "PREFECT_HOME": str(folder / "prefect-home"),
            "PREFECT_SERVER_API_PORT": str(self.port),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        }

    def smaller(self, line: str) -> str:
        """The line as it is run here."""
        line = DRY.get(line.strip(), line).replace("127.0.0.1:4200", f"127.0.0.1:{self.port}")
        if line.startswith("make demo"):
            # -o: the environment is the one of the tests, and must not be installed anew from this copy.
            return f'make -o .venv/.ready demo ARGS="{SMALL} pretrain.task.max_steps=4 finetune.task.max_steps=6"'
        if "KEY" in line:
            models = (self.folder / "workspace" / "artefacts" / "finetune").iterdir()
            of_cells = [path for path in models if '"name": "cells"' in (path / "artefact.json").read_text()]
            line = line.replace("KEY", max(of_cells, key=lambda path: path.stat().st_mtime).name)
        if TRAINS.match(line):
            words = [word for word in SMALL.split() if word.split("=")[0] not in line]
            line = f"{line} {' '.join(words)}" + ("" if "max_steps" in line else " task.max_steps=4")
        return line

    def run(self, block: str) -> str:
        """Standard output and error of a block, whose processes all end with it."""
        text = "\n".join(self.smaller(line) for line in block.splitlines())
        environment = self.environment
        if "prefect worker" in block:  # a flow runs where the flows are installed: in the checkout that is tested
            environment = environment | {"BMFM_WORKSPACE": str(self.folder / "workspace")}
        process = subprocess.Popen(
            ["bash", "-e", "-o", "pipefail", "-c", text],
            cwd=self.folder, env=environment, text=True, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        lines: list[str] = []
        reading = threading.Thread(target=lambda: lines.extend(process.stdout), daemon=True)
        reading.start()
        try:
            code = process.wait(240)  # workers that the block starts hold the pipe open, and outlive it
            reading.join(0.5)
            shown = "".join(lines)  # not what workers say when their server is stopped
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            reading.join(30)
        assert code == 0, f"{text}\nended with {code}:\n{shown}"
        return shown


@pytest.fixture(scope="module")
def place(tmp_path_factory, mini_h5ad):
    return Place(tmp_path_factory.mktemp("checkout"), mini_h5ad)


CASES = [(page, number) for page in PAGES for number in range(len(blocks(page, "bash")))]


@pytest.mark.parametrize(("page", "number"), CASES)
def test_command_block(page, number, place):
    block = blocks(page, "bash")[number]
    shown = place.run(block)
    assert "Traceback" not in shown
    if block.startswith("make demo"):
        assert "logistic regression (L2)" in shown and "report.html" in shown and "bmfm ui" in shown
    if "GUE" in block:
        assert "logistic regression, words of 1 to 6 letters" in shown and "report.html" in shown
    if "--watch" in block:
        assert "Flow run finished successfully" in shown


def test_there_are_blocks_to_run():
    assert len(CASES) >= 12


def test_python_blocks(place):
    for block in blocks("docs/quickstart.md", "python"):
        done = subprocess.run(
            [sys.executable, "-c", block],
            cwd=place.folder,
            env=place.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
