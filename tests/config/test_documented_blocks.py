"""Every YAML block of docs/configuration.md composes, and its tables name keys that exist, with the defaults they have."""

import re
import typing
from pathlib import Path

import pytest
import yaml

from bmfm_pipeline.config import RunConfig, compose, compose_raw
from bmfm_pipeline.config.adapters import LoraSettings
from bmfm_pipeline.config.models import MODELS, ModelConfig
from bmfm_pipeline.config.run_config import TASKS
from bmfm_pipeline.config.strict import Section
from bmfm_pipeline.config.tasks import TaskConfig
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
    expected.add("promotion")
    assert {section.split(".")[0] for section, _, _ in _rows()} == expected


@pytest.mark.parametrize(("section", "key", "default"), _rows())
def test_a_documented_key_exists_and_has_that_default(packaged, section, key, default):
    if section in ("fields", "label_columns"):
        model = RunConfig.model_fields[section].annotation.__args__[0]
        outer, _, inner = key.rpartition(".")
        if outer:
            model = model.model_fields[outer].annotation.__args__[0]
        field = model.model_fields[inner]
        found = ["required"] if field.is_required() else [field.get_default(call_default_factory=True)]
    elif section == "trainer.lora_config":
        found = [getattr(LoraSettings(), key)]
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
            outer, _, inner = key.partition(".")
            found = [kind.model_fields[outer] for kind in TASKS.values() if outer in kind.model_fields]
            assert found and all(not inner or inner in field.annotation.model_fields for field in found), key


def test_all_losses_are_documented():
    from bmfm_pipeline.config.losses import LOSSES

    if not DOCUMENTATION.exists():
        pytest.skip("docs/configuration.md is not here")
    text = DOCUMENTATION.read_text()
    assert {name for name in LOSSES if f"`{name}`" not in text} == set()
    arguments = {name for kind in LOSSES.values() for name in kind.arguments | kind.label_arguments}
    assert {name for name in arguments if f"`{name}" not in text} == set()


# What a run notes down about itself: nobody writes these.
OF_THE_PROGRAM = {"preset_used", "sizes_from_checkpoint", "notes"}
PAGES = (
    "configuration.md",
    "splits.md",
    "gene-names.md",
    "datasets.md",
    "weights.md",
    "interpreting.md",
    "perturbation.md",
    "dna.md",
)


def _keys(model, section: str = "") -> list[tuple[str, str]]:
    """(section of the config, key) of a section and all within it."""
    kinds = {TaskConfig: TASKS.values(), ModelConfig: MODELS.values()}.get(model, [model])
    found = []
    for kind in kinds:
        for name, field in kind.model_fields.items():
            found.append((section, name))
            inner = [field.annotation]
            while inner:
                part = inner.pop()
                if isinstance(part, type) and issubclass(part, Section):
                    found += _keys(part, f"{section}.{name}".strip("."))
                inner += typing.get_args(part)
    return list(dict.fromkeys(found))


def test_every_key_is_documented():
    text = "\n".join(
        (DOCUMENTATION.parent / page).read_text() for page in PAGES if (DOCUMENTATION.parent / page).exists()
    )
    text += "".join(re.findall(r"^```ya?ml\n(.*?)^```", text, flags=re.M | re.S))
    written = set(
        re.findall(r"\w+", " ".join([*re.findall(r"`([^`\n]+)`", text), *re.findall(r"^[ -]*(\w+):", text, re.M)]))
    )
    missing = [
        f"{section}.{key}".strip(".") for section, key in _keys(RunConfig) if key not in written | OF_THE_PROGRAM
    ]
    assert not missing, f"docs/configuration.md says nothing about {', '.join(missing)}"
