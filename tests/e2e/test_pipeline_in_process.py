"""`bmfm run` on one machine, without a server: what it records, reuses, repairs, survives and leaves behind."""

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STAGES = ["preprocess", "pretrain", "finetune", "evaluate"]
STEPS = {
    "preprocess": ["check", "split", "label_dictionary", "vocabulary", "transform", "publish"],
    "pretrain": ["prepare", "train", "publish"],
    "finetune": ["prepare", "train", "publish"],
    "evaluate": ["predict", "controls", "metrics", "calibration", "embedding_map", "report", "publish"],
}
HEAVY = ("prefect", "mlflow", "torch", "pytorch_lightning", "transformers", "anndata", "scanpy", "sklearn")
DEAD = "http://127.0.0.1:1"  # nothing listens there


class Run:
    """One `bmfm run ... --json` that ended."""

    def __init__(self, done: subprocess.CompletedProcess):
        self.code, self.out, self.err = done.returncode, done.stdout, done.stderr

    @property
    def answer(self) -> dict:
        assert self.code == 0, self.err
        return json.loads(self.out.splitlines()[-1])


# What a lab has in its environment, and nobody may find in what a run leaves.
SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIAPLANTEDPLANTED01",
    "AWS_SECRET_ACCESS_KEY": "planted-aws-secret-0001",
    "AWS_SESSION_TOKEN": "planted-aws-session-0002",
    "HF_TOKEN": "hf_plantedplantedplantedplantedplanted",
    "PREFECT_API_KEY": "pnu_plantedplantedplantedplanted",
    "MLFLOW_TRACKING_USERNAME": "recorder",
    "MLFLOW_TRACKING_PASSWORD": "planted-mlflow-password-0003",
    "BMFM_NOTIFY_URL": "https://hooks.example.org/services/planted-webhook-token-0004",
}
IN_THE_ADDRESS = "planted-password-in-the-address-0005"


@pytest.fixture(scope="module")
def machine(make_machine):
    return make_machine("alone", **SECRETS)


@pytest.fixture(scope="module")
def words(machine, tiny_model) -> list[str]:
    options = ["--json", "--workspace", str(machine.workspace)]
    return ["run", "zheng68k-mini", *options, *tiny_model, "task.max_steps=6", "task.log_every_n_steps=2"]


@pytest.fixture(scope="module")
def first(machine, words) -> Run:
    return Run(machine.run("bmfm", *words))


@pytest.fixture(scope="module")
def again(machine, words, first) -> Run:
    """The same command once more, with every import counted on stderr."""
    assert first.answer
    return Run(machine.run(sys.executable, "-X", "importtime", "-m", "bmfm_pipeline.cli", *words))


@pytest.fixture(scope="module")
def repaired(machine, words, first, again) -> Run:
    """The same command after the fine-tuned model was damaged, while MLflow's server does not answer."""
    model = Path(first.answer["artefacts"]["finetune"])
    weights = model / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    address = DEAD.replace("://", f"://recorder:{IN_THE_ADDRESS}@")
    return Run(machine.run("bmfm", *words, MLFLOW_TRACKING_URI=address))


@pytest.fixture(scope="module")
def kept(machine, repaired) -> list[str]:
    """Names of the runs whose records wait for an MLflow that answers."""
    return [file.stem for file in (machine.state / "mlflow-spool").glob("*.jsonl")]


@pytest.fixture(scope="module")
def refused(machine, mini_h5ad, kept) -> Run:
    """`bmfm run` on values that were normalised already, behind a proxy; MLflow answers again."""
    import anndata
    import numpy as np

    cells = anndata.read_h5ad(mini_h5ad)[:100].copy()
    cells.X = np.log1p(cells.X)
    file = machine.folder / "normalised.h5ad"
    cells.write_h5ad(file)
    options = ["--json", "--workspace", machine.workspace]
    return Run(machine.run("bmfm", "run", file, "label=celltype", *options, http_proxy=DEAD, HTTP_PROXY=DEAD))


