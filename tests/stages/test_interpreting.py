"""Interpret on real cells: files, tables and page, for test cells and cells of a file; reuse, and what is refused."""

import csv
import json
import shutil
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest

from bmfm_pipeline import cli
from bmfm_pipeline.data.label_files import read_label_dict
from bmfm_pipeline.errors import ConfigError, DataError
from bmfm_pipeline.evaluation.attributions import read_attributions, scores_by_gene
from bmfm_pipeline.stages import STAGES, plan_stage, run_stage

pytest.importorskip("captum", reason="captum is not installed: pip install 'bmfm-pipeline[interpret]'")
pytestmark = pytest.mark.slow
QUICK = ["task.max_cells=2", "task.resamples=50", "task.permutations=20"]


def planned(finished, *words: str):
    named = f"task.checkpoint={finished.artefacts['finetune']}"
    return plan_stage(
        "interpret", overrides=[named, *QUICK, *words], config_name="interpret_config", workspace=finished.workspace
    )


@pytest.fixture(scope="module")
def interpreted(finished) -> Path:
    (job,) = planned(finished, "task.sanity_checks=true")
    events = []
    found = run_stage(job, events.append)
    assert [event["step_name"] for event in events if event["kind"] == "step"] == [
        "attribute",
        "table",
        "report",
        "publish",
    ]
    assert found["table"] == [] and found["links"]["Report"].endswith("interpret.html")
    return Path(found["uri"])


def test_every_cell_has_every_class_and_a_score_of_length_one_for_each_gene(finished, interpreted):
    cells = read_attributions(interpreted / "attributions.json")
    stored = pd.read_parquet(Path(finished.artefacts["evaluate"]) / "predictions.parquet").set_index("cell")
    classes = read_label_dict(Path(finished.artefacts["finetune"]) / "label_dict.json")["celltype"]
    assert 10 <= len(cells) <= 20 and {cell["name"] for cell in cells} <= set(stored.index)
    genes = set(anndata.read_h5ad(finished.file, backed="r").var_names)
    for cell in cells:
        assert set(cell) == {"name", "label_column_attributions"}
        (column,) = cell["label_column_attributions"]
        assert set(column) == {"label_column_name", "pred_label", "label_attributions"}
        assert column["pred_label"] == stored.loc[cell["name"], "celltype_predicted"]
        assert [entry["label_name"] for entry in column["label_attributions"]] == sorted(classes, key=classes.get)
        for entry in column["label_attributions"]:
            scores = np.array([score for _, score in entry["attributions"]])
            assert abs(np.square(scores).sum() - 1) < 1e-4 and (np.diff(np.abs(scores)) <= 0).all()
            assert {gene for gene, _ in entry["attributions"]} <= genes


