"""What stages leave for people: the report of an evaluation with its parts, what each step cost, one page for the whole run."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from bmfm_pipeline.stages import costs
from bmfm_pipeline.stages.pipeline_page import pipeline_page
from bmfm_pipeline.storage import Workspace, load_artefact, publish


def job(folder: Path, stage: str = "evaluate"):
    return SimpleNamespace(run_dir=folder, stage=stage)


def test_a_step_costs_time_and_the_most_memory_it_held(tmp_path):
    with costs.measured(job(tmp_path), "predict"):
        time.sleep(0.15)
        np.ones(40_000_000).sum()
    (row,) = costs.cost_of(job(tmp_path))["steps"]
    assert row["step"] == "predict" and row["seconds"] >= 0.15 and row["attempts"] == 1
    assert row["peak_bytes"] > 320e6
    with costs.measured(job(tmp_path), "controls"):
        pass
    rows = costs.cost_of(job(tmp_path))["steps"]
    assert [row["step"] for row in rows] == ["predict", "controls"]
    assert rows[1]["peak_bytes"] <= rows[0]["peak_bytes"], "what was given back before is not counted again"


def test_what_a_stopped_attempt_cost_is_counted(tmp_path):
    with pytest.raises(KeyboardInterrupt), costs.measured(job(tmp_path, "finetune"), "train"):
        time.sleep(0.1)
        raise KeyboardInterrupt
    with costs.measured(job(tmp_path, "finetune"), "train"):
        time.sleep(0.1)
    (row,) = costs.cost_of(job(tmp_path, "finetune"))["steps"]
    assert row["attempts"] == 2 and row["seconds"] >= 0.2


def test_the_cost_of_a_child_process_is_counted(tmp_path):
    import subprocess
    import sys

    with costs.measured(job(tmp_path), "predict"):
        subprocess.run([sys.executable, "-c", "b = bytearray(30_000_000); sum(range(2_000_000))"], check=True)
    (row,) = costs.cost_of(job(tmp_path))["steps"]
    assert row["processor_seconds"] > 0.02


def test_only_steps_before_the_named_one_are_told(tmp_path):
    for step in ("predict", "report"):
        with costs.measured(job(tmp_path), step):
            pass
    assert [row["step"] for row in costs.cost_of(job(tmp_path), until="report")["steps"]] == ["predict"]


def test_artefacts_say_what_their_steps_cost_and_on_what_machine(finished):
    for stage, steps in (
        ("finetune", {"prepare", "train"}),
        ("evaluate", {"predict", "controls", "metrics", "report"}),
    ):
        cost = load_artefact(finished.artefacts[stage]).cost
        assert steps <= {row["step"] for row in cost["steps"]}
        assert all(row["seconds"] >= 0 and row["peak_bytes"] > 50e6 for row in cost["steps"])
        assert cost["machine"]["cores"] >= 1 and cost["versions"]["torch"]
    summary = load_artefact(finished.artefacts["finetune"]).summary
    assert 0.1 < summary["peak_memory_gb"] < 20


def test_the_report_has_its_parts_beside_it(finished):
    folder = Path(finished.artefacts["evaluate"])
    page = (folder / "report.html").read_text()
    for place in ("metrics", "classes", "confusion", "confused", "curves", "genes", "about", "environment", "cost"):
        assert f'id="{place}"' in page, place
    found = json.loads((folder / "confused.json").read_text())
    assert found["measure"] == "log1p of counts per 10,000"
    pairs = found["labels"]["celltype"]
    evaluation = json.loads((folder / "evaluation.json").read_text())
    matrix, names = (
        np.array(evaluation["confusion"]["celltype"]["counts"]),
        evaluation["confusion"]["celltype"]["classes"],
    )
    for pair in pairs:
        assert matrix[names.index(pair["true"]), names.index(pair["predicted"])] == pair["cells"]
        assert pair["genes_of_classes"] or not min(pair["training_cells"].values())
    written = (folder / "report.md").read_text()
    assert evaluation["verdicts"][0] in written.replace("\\", "")
    assert (folder / "figures" / "accuracy-of-celltype.svg").exists()
    source = load_artefact(load_artefact(finished.artefacts["evaluate"]).inputs["data"]["uri"]).inputs["source"]
    assert source["id"][:16] in page and "prepare" in page, "the costs of training are there too"


@pytest.fixture
def results(finished) -> dict:
    """The stages as a run leaves them, the first of them taken from an earlier run."""
    order = ("preprocess", "pretrain", "finetune", "evaluate")
    data = load_artefact(finished.artefacts["finetune"]).inputs["data"]["uri"]
    uris = {**finished.artefacts, "preprocess": data}
    return {stage: {"uri": uris[stage], "cached": stage == "preprocess"} for stage in order}


def test_one_page_shows_the_whole_run(finished, results):
    address = pipeline_page(Workspace(finished.workspace), results)
    page = Path(address).read_text()
    evaluation = json.loads((Path(finished.artefacts["evaluate"]) / "evaluation.json").read_text())
    assert evaluation["verdicts"][0].split(":")[1] in page
    assert page.index("verdict ") < page.index("The chain") < page.index("Metrics: celltype")
    for result in results.values():
        assert load_artefact(result["uri"]).key[:12] in page
    assert page.count("taken from an earlier run") == 1 and page.count("made in this run") == 3
    assert "Training: pretrain" in page and "Training: finetune" in page and "700 cells" in page
    report = Path(address).parent / f"../../evaluate/{Path(finished.artefacts['evaluate']).name}/report.html"
    assert report.exists(), "the link to the page of the evaluation"


def test_the_page_is_made_once_for_the_same_artefacts(finished, results):
    place = Workspace(finished.workspace)
    first = pipeline_page(place, results)
    made = Path(first).stat().st_mtime_ns
    assert pipeline_page(place, results) == first and Path(first).stat().st_mtime_ns == made
    shorter = {stage: results[stage] for stage in ("preprocess", "pretrain")}
    assert pipeline_page(place, shorter) != first


def test_the_page_leads_to_the_study_that_the_run_was_part_of(finished, results, tmp_path):
    place, tested = Workspace(finished.workspace), load_artefact(finished.artefacts["evaluate"])
    alone = pipeline_page(place, results)
    (tmp_path / "study.json").write_text(json.dumps({"verdicts": ["with 10 % of the cells it is worse"]}))
    (tmp_path / "study.html").write_text("<title>a study</title>")
    study = publish(
        tmp_path, place, "study", "5" * 32, inputs={"10 %, seed 1": {"id": tested.key, "uri": tested.uri}}, config={},
        code_version="", summary={"name": "mini"},
    )  # fmt: skip
    address = pipeline_page(place, results, study.uri)
    page = Path(address).read_text()
    assert address != alone and "study" not in Path(alone).read_text()
    assert "with 10 % of the cells it is worse" in page
    for link in (f"../../study/{study.key}/study.html", f"../../evaluate/{tested.key}/report.html"):
        assert f'href="{link}"' in page and (Path(address).parent / link).exists()


def test_a_page_that_cannot_be_made_is_said_and_fails_nothing(finished, results, caplog):
    results["evaluate"] = {"uri": finished.workspace + "/artefacts/evaluate/nothing"}
    assert pipeline_page(Workspace(finished.workspace), results) is None
    assert "could not be made" in caplog.text