def rows(machine, query: str) -> list[sqlite3.Row]:
    """What Prefect's database in the state folder of the workspace says."""
    database = sqlite3.connect(f"file:{machine.state / 'prefect' / 'prefect.db'}?mode=ro", uri=True)
    database.row_factory = sqlite3.Row
    try:
        return database.execute(query).fetchall()
    finally:
        database.close()


def flow_runs(machine) -> dict[str, list[sqlite3.Row]]:
    """Flow runs about zheng68k-mini by flow, oldest first."""
    query = "select f.name as flow, r.* from flow_run r join flow f on f.id = r.flow_id order by r.start_time"
    found: dict[str, list[sqlite3.Row]] = {}
    for row in rows(machine, query):
        if "-zheng68k-mini-" in row["name"]:
            found.setdefault(row["flow"], []).append(row)
    return found


def mlflow_runs(machine) -> list:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{machine.state / 'mlflow.db'}")
    return client.search_runs([entry.experiment_id for entry in client.search_experiments()], order_by=["start_time"])


# The first run


def test_the_last_line_is_one_object_with_the_model_the_artefacts_and_the_metrics(first):
    answer = first.answer
    assert list(answer["artefacts"]) == STAGES
    for stage, uri in answer["artefacts"].items():
        assert json.loads((Path(uri) / "artefact.json").read_text())["stage"] == stage
    assert answer["model"] == answer["artefacts"]["finetune"]
    assert {"model", "majority", "logistic_l2"} <= {row["model"] for row in answer["metrics"]}
    assert {"metric", "target", "value", "ci_low", "ci_high", "ci_method", "n", "split", "seed"} <= set(
        answer["metrics"][0]
    )
    assert len(first.out.splitlines()) == 1, "with --json, what is said to a person goes to stderr"
    assert answer["report"] == answer["artefacts"]["evaluate"] + "/report.html"
    page = Path(answer["pipeline_report"]).read_text()
    assert "made in this run" in page and page.count("<h3>") >= len(STAGES)
    assert answer["report"] in first.err and answer["pipeline_report"] in first.err


def test_a_person_sees_each_stage_each_step_and_the_table(first):
    positions = [first.err.index(f"{stage} done in") for stage in STAGES]
    assert positions == sorted(positions)
    for steps in STEPS.values():
        assert all(f"\n  {step}\n" in first.err for step in steps)
    assert "logistic regression" in first.err
    assert "Traceback" not in first.err


def test_mlflow_has_one_parent_run_and_a_child_per_stage(machine, first):
    runs = {run.data.tags["bmfm.stage"]: run for run in mlflow_runs(machine)}
    assert list(runs) == ["pipeline", *STAGES]
    parent = runs["pipeline"]
    assert parent.info.run_id == first.answer["mlflow_run_id"]
    assert parent.data.tags["prefect.flow_run_id"] == first.answer["flow_run_id"]
    page = f"http://127.0.0.1:4200/flow-runs/flow-run/{first.answer['flow_run_id']}"  # where `bmfm ui` shows it
    assert parent.data.tags["prefect.flow_run_url"] == page
    assert parent.data.metrics["celltype/accuracy"] == pytest.approx(value_of(first, "accuracy"))
    prefect = {flow: found[0]["id"] for flow, found in flow_runs(machine).items()}
    for stage in STAGES:
        tags = runs[stage].data.tags
        assert runs[stage].info.status == "FINISHED"
        assert tags["mlflow.parentRunId"] == parent.info.run_id
        assert tags["prefect.flow_run_id"].replace("-", "") == prefect[stage].replace("-", "")
        assert tags["bmfm.artefact"] == parent.data.tags[f"bmfm.artefact.{stage}"] == first.answer["artefacts"][stage]


def value_of(run: Run, metric: str) -> float:
    return next(row["value"] for row in run.answer["metrics"] if row["model"] == "model" and row["metric"] == metric)


