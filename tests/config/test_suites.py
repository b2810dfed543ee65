"""Benchmark suites: the packaged ones, those of a person, and what a command line changes of them."""

import pytest
import yaml

from bmfm_pipeline.config import list_entries
from bmfm_pipeline.config.suites import FOLDER, list_suites, load_suite, suite_with
from bmfm_pipeline.errors import ConfigError


@pytest.fixture
def write(tmp_path):
    def write(name="mine", **changes):
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({"name": name, "datasets": ["zheng68k-mini"], **changes}))
        return path

    return write


def test_packaged_suites_name_datasets_of_the_catalogue():
    names = [entry.name for entry in list_entries()]
    suites = list_suites()
    assert {"demo", "cell-type", "perturbation"} <= {suite.name for suite in suites}
    for suite in suites:
        assert suite.title and all(entry.dataset in names for entry in suite.datasets), suite.name


def test_packaged_suites_say_which_variables_point_at_their_data():
    for suite in list_suites():
        text = (FOLDER / f"{suite.name}.yaml").read_text()
        for entry in list_entries():
            if entry.source.env and entry.name in [dataset.dataset for dataset in suite.datasets]:
                assert entry.source.env in text, f"{suite.name}: {entry.name}"


def test_a_file_of_ones_own_with_data_beside_it(write, tmp_path):
    path = write(datasets=["zheng68k-mini", {"dataset": "data/cells.h5ad", "label": "celltype"}], seeds=[1, 2])
    suite = load_suite(str(path))
    assert [(entry.name, entry.dataset) for entry in suite.datasets] == [
        ("zheng68k-mini", "zheng68k-mini"),
        ("cells", str(tmp_path / "data" / "cells.h5ad")),
    ]
    assert suite.models[0].name == "model" and suite.seeds == [1, 2]


def test_a_folder_of_suites(write, tmp_path, monkeypatch):
    write()
    monkeypatch.setenv("BMFM_SUITES", str(tmp_path))
    assert load_suite("mine").name == "mine"
    write("demo")
    with pytest.raises(ConfigError, match="a suite 'demo' is there already"):
        list_suites()


@pytest.mark.parametrize(
    ("name", "said"),
    [("demoo", "did you mean 'demo'"), ("no/such.yaml", "no such file; suites known by name: cell-type, demo")],
)
def test_a_suite_that_is_not_there(name, said):
    with pytest.raises(ConfigError, match=said):
        load_suite(name)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seeds": [1, 1]}, "name each seed once"),
        ({"datasets": []}, "datasets"),
        ({"datasets": ["a/x.h5ad", "b/x.h5ad"]}, "two datasets are called 'x'"),
        ({"models": [{"name": "a"}, {"name": "a"}]}, "two models are called 'a'"),
        ({"seed": 3}, "did you mean 'seeds'"),
        ({"datasets": [{"dataset": "zheng68k-mini", "labels": "x"}]}, "did you mean 'label'"),
    ],
)
def test_what_a_suite_cannot_say(write, changes, said):
    with pytest.raises(ConfigError, match=said):
        load_suite(str(write(**changes)))


def test_words_of_a_command_line():
    suite = load_suite("cell-type")
    assert suite_with(suite, ["seeds=2"]).seeds == suite.seeds[:2]
    assert suite_with(suite, ["seeds=[7,9]"]).seeds == [7, 9]
    changed = suite_with(suite, ["datasets=zheng68k,myeloid", "controls=full", "task.max_steps=3"])
    assert [entry.name for entry in changed.datasets] == ["zheng68k", "myeloid"]
    assert changed.control_words == "full"
    assert changed.models[0].overrides == [*suite.models[0].overrides, "task.max_steps=3"], "after what the suite says"
    for words, said in (
        (["datasets=zheng86k"], "did you mean 'zheng68k'"),
        (["seeds=few"], "write how many"),
        (["seeds_of=luck"], "seeds_of"),
    ):
        with pytest.raises(ConfigError, match=said):
            suite_with(suite, words)
