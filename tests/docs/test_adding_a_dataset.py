"""docs/adding-a-dataset.md as its reader follows it: one YAML file, then plan, preprocessing and a deployment."""

import json
import re
from pathlib import Path

import pytest
import yaml

from bmfm_pipeline import cli
from bmfm_pipeline.config import load_entry

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "adding-a-dataset.md").read_text()
FILE, EXPECTED = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.S)


@pytest.fixture
def liver(tmp_path, monkeypatch, mini_h5ad) -> Path:
    """The folder with the page's file, and cells that have its columns."""
    import anndata
    import numpy as np

    cells = anndata.read_h5ad(mini_h5ad)
    donors = np.arange(len(cells)) % 20
    cells.obs["cell_type"] = cells.obs["celltype"].astype(str)
    cells.obs["donor"] = [f"d{donor}" for donor in donors]
    cells.obs["age"] = 30.0 + donors
    cells.write_h5ad(tmp_path / "liver.h5ad")
    (tmp_path / "liver.yaml").write_text(FILE)
    monkeypatch.setenv("BMFM_DATASETS", str(tmp_path))
    monkeypatch.setenv("BMFM_WORKSPACE", str(tmp_path / "workspace"))
    return tmp_path


def answer(capsys, *words):
    assert cli.main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_it_is_planned_and_preprocessed_by_its_name(liver, capsys):
    stages = [row["stage"] for row in answer(capsys, "plan", "liver")]
    assert stages == ["preprocess", "pretrain", "finetune", "evaluate"]
    folder = Path(answer(capsys, "preprocess", "liver")["artefacts"]["preprocess"])
    import anndata

    made = anndata.read_h5ad(folder / "processed.h5ad")
    column = json.loads((folder / "split.json").read_text())["column"]
    homes = made.obs.groupby("donor", observed=True)[column].nunique()
    assert (homes == 1).all() and set(made.obs[column]) == {"train", "dev", "test"}
    labels = json.loads((folder / "label_dict.json").read_text())
    assert [entry["label_name"] for entry in labels] == ["cell_type", "age"]
    assert made.n_obs <= 700 and made.X.max() <= 9


def test_its_deployments_are_among_those_that_are_written(liver):
    from flows import deployments

    found = yaml.safe_load(deployments.render())["deployments"]
    flows = {entry["entrypoint"].split(":")[1] for entry in found if entry["name"] == "liver"}
    assert flows >= {"preprocess", "pretrain", "finetune", "evaluate", "pipeline"}
    assert all(entry["parameters"]["parameters"]["target"] == "liver" for entry in found if entry["name"] == "liver")


def test_what_others_reached_is_shown_with_its_source(liver, capsys):
    (liver / "liver.yaml").write_text(FILE + EXPECTED)
    assert cli.main(["datasets", "show", "liver"]) == 0
    shown = capsys.readouterr().out
    assert "logistic regression: accuracy 0.91, f1 0.85 (by donor, five folds; our notebook, May)" in shown
    assert "no value of obs['donor'] in two splits" in shown and "age (number)" in shown
    assert load_entry("liver").expected[0].scores["f1"] == 0.85


def test_commands_of_the_page_are_commands():
    for block in re.findall(r"```\n(.*?)```", PAGE, flags=re.S):
        for line in block.splitlines():
            if line.startswith("bmfm "):
                known, _ = cli._parser().parse_known_args(line.split("  #")[0].split()[1:])
                assert known.command