def test_mlflow_has_config_data_code_curves_and_report(machine, first, revision):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{machine.state / 'mlflow.db'}")
    runs = {run.data.tags["bmfm.stage"]: run for run in mlflow_runs(machine)}
    for stage in STAGES:
        run = runs[stage]
        assert run.data.params["model.hidden_size" if stage != "preprocess" else "dataset"] in ("32", "zheng68k-mini")
        assert run.data.tags["bmfm.dataset_hash"]
        assert run.inputs.dataset_inputs
        assert run.data.tags.get("mlflow.source.git.commit") == revision
        assert "config.json" in [file.path for file in client.list_artifacts(run.info.run_id)]
    for stage in ("pretrain", "finetune"):
        curve = client.get_metric_history(runs[stage].info.run_id, "train/loss")
        steps = [point.step for point in curve]
        assert {2, 4, 6} <= set(steps) <= set(range(1, 7))
        assert len(steps) == len(set(steps))
    assert "report.html" in [file.path for file in client.list_artifacts(runs["evaluate"].info.run_id)]
    assert runs["evaluate"].data.metrics
    parent = client.list_artifacts(runs["pipeline"].info.run_id)
    assert "pipeline_report.html" in [file.path for file in parent]


def test_prefect_has_a_completed_run_per_stage_under_that_of_the_pipeline(machine, first):
    found = flow_runs(machine)
    assert list(found) == ["pipeline", *STAGES]
    keys = {stage: Path(uri).name[:8] for stage, uri in first.answer["artefacts"].items()}
    keys["pipeline"] = keys["evaluate"]
    mlflow = {run.data.tags["bmfm.stage"]: run.info.run_id for run in mlflow_runs(machine)}
    for flow, (run, *more) in found.items():
        assert not more
        assert (run["state_type"], run["state_name"]) == ("COMPLETED", "Completed")
        assert run["name"] == f"{flow}-zheng68k-mini-{keys[flow]}"
        tags = json.loads(run["tags"])
        assert {"dataset:zheng68k-mini", f"mlflow-run:{mlflow[flow]}"} <= set(tags)
        assert flow == "pipeline" or f"stage:{flow}" in tags


def test_prefect_has_a_task_per_step_with_a_name_a_person_recognises(machine, first):
    query = "select name, state_name from task_run where name like '%: %'"
    found = {row["name"]: row["state_name"] for row in rows(machine, query)}
    assert found == {f"{stage}: {step}": "Completed" for stage, steps in STEPS.items() for step in steps}


def test_prefect_shows_tables_progress_and_links_to_the_report_and_mlflow(machine, first):
    found = {row["key"]: row for row in rows(machine, "select key, type, data from artifact")}
    tables = {key for key, row in found.items() if row["type"] == "table"}
    assert {"preprocess-check", "preprocess-split", "pretrain-summary", "finetune-summary"} <= tables
    assert {"evaluate-metrics", "pipeline-stages"} <= tables
    assert found["pretrain-train-progress"]["type"] == "progress"
    assert float(found["pretrain-train-progress"]["data"]) == 100
    assert first.answer["artefacts"]["evaluate"] in found["evaluate-report"]["data"]
    assert first.answer["mlflow_run_id"] in found["pipeline-mlflow-run"]["data"]
    assert first.answer["pipeline_report"] in found["pipeline-page-about-the-run"]["data"]
    assert first.answer["report"] in found["pipeline-evaluation-report"]["data"]


# The same command again


def test_a_second_identical_run_reuses_everything_and_says_the_same(machine, first, again):
    assert again.answer["artefacts"] == first.answer["artefacts"]
    assert again.answer["metrics"] == first.answer["metrics"]
    assert again.answer["flow_run_id"] is None
    assert again.answer["pipeline_report"] == first.answer["pipeline_report"]
    for stage in STAGES:
        assert f"{stage}: reused" in again.err


def test_a_second_identical_run_starts_no_server_and_imports_nothing_heavy(again):
    imported = set(re.findall(r"^import time:.*\|\s+([\w.]+)$", again.err, re.MULTILINE))
    assert "bmfm_pipeline.stages.planning" in imported
    assert not imported & set(HEAVY)


# Damage, and an MLflow that does not answer


