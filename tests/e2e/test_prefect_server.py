"""Deployments on a real Prefect server with workers: what a person starts, what is refused, what it shows."""

import json
import re
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STAGES = ["preprocess", "pretrain", "finetune", "evaluate"]


@pytest.fixture(scope="module")
def pretraining(server):
    """`prefect deployment run pretrain/zheng68k`, as documented: no parameters. It trains while other tests run."""
    return server.machine.start("prefect", "deployment", "run", "pretrain/zheng68k", "--watch")


@pytest.fixture(scope="module")
def pipelining(server, pretraining, tiny_model) -> str:
    """The id of a run of the whole chain, a worker per stage, that goes on beside the pretraining."""
    return server.create_run("pipeline/zheng68k-mini", max_steps=4, overrides=tiny_model)


@pytest.fixture(scope="module")
def pretrained(server, pretraining, finished) -> str:
    """The id of that flow run, once it has ended."""
    done = finished(pretraining, 600)
    assert done.returncode == 0, done.stdout + done.stderr
    return re.search(r"UUID: (\S+)", done.stdout)[1]


def test_the_checkout_stays_clean_after_deploying(server, pipelining):
    if server.status_before is None:
        pytest.skip("not a git checkout")
    assert server.git_status() == server.status_before


def test_a_parameter_that_does_not_fit_the_form_is_refused_at_the_command_line(server, pipelining):
    wrong = json.dumps({"parameters": {"num_bootstrap_runs": "many"}})
    done = server.command("deployment", "run", "evaluate/zheng68k", "--params", wrong)
    assert done.returncode == 1
    assert "num_bootstrap_runs" in done.stdout + done.stderr
    assert server.ask("flow_runs/count", {"flows": {"name": {"any_": ["evaluate"]}}}) == 0


def test_a_wrong_override_fails_the_run_before_data_is_read_and_its_state_says_why(server, pretraining):
    run = server.create_run("preprocess/zheng68k-mini", overrides=["data_module.max_lenght=64"])
    ended = server.wait_until_final(run, 120)
    assert ended["state_name"] == "Failed"
    assert ended["state"]["message"] == ("data_module.max_lenght: no such key; did you mean 'data_module.max_length'?")
    assert server.task_runs(run) == []


def model_of(server, run: dict) -> Path:
    """The folder of the model that a run of pretraining has made; the run is named after it."""
    flow, name, key = run["name"].rsplit("-", 2)
    assert (flow, name) == ("pretrain", "zheng68k")
    (model,) = (server.machine.workspace / "artefacts" / "pretrain").glob(f"{key}*")
    return model


def test_pretraining_completes_and_its_model_lies_in_the_workspace(server, pretrained):
    ended = server.flow_run(pretrained)
    assert ended["state_name"] == "Completed"
    model = model_of(server, ended)
    assert (model / "model.safetensors").exists()
    assert (model / "checkpoints" / "last.ckpt").exists()
    assert {"stage:pretrain", "dataset:zheng68k"} <= set(ended["tags"])
    assert "preset laptop: no accelerator is usable" in server.logs(pretrained)
    steps = [run["name"] for run in server.task_runs(pretrained)]
    assert steps[:2] == ["preprocess: check", "preprocess: split"]
    assert steps[-3:] == ["pretrain: prepare", "pretrain: train", "pretrain: publish"]


def test_the_page_of_the_run_has_tables_links_and_progress(server, pretrained):
    found = {artifact["key"]: artifact for artifact in server.artifacts(pretrained)}
    splits = json.loads(found["preprocess-split"]["data"])
    assert [row["split"] for row in splits] == ["train", "dev", "test"]
    assert found["pretrain-summary"]["type"] == "table"
    assert found["pretrain-train-progress"]["data"] == 100
    tags = [tag for tag in server.flow_run(pretrained)["tags"] if tag.startswith("mlflow-run:")]
    runs = [tag.removeprefix("mlflow-run:") for tag in tags]  # of preprocessing and of the training
    course = found["pretrain-train-course"]["data"]
    assert "![train/loss" in course and "data:image/svg+xml;base64," in course and "| best validation loss |" in course
    assert any(f"/runs/{run})" in course for run in runs), "the link to the run in MLflow"
    links = [found["preprocess-mlflow-run"]["data"], found["pretrain-mlflow-run"]["data"]]
    assert all(any(run in link for run in runs) for link in links)


