"""MLflow that does not answer: a short delay, one warning, nothing lost, everything sent later."""

import json
import time

import pytest

from bmfm_pipeline.tracking import StageTracker, replay_spool, runs, tracking_uri
from bmfm_pipeline.tracking.spool import Spool

NOWHERE = "http://user:hunter2secret@127.0.0.1:1"


@pytest.fixture(autouse=True)
def _warn_again():
    runs._warned.clear()


@pytest.fixture
def state(tmp_path):
    return tmp_path / "state"


def offline_pipeline(state, report):
    with (
        StageTracker(NOWHERE, "offline", "pipeline", state_dir=state) as parent,
        StageTracker(NOWHERE, "offline", "pretrain", parent_run_id=parent.run_id, state_dir=state) as child,
    ):
        child.log_config({"model": {"hidden_size": 64}, "password": "hunter2secret"})
        for step in range(5):
            child.log_metrics({"loss": 5.0 - step}, step)
        child.log_dataset("mini", "a" * 64)
        child.log_artifact(report)
        child.set_tags({"bmfm.key": "k1"})
        assert child.offline and child.url == ""
    return parent, child


@pytest.fixture
def report(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("<h1>fine</h1>")
    return path


def test_an_unreachable_server_delays_by_seconds_warns_once_and_keeps_everything(state, report, caplog):
    began = time.monotonic()
    with caplog.at_level("WARNING"):
        offline_pipeline(state, report)
    assert time.monotonic() - began < 5
    warnings = [record.getMessage() for record in caplog.records if "cannot be reached" in record.getMessage()]
    assert len(warnings) == 1 and "MLFLOW_TRACKING_URI" in warnings[0]
    kept = "".join(path.read_text() for path in (state / "mlflow-spool").glob("*.jsonl"))
    operations = [json.loads(line)["op"] for line in kept.splitlines()]
    assert operations.count("create") == 2 and operations.count("end") == 2 and "metrics" in operations
    assert "hunter2secret" not in kept + "".join(warnings)


def test_what_was_kept_arrives_whole_at_the_next_connection(state, report):
    offline_pipeline(state, report)
    report.unlink()  # the run folder is gone by then
    uri = tracking_uri(state)
    with StageTracker(uri, "offline", "next", state_dir=state):
        pass
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    found = {
        run.info.run_name: run for run in client.search_runs([client.get_experiment_by_name("offline").experiment_id])
    }
    assert set(found) == {"pipeline", "pretrain", "next"}
    child = found["pretrain"]
    assert child.data.tags["mlflow.parentRunId"] == found["pipeline"].info.run_id
    assert child.data.tags["bmfm.key"] == "k1"
    assert child.data.params["model.hidden_size"] == "64" and child.data.params["password"] == "[redacted]"
    assert [point.value for point in client.get_metric_history(child.info.run_id, "loss")] == [5.0, 4.0, 3.0, 2.0, 1.0]
    assert child.inputs.dataset_inputs[0].dataset.name == "mini"
    assert child.info.status == "FINISHED"
    assert {entry.path for entry in client.list_artifacts(child.info.run_id)} == {"config.json", "report.html"}
    assert replay_spool(state) == 0 and not Spool(state).pending()


def test_a_run_sent_halfway_is_continued_under_its_new_id(state):
    uri = tracking_uri(state)
    with StageTracker(NOWHERE, "offline", "first step", state_dir=state) as first:
        first.log_params({"a": 1})
    assert replay_spool(state, uri) > 0
    with StageTracker(uri, "offline", "second step", run_id=first.run_id, state_dir=state) as second:
        second.log_params({"b": 2})
    assert not second.offline
    from mlflow import MlflowClient

    assert MlflowClient(tracking_uri=uri).get_run(second.run_id).data.params == {"a": "1", "b": "2"}


def test_a_store_that_fails_in_the_middle_keeps_the_rest(state, monkeypatch):
    from bmfm_pipeline.tracking.store import Store, Unreachable

    uri = tracking_uri(state)
    tracker = StageTracker(uri, "middle", "run", state_dir=state)
    tracker.log_params({"before": 1})

    def broken(self, operation):
        raise Unreachable("database is locked")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "apply", broken)
        tracker.log_params({"during": 2})
    tracker.log_metrics({"loss": 1.5}, 3)
    tracker.end()
    assert not tracker.offline and Spool(state).pending()
    assert replay_spool(state) == 3  # params, metrics, end
    from mlflow import MlflowClient

    run = MlflowClient(tracking_uri=uri).get_run(tracker.run_id)
    assert run.data.params == {"before": "1", "during": "2"} and run.data.metrics == {"loss": 1.5}
    assert run.info.status == "FINISHED"


def test_replaying_to_an_unreachable_store_loses_nothing(state, report):
    offline_pipeline(state, report)
    before = {path.name: path.read_text() for path in Spool(state).pending()}
    assert replay_spool(state, NOWHERE) == 0
    assert {path.name: path.read_text() for path in Spool(state).pending()} == before


def test_a_refused_record_is_set_aside_and_does_not_block_the_others(state, caplog):
    uri = tracking_uri(state)
    spool = Spool(state)
    with StageTracker(uri, "refused", "run", state_dir=state) as run:
        pass
    spool.append({"op": "params", "run": "f" * 32, "items": [["a", "1"]]})
    spool.append({"op": "params", "run": run.run_id, "items": [["b", "2"]]})
    assert replay_spool(state) == 2
    refused = list((state / "mlflow-spool" / "refused").glob("*.jsonl"))
    assert [path.stem for path in refused] == ["f" * 32] and "reason" in refused[0].read_text()
    assert any("refused" in record.getMessage() for record in caplog.records)