def test_a_damaged_model_is_made_again_and_nothing_else(machine, first, repaired):
    assert repaired.answer["artefacts"] == first.answer["artefacts"]
    assert "finetune: its artefact is incomplete or damaged and will be rebuilt" in repaired.err
    states = {flow: [run["state_name"] for run in found] for flow, found in flow_runs(machine).items()}
    expected = {stage: ["Completed", "Cached"] for stage in STAGES} | {"finetune": ["Completed", "Completed"]}
    assert states == {"pipeline": ["Completed", "Completed"], **expected}
    cached = rows(machine, "select name, state_type from task_run where state_name = 'Cached' and name not like '%-_'")
    assert {row["name"].split()[0] for row in cached} == {"preprocess", "pretrain", "evaluate"}
    assert {row["state_type"] for row in cached} == {"COMPLETED"}


def test_the_model_made_again_is_the_same_to_the_last_digit(first, repaired):
    assert repaired.answer["metrics"] == first.answer["metrics"]


def test_an_mlflow_that_does_not_answer_is_said_once_and_its_records_are_sent_by_the_next_run(
    machine, first, repaired, kept, refused
):
    assert repaired.answer["mlflow_url"] in (None, "")
    assert repaired.err.count("cannot be reached") == 1
    assert DEAD in repaired.err
    assert len(kept) == 2  # the pipeline and the stage that ran
    assert not list((machine.state / "mlflow-spool").glob("*.jsonl"))
    sent = [run for run in mlflow_runs(machine) if run.data.tags.get("bmfm.recorded_offline") == "true"]
    assert [run.data.tags["bmfm.stage"] for run in sent] == ["pipeline", "finetune"]
    assert sent[1].data.tags["mlflow.parentRunId"] == sent[0].info.run_id
    assert {run.info.status for run in sent} == {"FINISHED"}


# Bad input


def test_bad_input_ends_the_run_with_its_reason_in_the_terminal_in_prefect_and_in_mlflow(machine, refused):
    assert refused.code == 2
    answer = json.loads(refused.out.splitlines()[-1])
    assert answer["kind"] == "DataError"
    assert "they look log-normalised" in answer["error"]
    assert "error: " in refused.err
    assert "Traceback" not in refused.err
    query = "select f.name, s.type, s.message from flow_run f join flow_run_state s on s.id = f.state_id"
    found = [row for row in rows(machine, query) if "-normalised-" in row["name"]]
    assert [(row["type"], row["message"]) for row in found] == [("FAILED", answer["error"])] * 2
    failed = [run for run in mlflow_runs(machine) if "log-normalised" in run.data.tags.get("bmfm.error", "")]
    assert [run.data.tags["bmfm.stage"] for run in failed] == ["pipeline", "preprocess"]
    assert {run.info.status for run in failed} == {"FAILED"}


# Stops


def stop_while_training(machine, words: list[str], wait_for, stop) -> tuple[Run, Path]:
    """Run, and call `stop` once new steps are recorded; returns what the command said and where its checkpoint lies."""

    def written() -> dict[Path, int]:
        return {file: file.stat().st_mtime_ns for file in machine.workspace.glob("runs/*/training/history.jsonl")}

    def training() -> list[Path]:
        assert started.poll() is None, started.communicate()
        return [file for file, when in written().items() if when > before.get(file, 0) and file.stat().st_size]

    before = written()
    started = machine.start("bmfm", *words)
    (history,) = wait_for(training, 120, "training to begin", every=0.02)
    stop(started)
    try:
        out, err = started.communicate(timeout=30)
    except subprocess.TimeoutExpired:
        os.killpg(started.pid, signal.SIGKILL)
        pytest.fail(f"it did not end within 30 s: {started.communicate()}")
    done = subprocess.CompletedProcess(started.args, started.returncode, out, err)
    return Run(done), history.parent / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="module")
def unlabelled(machine, mini_h5ad, tiny_model, first) -> list[str]:
    """`bmfm run` on cells without labels, with so many steps that it can be stopped in the middle."""
    import anndata

    cells = anndata.read_h5ad(mini_h5ad)[:300].copy()
    cells.obs = cells.obs[[]]
    file = machine.folder / "cells.h5ad"
    cells.write_h5ad(file)
    options = ["--json", "--workspace", str(machine.workspace)]
    return ["run", str(file), *options, *tiny_model, "task.max_steps=250", "task.log_every_n_steps=1"]


