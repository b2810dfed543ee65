"""Runs written to a real SQLite store: structure, limits, curves, artifacts, secrets, two processes at once."""

import json
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from bmfm_pipeline.errors import Preempted
from bmfm_pipeline.tracking import StageTracker, git_revision, redact, tracking_uri

SECRET = "s3cr3t-planted-value-9f2"


@pytest.fixture
def state(tmp_path):
    return tmp_path / "state"


@pytest.fixture
def open_run(state):
    """Make trackers on the default store of `state`."""

    def make(name="stage", **kwargs):
        return StageTracker(tracking_uri(state), "test", name, state_dir=state, **kwargs)

    return make


@pytest.fixture
def client(state):
    def connect():
        from mlflow import MlflowClient

        return MlflowClient(tracking_uri=tracking_uri(state))

    return connect


def everything_in(folder) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_a_child_run_hangs_under_its_parent_and_carries_what_identifies_it(open_run, client):
    with (
        open_run("pipeline", tags={"prefect.flow_run_id": "flow-1"}) as parent,
        open_run("pretrain", parent_run_id=parent.run_id) as child,
    ):
        child.set_tags({"prefect.flow_run_id": "flow-2", "bmfm.key": "abc"})
        child.log_dataset("zheng68k-mini", "d" * 64, "/data/zheng.h5ad")
    store = client()
    run = store.get_run(child.run_id)
    assert run.data.tags["mlflow.parentRunId"] == parent.run_id
    assert run.data.tags["prefect.flow_run_id"] == "flow-2"
    assert run.data.tags["bmfm.dataset_hash"] == "d" * 64
    assert run.inputs.dataset_inputs[0].dataset.name == "zheng68k-mini"
    assert run.info.status == "FINISHED"
    assert store.get_run(parent.run_id).data.tags["prefect.flow_run_id"] == "flow-1"
    if revision := git_revision():
        assert run.data.tags["mlflow.source.git.commit"] == revision["commit"]
    assert child.url.endswith(f"/runs/{child.run_id}")


def test_the_default_store_is_a_file_under_the_state_folder_with_artifacts_beside_it(open_run, state, tmp_path):
    report = tmp_path / "report.html"
    report.write_text("<h1>done</h1>")
    with open_run() as run:
        run.log_artifact(report)
    assert (state / "mlflow.db").is_file()
    assert [path.name for path in (state / "mlflow-artifacts").rglob("*.html")] == ["report.html"]


def test_a_configuration_is_params_cut_to_the_limit_and_a_whole_artifact(open_run, client):
    config = {"model": {"hidden_size": 64, "dropout": 0.1, "checkpoint": None}, "long": "x" * 20_000}
    config |= {f"key_{number}": number for number in range(250)}
    with open_run() as run:
        run.log_config(config)
    params = client().get_run(run.run_id).data.params
    assert params["model.hidden_size"] == "64" and params["key_249"] == "249"
    assert len(params["long"]) == 6000 and params["long"].endswith("…")
    path = client().download_artifacts(run.run_id, "config.json")
    assert json.loads(Path(path).read_text()) == config


def test_curves_keep_every_step_and_a_grown_history_adds_only_what_is_new(open_run, client, tmp_path):
    history = tmp_path / "history.jsonl"
    lines = [json.dumps({"step": step, "epoch": 0, "train/loss": 1 / (step + 1)}) for step in range(1200)]
    history.write_text("\n".join(lines[:700]) + "\n")
    with open_run() as run:
        run.log_metrics({"train/loss": 1.0}, 0)  # seen live already
        run.log_history(history)
        history.write_text("\n".join(lines) + '\n{"step": 1200, "tr')
        run.log_history(history)
        run.log_metrics({"accuracy": 0.5, "undefined": math.nan})
    curve = client().get_metric_history(run.run_id, "train/loss")
    assert sorted(point.step for point in curve) == list(range(1200))
    assert all(point.timestamp > 1_000_000_000_000 for point in curve)
    assert next(point.value for point in curve if point.step == 3) == 0.25
    metrics = client().get_run(run.run_id).data.metrics
    assert metrics["accuracy"] == 0.5 and "undefined" not in metrics