def test_sums_are_the_change_of_the_score_in_every_cell(interpreted):
    with open(interpreted / "cells.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 10 * len({row["cell"] for row in rows})
    for row in rows:
        ways = sum(float(row[name]) for name in ("positions", "cell_summary", "linear_path"))
        change = float(row["score"]) - float(row["baseline_score"])
        assert abs(ways - change - float(row["delta"])) < 1e-6 and float(row["error"]) < 0.01


def test_the_table_is_the_mean_over_cells_of_the_class(interpreted):
    table = pd.read_csv(interpreted / "attributions.csv")
    assert list(table) == [
        "label", "class", "gene", "mean", "sd", "n_cells", "n_present", "ci_low", "ci_high", "p_ttest", "p_null", "q_null",
        "highlight", "mean_logit",
    ]  # fmt: skip
    assert len(table) == len(pd.read_parquet(interpreted / "attributions.parquet"))
    cells, facts = read_attributions(interpreted / "attributions.json"), pd.read_csv(interpreted / "cells.csv")
    own = facts[facts["own"] & (facts["class"] == facts["true"])]
    kind = own["class"].value_counts().index[0]
    scores = scores_by_gene(cells, "celltype", kind)[own.loc[own["class"] == kind, "cell"].tolist()]
    expected = scores.dropna(how="all").fillna(0).mean(axis=1)
    found = table[table["class"] == kind].set_index("gene")["mean"]
    np.testing.assert_allclose(found[expected.index], expected, atol=1e-5)


def test_the_page_is_of_one_file_and_says_what_can_be_believed(interpreted):
    page, found = (
        (interpreted / "interpret.html").read_text(),
        json.loads((interpreted / "interpretation.json").read_text()),
    )
    assert "http://" not in page.replace('xmlns="http://www.w3.org/2000/svg"', "") and "<script src" not in page
    assert set(found["checks"]["sanity"]) == {"head", "model", "another_class"}
    assert any("add up to the change" in said for said in found["sentences"])
    assert "all weights shuffled" in page and "Genes in bold stand out" in page
    assert len(list((interpreted / "figures").glob("*.svg"))) == len(found["labels"]["celltype"]["classes"])


def test_cells_of_a_file_are_attributed_as_those_of_the_data(finished, interpreted, tmp_path):
    cells = anndata.read_h5ad(finished.file)
    known = read_attributions(interpreted / "attributions.json")
    some = [cell["name"] for cell in known[:4]]
    file = tmp_path / "cells.h5ad"
    part = cells[some].copy()[:, ::-1].copy()
    del part.obs["celltype"]
    part.write_h5ad(file)
    (job,) = planned(finished, f"task.cells={file}", "task.attribute_filter={celltype: [CD19+ B]}")
    again = Path(run_stage(job)["uri"])
    ours, theirs = (
        scores_by_gene(found, "celltype", "CD19+ B")[some]
        for found in (known, read_attributions(again / "attributions.json"))
    )
    ours = ours.dropna(how="all").sort_index()
    assert list(ours.index) == list(theirs.sort_index().index)
    np.testing.assert_allclose(ours, theirs.sort_index(), atol=1e-4)
    found = json.loads((again / "interpretation.json").read_text())
    predicted = pd.read_csv(again / "cells.csv")["predicted"]
    if "CD19+ B" not in set(predicted):  # scores by cell, and no class to tell of
        assert "no cell here is of CD19+ B" in " ".join(found["notes"]) and not found["labels"]["celltype"]["classes"]
        assert pd.read_csv(again / "attributions.csv").empty
    shutil.copy(file, tmp_path / "renamed.h5ad")
    (moved,) = planned(
        finished, f"task.cells={tmp_path / 'renamed.h5ad'}", "task.attribute_filter={celltype: [CD19+ B]}"
    )
    assert moved.cached and moved.key == job.key  # by content, not by address


def test_the_command_finds_it_again_and_prints_genes_by_class(finished, interpreted, capsys):
    words = [f"task.checkpoint={finished.artefacts['finetune']}", *QUICK, "task.sanity_checks=true"]
    assert cli.main(["interpret", "-cn", "interpret_config", *words, "--workspace", finished.workspace, "--json"]) == 0
    out, err = capsys.readouterr()
    answer = json.loads(out.splitlines()[-1])
    assert answer["artefacts"]["interpret"] == str(interpreted) and answer["model"] == finished.artefacts["finetune"]
    assert "reused" in err and "cells  " in err and "interpret.html" in err


def test_it_is_no_part_of_the_chain_but_runs_behind_it(finished):
    jobs = plan_stage("interpret", str(finished.file), label="celltype", overrides=["task.max_cells=3", "task.max_steps=4"], workspace=finished.workspace)  # fmt: skip
    assert [job.stage for job in jobs] == ["preprocess", "pretrain", "finetune", "interpret"]
    assert jobs[2].config["task"]["max_steps"] == 4 and jobs[3].config["task"]["max_cells"] == 3
    assert "interpret" not in STAGES


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["data_module.max_length=9"],
            r"data_module\.max_length=9 cannot be changed for a model that is trained already",
        ),
        (["task.attribute_filter={tissue: [a]}"], r"the model has no label column 'tissue'; it has celltype"),
        (["task.baseline=zero"], r"task\.baseline: zero shows the model genes without expression"),
        (["+task.attribute_kwargs.n_step=3"], r"n_step.*did you mean 'n_steps'"),
        (["+task.attribute_kwargs.baselines=[0]"], r"set task\.baseline"),
        (["task.precision=16-mixed"], r"attributions are computed in 32-true"),
        (["task.attribute_filter={celltype: [CD19 B]}"], r"no class 'CD19 B'; did you mean 'CD19\+ B'"),
    ],
)
def test_what_cannot_be_done_is_refused(finished, words, message):
    with pytest.raises(ConfigError, match=message):
        (job,) = planned(finished, *words)
        run_stage(job)


def test_cells_that_prediction_refuses_are_refused(finished, tmp_path):
    cells = anndata.read_h5ad(finished.file)[:5].copy()
    cells.X = cells.X * 0.5
    cells.write_h5ad(tmp_path / "halves.h5ad")
    (job,) = planned(finished, f"task.cells={tmp_path / 'halves.h5ad'}")
    with pytest.raises(DataError, match="not whole numbers"):
        run_stage(job)


def test_a_model_without_labels_and_a_missing_file_are_refused(finished):
    with pytest.raises(ConfigError, match="predicts no label column"):
        planned(finished, f"task.checkpoint={finished.artefacts['pretrain']}")
    with pytest.raises(DataError, match=r"task\.cells: /nowhere\.h5ad does not exist"):
        planned(finished, "task.cells=/nowhere.h5ad")
    with pytest.raises(ConfigError, match=r"task\.checkpoint must name a fine-tuned model"):
        plan_stage("interpret", config_name="interpret_config", workspace=finished.workspace)