def test_what_is_there_already_is_shown_as_cached(server, pretrained):
    run = server.create_run("pretrain/zheng68k")
    ended = server.wait_until_final(run, 120)
    assert (ended["state_type"], ended["state_name"]) == ("COMPLETED", "Cached")
    assert str(model_of(server, server.flow_run(pretrained))) in ended["state"]["message"]
    assert [task["state_name"] for task in server.task_runs(run)] == ["Cached", "Cached"]


def test_a_deployed_pipeline_runs_each_stage_on_its_pool_under_one_mlflow_run(server, pipelining):
    from mlflow import MlflowClient

    ended = server.wait_until_final(pipelining, 300)
    assert ended["state_name"] == "Completed", ended["state"]["message"]
    started = server.runs_under(pipelining)
    flows = [server.ask(f"flows/{each['flow_id']}")["name"] for each in started]
    assert flows == STAGES
    assert [each["work_pool_name"] for each in started] == [None, "gpu", "gpu", "gpu"], (
        "the first in the place of the pipeline"
    )
    assert ended["work_pool_name"] == "cpu"
    assert {each["state_name"] for each in started} == {"Completed"}

    client = MlflowClient(f"sqlite:///{server.machine.state / 'mlflow.db'}")
    runs = client.search_runs([entry.experiment_id for entry in client.search_experiments()])
    tag = "prefect.flow_run_id"  # other modules on this server have runs without it
    mlflow = {each.data.tags[tag]: each for each in runs if tag in each.data.tags}
    assert {mlflow[each["id"]].data.tags["mlflow.parentRunId"] for each in started} == {mlflow[pipelining].info.run_id}
    assert "celltype/accuracy" in mlflow[pipelining].data.metrics
    there = f"[Run in Prefect]({server.page}/flow-runs/flow-run/{pipelining})"
    assert mlflow[pipelining].data.tags["mlflow.note.content"].startswith(there), "and back"
    evaluated = {artifact["key"]: artifact["data"] for artifact in server.artifacts(started[-1]["id"])}
    assert evaluated["evaluate-figures"].count("data:image/svg+xml;base64,") >= 5
    assert "*confusion of celltype*" in evaluated["evaluate-figures"]
    assert "/artifacts/report.html)" in evaluated["evaluate-figures"], "the report where a browser can open it"


def test_what_deployments_name_is_known_when_a_workspace_is_cleaned(server, tmp_path, monkeypatch):
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from bmfm_pipeline.storage.life import artefacts_named_in
    from flows.references import references_of_deployments

    address = f"{server.page}/api"
    monkeypatch.setenv("PREFECT_API_URL", address)
    with temporary_settings({PREFECT_API_URL: address}), get_client(sync_client=True) as client:
        flow = client.read_flow_by_name("predict")
        named = {
            "parameters": {"model": "s3://cells/w/artefacts/finetune/0a1b", "input": "cells.h5ad", "output": "out"}
        }
        own = client.create_deployment(flow_id=flow.id, name="ours", parameters=named)
        try:
            found = {reference.what: reference.texts for reference in references_of_deployments(tmp_path)}
        finally:
            client.delete_deployment(own)
    assert artefacts_named_in(found["deployment predict/ours"]) == {("finetune", "0a1b")}
    assert len(found) > 10 and not any(artefacts_named_in(texts) for what, texts in found.items() if "ours" not in what)