def test_an_error_ends_failed_and_a_stop_ends_killed(open_run, client):
    with pytest.raises(RuntimeError), open_run() as failed:
        raise RuntimeError("loss is nan")
    with pytest.raises(Preempted), open_run() as stopped:
        raise Preempted("stopped")
    assert client().get_run(failed.run_id).info.status == "FAILED"
    assert "loss is nan" in client().get_run(failed.run_id).data.tags["bmfm.error"]
    assert client().get_run(stopped.run_id).info.status == "KILLED"


def test_a_later_step_goes_on_with_the_run_and_may_repeat_params(open_run, client):
    with open_run() as first:
        first.log_params({"a": 1, "workers": 0})
    with open_run(run_id=first.run_id) as again:
        again.log_params({"a": 1, "workers": 8, "b": 2})
        assert client().get_run(first.run_id).info.status == "RUNNING"
    run = client().get_run(first.run_id)
    assert run.data.params == {"a": "1", "workers": "0", "b": "2"}
    assert run.info.status == "FINISHED"


def test_a_planted_secret_appears_nowhere(open_run, state, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    report = tmp_path / "report.html"
    report.write_text(f"<p>read from s3://user:{SECRET}@host/x and {SECRET}</p>")
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "notes.txt").write_text(f"password={SECRET}")
    with open_run(tags={"where": f"https://bob:{SECRET}@host/path"}) as run:
        run.log_config(
            {
                "storage": {"secret_key": SECRET, "url": f"https://x/y?X-Amz-Signature={SECRET}&a=1"},
                "list": [{"password": SECRET}],
            }
        )
        run.log_params({"free_text": f"key is {SECRET}"})
        run.log_artifact(report)
        run.log_artifact(folder)
        run.log_dataset("data", "0" * 64, f"s3://me:{SECRET}@bucket/file")
        run.set_tags({"api_token": SECRET})
    stored = everything_in(state)
    assert SECRET.encode() not in stored
    assert b"[redacted]" in stored and b"read from" in stored


def test_names_of_this_field_are_not_taken_for_secrets():
    config = {
        "tokenizer": {"identifier": "data"}, "losses": [{"decoder": "token_scores"}], "pad_token_id": 2, "mask_token": "[MASK]",
        "max_tokens": 512, "token_values": [1.0], "use_cache": True, "key": "abc", "prepend_tokens": None,
    }  # fmt: skip
    assert redact(config) == config


@pytest.mark.parametrize(
    "text",
    [
        "AKIAIOSFODNN7EXAMPLE",
        "ghp_" + "a" * 36,
        "hf_" + "b" * 34,
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2lnbmF0dXJl",
        "-----BEGIN RSA PRIVATE KEY-----\nabc\n-----END RSA PRIVATE KEY-----",
    ],
)
def test_known_shapes_of_keys_are_removed(text):
    assert redact({"note": f"see {text} there"}) == {"note": "see [redacted] there"}


@pytest.mark.slow
def test_two_processes_that_start_together_share_a_new_store(state, client):
    script = textwrap.dedent("""
        import sys
        from bmfm_pipeline.tracking import StageTracker, tracking_uri
        state, name = sys.argv[1:]
        with StageTracker(tracking_uri(state), "shared", name, state_dir=state) as run:
            for step in range(300):
                run.log_metrics({"loss": 1.0 / (step + 1)}, step)
                if step % 50 == 0:
                    run.flush()
            run.log_params({f"p{i}": i for i in range(120)})
            assert not run.offline
    """)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(state), f"worker-{number}"],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(3)
    ]
    for worker in workers:
        _, errors = worker.communicate(timeout=180)
        assert worker.returncode == 0, errors
        assert "cannot be reached" not in errors and "locked" not in errors
    store = client()
    experiment = store.get_experiment_by_name("shared")
    runs = store.search_runs([experiment.experiment_id])
    assert {run.info.run_name for run in runs} == {"worker-0", "worker-1", "worker-2"}
    for run in runs:
        assert len(store.get_metric_history(run.info.run_id, "loss")) == 300
        assert len(run.data.params) == 120
    assert not list((state / "mlflow-spool").glob("*.jsonl"))
