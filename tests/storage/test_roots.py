"""Places that runs may name: everywhere unless told otherwise, then below the roots only, whatever a path is written like."""

import os

import pytest

from bmfm_pipeline import cli, compose
from bmfm_pipeline.errors import ConfigError
from bmfm_pipeline.storage import Workspace, check_allowed, check_values


@pytest.fixture
def roots(tmp_path, monkeypatch):
    """A folder that is allowed, beside one that is not; and a prefix on s3."""
    for name in ("inside", "outside"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "cells.h5ad").write_bytes(b"")
    monkeypatch.setenv("BMFM_WORKSPACE", str(tmp_path / "inside" / "w"))
    monkeypatch.setenv("BMFM_ALLOWED_ROOTS", f"{tmp_path / 'inside'}{os.pathsep}s3://lab/cells")
    monkeypatch.chdir(tmp_path / "inside")
    return tmp_path


def refused(place, what="it"):
    with pytest.raises(ConfigError, match=r"outside the places that runs may use here \(BMFM_ALLOWED_ROOTS: ") as found:
        check_allowed(place, what)
    return str(found.value)


def test_without_roots_everything_is_allowed(monkeypatch):
    monkeypatch.delenv("BMFM_ALLOWED_ROOTS", raising=False)
    check_allowed("/etc/passwd", "it")
    check_values({"a": "/etc/passwd"})


def test_links_and_dots_are_followed_before_a_place_is_judged(roots):
    inside, outside = roots / "inside", roots / "outside"
    for place in (inside, inside / "new" / "file", "cells.h5ad", f"file://{inside}/cells.h5ad", f"{inside}/*.h5ad"):
        check_allowed(place, "it")
    (inside / "link").symlink_to(outside)
    (inside / "link.h5ad").symlink_to(outside / "cells.h5ad")
    places = [
        outside,
        inside / "link" / "cells.h5ad",
        inside / "link.h5ad",
        f"{inside}/../outside/x",
        "../outside",
        "~/x",
    ]
    places += [f"{roots}/inside-too", f"{roots}/*/cells.h5ad", f"file://{outside}/cells.h5ad"]
    for place in places:
        refused(place)
    assert f"{inside}/link.h5ad (which is {outside}/cells.h5ad)" in refused(inside / "link.h5ad")


def test_addresses_on_s3(roots):
    for place in ("s3://lab/cells", "s3://lab/cells/a/b.h5ad"):
        check_allowed(place, "it")
    for place in ("s3://lab", "s3://lab/cells-of-others/x", "s3://other/cells/x", "s3://lab/cells/../others/x"):
        refused(place)
    assert "secret" not in refused("s3://me:secret@lab/other")


def test_places_that_the_environment_names_are_allowed_too(roots, monkeypatch):
    refused(roots / "outside" / "cells.h5ad")
    monkeypatch.setenv("BMFM_TARGETS_ZHENG68K_DATA", str(roots / "outside"))
    check_allowed(roots / "outside" / "cells.h5ad", "it")


@pytest.mark.parametrize("text", [os.pathsep, "data", "s3://"])
def test_roots_that_are_none_are_refused(monkeypatch, text):
    monkeypatch.setenv("BMFM_ALLOWED_ROOTS", text)
    with pytest.raises(ConfigError, match="BMFM_ALLOWED_ROOTS"):
        check_allowed("/data", "it")


def test_of_a_config_what_names_a_place_is_held_to_it(roots):
    check_values({"label": "CD4+/CD25 T Reg", "model": "org/name", "pattern": "a.b", "file": "cells.h5ad"})
    (roots / "inside" / "link.csv").symlink_to(roots / "outside" / "cells.h5ad")
    for values in ({"map": "link.csv"}, {"steps": [{"args": {"file": "/etc/passwd"}}]}, {"a": "x/../../outside"}):
        with pytest.raises(ConfigError, match="outside the places"):
            check_values(values)


def test_workspace_config_files_and_outputs_of_a_run(roots, capsys):
    outside = roots / "outside"
    with pytest.raises(ConfigError, match=f"the workspace: {outside}/w lies outside"):
        Workspace(outside / "w")
    with pytest.raises(ConfigError, match="the folder of configs"):
        compose("pre_train_config", config_dir=outside)
    for override in (
        f"data_module.dataset_kwargs.label_dict_path={outside}/labels.json",
        "data_module.dataset_kwargs.processed_data_source=../outside/processed.h5ad",
        f"model.checkpoint={outside}",
    ):
        with pytest.raises(ConfigError, match="lies outside the places"):
            compose("fine_tune_train_config", ["dataset=zheng68k-mini", override])
    compose("fine_tune_train_config", ["dataset=zheng68k-mini"])

    def said(*words: str) -> str:
        assert cli.main(list(words)) != 0
        return capsys.readouterr().err

    assert "outside the places" in said("plan", str(outside / "cells.h5ad"), "label=celltype")
    (roots / "inside" / "several").mkdir()
    (roots / "inside" / "several" / "a.h5ad").symlink_to(outside / "cells.h5ad")
    assert f"(which is {outside}/cells.h5ad)" in said("plan", str(roots / "inside" / "several"), "label=celltype")
    words = (
        "--model",
        str(roots / "inside"),
        "--input",
        str(outside / "cells.h5ad"),
        "--output",
        str(roots / "inside"),
    )
    assert f"--input: {outside}/cells.h5ad lies outside" in said("predict", *words)