@pytest.fixture(scope="module")
def interrupted(machine, unlabelled, wait_for) -> tuple[Run, Path]:
    """Ctrl-C in a terminal: every process of the foreground group gets SIGINT."""
    return stop_while_training(machine, unlabelled, wait_for, lambda command: os.killpg(command.pid, signal.SIGINT))


@pytest.fixture(scope="module")
def terminated(machine, unlabelled, interrupted, wait_for) -> tuple[Run, Path]:
    """What `kill` or a batch system does: SIGTERM to the command alone."""
    return stop_while_training(machine, unlabelled, wait_for, lambda command: command.terminate())


@pytest.fixture(scope="module")
def resumed(machine, unlabelled, terminated) -> Run:
    return Run(machine.run("bmfm", *unlabelled))


@pytest.mark.parametrize("way", ["interrupted", "terminated"])
def test_a_training_that_is_stopped_leaves_a_checkpoint_and_no_process(machine, way, request, wait_for):
    run, checkpoint = request.getfixturevalue(way)
    assert run.code in (130, 143), run.err
    assert "run the same command again" in run.err
    assert "Traceback" not in run.err
    assert checkpoint.exists()
    assert not machine.processes()


def test_a_stopped_training_goes_on_from_its_checkpoint_and_completes(terminated, resumed):
    assert resumed.answer["model"]
    assert "resuming from last.ckpt at step" in terminated[0].err
    assert "resuming from last.ckpt at step" in resumed.err


def test_cells_without_labels_are_pretrained_and_their_masked_values_predicted_beside_a_constant_guess(resumed):
    answer = resumed.answer
    assert list(answer["artefacts"]) == ["preprocess", "pretrain", "evaluate"]
    assert answer["model"] == answer["artefacts"]["pretrain"]
    assert {row["model"] for row in answer["metrics"]} == {"model", "constant"}
    assert all(0 <= row["value"] <= 1 for row in answer["metrics"] if row["metric"] == "accuracy")
    assert all(
        row["n"] and row["ci_low"] <= row["value"] for row in answer["metrics"] if row["metric"] in ("mse", "mae")
    )
    assert "finetune: skipped" in resumed.err


def test_prefect_shows_the_stage_without_labels_as_skipped(machine, resumed):
    found = rows(machine, "select state_name, state_type from task_run where name = 'finetune: skipped'")
    assert [tuple(row) for row in found] == [("Skipped", "COMPLETED")]


# Secrets


def test_no_secret_is_in_anything_that_was_said_or_written(
    machine, first, again, repaired, refused, terminated, resumed
):
    """Terminal, artefacts with their configs and reports, run folders, logs, both databases, records that wait for MLflow."""
    planted = [value for name, value in SECRETS.items() if not name.endswith("USERNAME")]
    planted += [IN_THE_ADDRESS, "planted-webhook-token-0004"]
    said = "".join(run.out + run.err for run in (first, again, repaired, refused, terminated[0], resumed))
    assert not [secret for secret in planted if secret in said]
    found, looked = set(), set()
    for file in machine.folder.rglob("*"):
        if file.is_file() and not file.is_symlink():
            content = file.read_bytes()
            looked.add(file.name)
            found |= {
                (str(file.relative_to(machine.folder)), secret) for secret in planted if secret.encode() in content
            }
    assert not found
    expected = {"artefact.json", "run_config.json", "report.html", "pipeline_report.html", "job.json"}
    assert expected | {"mlflow.db", "prefect.db", "server.log", "config.json"} <= looked


def test_a_secret_in_an_override_is_refused_before_anything_keeps_it(machine, words, first):
    secret = "s3://recorder:planted-in-an-override-0006@bucket/model"
    run = Run(machine.run("bmfm", *words, f"model.checkpoint={secret}"))
    assert run.code == 2 and "model.checkpoint: holds a password, a key or a signed address" in run.err
    assert "planted-in-an-override" not in run.out + run.err
