"""A benchmark over a finished chain: what is made again, what a failure leaves, and the command that shows it."""

import csv
import json

import pytest
import yaml

from bmfm_pipeline import cli
from bmfm_pipeline.config.suites import load_suite
from bmfm_pipeline.errors import ConfigError, TrainingError
from bmfm_pipeline.stages.benchmark_plan import plan_benchmark
from bmfm_pipeline.stages.benchmark_running import IncompleteBenchmark, run_benchmark
from bmfm_pipeline.stages.running import run_stage
from bmfm_pipeline.storage import load_artefact, read_json

AS_FINISHED = [
    "model.hidden_size=32",
    "model.num_hidden_layers=1",
    "model.num_attention_heads=2",
    "model.intermediate_size=64",
    "data_module.max_length=128",
    "data_module.batch_size=32",
    "pretrain.task.max_steps=8",
    "finetune.task.max_steps=25",
    "finetune.trainer.learning_rate=0.003",
]
DONE, MISSING = "mini, model, seed 1234", "gone, model, seed 1234"


@pytest.fixture(scope="module")
def suite(tmp_path_factory, finished):
    """The finished chain, and a dataset whose file is not there."""
    path = tmp_path_factory.mktemp("suite") / "own.yaml"
    datasets = [
        {"dataset": str(finished.file), "name": "mini", "label": "celltype"},
        {"dataset": "gone.h5ad", "name": "gone", "label": "celltype"},
    ]
    path.write_text(yaml.safe_dump({"name": "own", "datasets": datasets, "overrides": AS_FINISHED}))
    return path


@pytest.fixture(scope="module")
def outcome(suite, finished):
    return run_benchmark(plan_benchmark(str(suite), workspace=finished.workspace))


def test_what_earlier_runs_have_made_is_taken(outcome, finished):
    (cell,) = outcome.plan.cells
    assert cell.evaluation.uri == finished.artefacts["evaluate"]
    assert all(outcome.results[job.key]["cached"] for job in cell.jobs if job.key in outcome.results)


def test_a_dataset_that_is_not_there_is_a_row_with_the_reason(outcome):
    assert list(outcome.failed) == [MISSING]
    artefact = load_artefact(outcome.table["uri"])
    rows = list(csv.DictReader(artefact.local_file("benchmark.csv").open()))
    assert {row["method"] for row in rows if row["state"] == "done"} >= {"model", "commonest class"}
    (failed,) = [row for row in rows if row["state"] == "failed"]
    assert "gone.h5ad: no such file" in failed["reason"]
    assert MISSING in artefact.local_file("benchmark.md").read_text()
    assert MISSING in artefact.local_file("benchmark.html").read_text()
    with pytest.raises(IncompleteBenchmark, match="1 of 2 cells of the benchmark failed"):
        outcome.check()


def test_the_numbers_are_those_of_the_evaluation(outcome, finished):
    found = read_json(load_artefact(outcome.table["uri"]).local_file("benchmark.json"))
    stored = read_json(load_artefact(finished.artefacts["evaluate"]).local_file("metrics.json"))
    for row in found["rows"]:
        if row["is_model"]:
            own = next(r for r in stored if (r["model"], r["metric"]) == ("model", row["metric"]))
            assert [row[name] for name in ("value", "ci_low", "ci_high", "n")] == [
                own[name] for name in ("value", "ci_low", "ci_high", "n")
            ]


def test_a_second_benchmark_makes_nothing(suite, outcome, finished):
    plan = plan_benchmark(str(suite), workspace=finished.workspace)
    assert all(job.cached for job in plan.jobs) and plan.table_job().cached
    assert plan.table_job().uri == outcome.table["uri"]


def test_one_more_model_costs_only_itself_and_its_failure_takes_no_other_along(suite, outcome, finished):
    wanted = load_suite(str(suite)).model_dump()
    wanted["models"] = [{"name": "model"}, {"name": "slower", "overrides": ["finetune.trainer.learning_rate=0.001"]}]
    plan = plan_benchmark(load_suite(str(suite)).model_validate(wanted), workspace=finished.workspace)
    new = [job for job in plan.jobs if not job.cached]
    assert [job.stage for job in new] == ["finetune", "evaluate"]
    assert len({job.key for job in plan.jobs}) == 6, "the data and the pretrained model are shared"

    def start(job, cell):
        if job.key == new[0].key:
            raise TrainingError("the card is on fire")
        return run_stage(job)

    found = run_benchmark(plan, start=start)
    assert next(map(str, found.failed.values())) == "the card is on fire"
    assert set(found.failed) == {"mini, slower, seed 1234", MISSING, "gone, slower, seed 1234"}
    assert found.table["uri"] != outcome.table["uri"]
    assert DONE in found.answer()["cells"]


def test_the_command_shows_the_table_and_ends_with_a_code_of_its_own(suite, outcome, finished, capsys, monkeypatch):
    monkeypatch.setenv("BMFM_WORKSPACE", finished.workspace)  # the command line sets it, and must not leak
    assert cli.main(["benchmark", str(suite), "--workspace", finished.workspace, "--json"]) == 2
    shown = capsys.readouterr()
    found = json.loads(shown.out.splitlines()[-1])
    assert found["benchmark"] == outcome.table["uri"] and list(found["failed"]) == [MISSING]
    assert {row["metric"] for row in found["rows"]} == {"accuracy", "f1"}
    assert "mini, celltype" in shown.err and "macro-F1" in shown.err and f"failed: {MISSING}" in shown.err
    assert "reused (1 cells)" in shown.err and "error: 1 of 2 cells of the benchmark failed" in shown.err


def test_a_suite_of_which_nothing_can_run_says_why(suite, finished):
    with pytest.raises(
        ConfigError, match=r"no dataset of it can be run here:\n- gone, model, seed 1234: .*no such file"
    ):
        plan_benchmark(str(suite), ["datasets=gone"], workspace=finished.workspace)


def test_seeds_share_what_they_do_not_change(suite, finished):
    plan = plan_benchmark(str(suite), ["datasets=mini", "seeds=3"], workspace=finished.workspace)
    stages = [job.stage for job in plan.jobs]
    assert [stages.count(stage) for stage in ("preprocess", "pretrain", "finetune", "evaluate")] == [1, 1, 3, 3]
    assert [cell.seed for cell in plan.cells] == [1234, 1235, 1236]
    trained = plan_benchmark(
        str(suite), ["datasets=mini", "seeds=3", "seeds_of=training"], workspace=finished.workspace
    )
    assert [job.stage for job in trained.jobs].count("pretrain") == 3
