"""Configs written to a folder for a test, and the YAML blocks of a document completed to whole configs."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

DOCUMENTATION = Path(__file__).parents[2] / "docs" / "configuration.md"
SEED_FILE = os.environ.get("BMFM_SEED_FILE", "")
BASES = {
    "TestTaskConfig": "test_config",
    "PredictTaskConfig": "predict_config",
    "InterpretTaskConfig": "interpret_config",
}


def yaml_blocks(document: Path) -> list[str]:
    """The text of all fenced yaml blocks of a Markdown file, in order."""
    return re.findall(r"^```ya?ml\s*\n(.*?)^```", document.read_text(), flags=re.M | re.S)


def pytest_generate_tests(metafunc):
    """A test that takes `seed_block` or `documented_block` runs once for every block of that document."""
    for name, document, variable in (
        ("seed_block", SEED_FILE, "$BMFM_SEED_FILE is not set to the file that describes the configuration"),
        ("documented_block", DOCUMENTATION, "docs/configuration.md is not here"),
    ):
        if name in metafunc.fixturenames:
            blocks = yaml_blocks(Path(document)) if document and Path(document).is_file() else []
            named = [
                pytest.param(block, id=f"{number}-{'-'.join(content(block))}") for number, block in enumerate(blocks)
            ]
            metafunc.parametrize(name, named or [pytest.param("", marks=pytest.mark.skip(reason=variable))])


@pytest.fixture(scope="session")
def seed_blocks() -> list[str]:
    if not SEED_FILE or not Path(SEED_FILE).is_file():
        pytest.skip("$BMFM_SEED_FILE is not set to the file that describes the configuration")
    return yaml_blocks(Path(SEED_FILE))


def content(block: str) -> dict[str, Any]:
    return yaml.safe_load(block)


def defaults_for(block: str) -> dict[str, Any]:
    """The defaults list that a block of sections belongs under: what its task and data module say it is for."""
    sections = content(block)
    task, module = sections.get("task") or {}, sections.get("data_module") or {}
    base = BASES.get(str(task.get("_target_")).rpartition(".")[2], "pre_train_config")
    if module.get("collation_strategy") == "sequence_classification":
        base = "fine_tune_train_config"
    listed: list[Any] = [base]
    if "trainer" in sections and "data_module" not in sections:  # losses may be on fields and on labels
        listed.append({"override /data_module": "base_multi_task"})
    return {"defaults": [*listed, "_self_"]}


@pytest.fixture
def write():
    """Write a config file into a folder (`model/small` makes a group) and return the folder."""

    def write_config(folder: Path, name: str, text: str) -> Path:
        file = folder / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return folder

    return write_config


@pytest.fixture
def complete(tmp_path, write):
    """Write blocks as config `case`, on top of the packaged one they belong to; a block with its own defaults stands alone."""

    def write_blocks(*blocks: str) -> Path:
        text = "\n".join(blocks)
        head = "" if "defaults" in content(text) else yaml.safe_dump(defaults_for(text))
        return write(tmp_path, "case", head + text)

    return write_blocks


@pytest.fixture
def without_accelerator(monkeypatch):
    """A machine without an accelerator, whatever runs the tests."""
    monkeypatch.setattr("bmfm_pipeline.config.presets.find_accelerator", lambda: None)


@pytest.fixture
def with_accelerator(monkeypatch):
    """A machine with a GPU, whatever runs the tests."""
    monkeypatch.setattr("bmfm_pipeline.config.presets.find_accelerator", lambda: "gpu")
