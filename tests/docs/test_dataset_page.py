"""docs/datasets.md: its YAML files are entries of a catalogue, its table is the catalogue, its commands exist."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from bmfm_pipeline import cli
from bmfm_pipeline.config import list_entries
from bmfm_pipeline.config.catalogue import DatasetEntry

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "datasets.md").read_text()
FILES = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.S)
COMMANDS = [
    line.split("  #")[0].strip()
    for block in re.findall(r"```\n(.*?)```", PAGE, flags=re.S)
    for line in block.splitlines()
    if line.startswith("bmfm ")
]


@pytest.mark.parametrize("text", FILES)
def test_a_yaml_file_of_the_page_is_a_dataset(text, tmp_path, monkeypatch, capsys):
    name = yaml.safe_load(text)["name"]
    (tmp_path / f"{name}.yaml").write_text(text)
    monkeypatch.setenv("BMFM_DATASETS", str(tmp_path))
    assert cli.main(["datasets", "show", name]) == 0
    assert f"run it    bmfm run {name}" in capsys.readouterr().out


def test_the_table_names_every_dataset_with_its_variable_and_file():
    rows = {row.split("`")[1]: row for row in PAGE.splitlines() if row.startswith("| `")}
    for entry in list_entries():
        row = rows[entry.name]
        for text in (entry.source.env, entry.source.file, entry.split_column_name):
            assert text is None or f"`{text}`" in row, (entry.name, text)
        assert all(f"`{column.label_column_name}`" in row for column in entry.label_columns)


def test_every_key_of_an_entry_is_explained():
    explained = set(re.findall(r"`([\w.]+)`", PAGE))
    assert set(DatasetEntry.model_fields) - {"kind"} <= explained | {"source"}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page_is_one(command):
    known, rest = cli._parser().parse_known_args(shlex.split(command)[1:])
    assert known.command and all("=" in word for word in rest)
