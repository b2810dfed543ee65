"""Every YAML block of docs/configuration.md composes, and its tables name keys that exist, with the defaults they have."""

import re
from pathlib import Path

import pytest
import yaml

from bmfm_pipeline.config import RunConfig, compose, compose_raw
from bmfm_pipeline.config.run_config import TASKS
from bmfm_pipeline.config.tree import PACKAGED

DOCUMENTATION = Path(__file__).parents[2] / "docs" / "configuration.md"


def _rows() -> list[tuple[str, str, str]]:
    """(section, key, default) of every row of the tables below a heading that names a section."""
    rows, section = [], ""
    for line in DOCUMENTATION.read_text().splitlines() if DOCUMENTATION.exists() else []:
        if line.startswith("#"):
            found = re.search(r"\(`([\w.]+)`\)", line)
            section = found[1] if found else ""
        elif section and (found := re.match(r"\| `([\w.]+)` \| (`?)(.+?)\2 \| .* \|$", line)):
            rows.append((section, found[1], found[3]))
    losses = {"trainer"}  # its second table is of losses
    return [row for row in rows if not (row[0] in losses and " " in row[2])]


@pytest.fixture(scope="module")
def packaged() -> list[dict]:
    return [compose_raw(path.stem) for path in PACKAGED.glob("*.yaml")]


def test_a_documented_block_composes(documented_block, complete):
    run = compose("case", config_dir=complete(documented_block))
    assert isinstance(run, RunConfig)
    if run.is_training:
        assert run.trainer.losses


def test_the_document_shows_every_section():
    if not DOCUMENTATION.exists():
        pytest.skip("docs/configuration.md is not here")
    expected = {"seed", "fields", "label_columns", "data_module", "tokenizer", "model", "trainer", "task", "evaluation"}
    assert {section for section, _, _ in _rows()} == expected


@pytest.mark.parametrize(("section", "key", "default"), _rows())
def test_a_documented_key_exists_and_has_that_default(packaged, section, key, default):
    if section in ("fields", "label_columns"):
        model = RunConfig.model_fields[section].annotation.__args__[0]
        field = model.model_fields[key]
        found = ["required"] if field.is_required() else [field.default]
    else:
        found = [_at(config.get(section), key) for config in packaged]
    meant = float(default) if re.fullmatch(r"[\d.]+e-?\d+", default) else yaml.safe_load(default)
    assert meant in found


def _at(values, key: str):
    for part in key.split("."):
        if not isinstance(values, dict) or part not in values:
            return "no such key"
        values = values[part]
    return values


def test_a_task_key_is_documented_for_a_task_that_has_it():
    for section, key, _ in _rows():
        if section == "task":
            assert any(key in kind.model_fields for kind in TASKS.values())


def test_all_losses_are_documented():
    from bmfm_pipeline.config.losses import LOSSES

    if not DOCUMENTATION.exists():
        pytest.skip("docs/configuration.md is not here")
    text = DOCUMENTATION.read_text()
    offered = set(LOSSES) - {"hce"}  # needs an ontology of labels
    assert {name for name in offered if f"`{name}`" not in text} == set()
