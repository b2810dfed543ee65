"""The registered model of a dataset in a real SQLite store: versions, aliases, tags, artifacts, and what protects them from deletion."""

import pytest

from bmfm_pipeline.errors import StorageError
from bmfm_pipeline.storage.life import artefacts_named_in
from bmfm_pipeline.tracking import (
    EXPERIMENT,
    Registry,
    StageTracker,
    references_in_store,
    registered_name,
    tracking_uri,
)

MODEL = "bmfm-cells"
FIRST, SECOND = "/w/artefacts/finetune/0a1b", "s3://bucket/w/artefacts/finetune/2c3d"


@pytest.fixture(scope="module")
def uri(tmp_path_factory) -> str:
    return tracking_uri(tmp_path_factory.mktemp("state"))


@pytest.fixture(scope="module")
def registry(uri) -> Registry:
    return Registry(uri)


def test_names_are_those_that_mlflow_takes():
    assert registered_name("zheng68k-mini") == "bmfm-zheng68k-mini"
    assert registered_name("my cells: 2024/a") == "bmfm-my-cells--2024-a"


def test_asking_makes_no_store(tmp_path):
    asked = Registry(tracking_uri(tmp_path / "nowhere"))
    assert asked.at(MODEL, "champion") is None and asked.versions(MODEL) == []
    assert not (tmp_path / "nowhere").exists()


def test_an_artefact_is_one_version_and_aliases_move_between_versions(registry, uri, tmp_path):
    with StageTracker(uri, EXPERIMENT, "finetune", tags={"bmfm.key": "0a1b"}, state_dir=tmp_path) as tracker:
        pass
    assert registry.run_of("0a1b") == tracker.run_id and registry.run_of("none") == ""
    first = registry.register(MODEL, FIRST, run_id=tracker.run_id, tags={"bmfm.dataset": "cells"})
    again = registry.register(MODEL, FIRST, tags={"bmfm.evaluation": "/w/artefacts/evaluate/9f"})
    assert (first.version, again.version) == ("1", "1") and again.tags["bmfm.dataset"] == "cells"
    second = registry.register(MODEL, SECOND)
    assert [one.version for one in registry.versions(MODEL)] == ["2", "1"] and second.uri == SECOND

    registry.point("champion", first)
    registry.point("champion", second)
    registry.point("previous", first)
    assert {alias: one.version for alias, one in registry.aliases(MODEL).items()} == {"champion": "2", "previous": "1"}
    registry.unpoint("challenger", MODEL)
    registry.unpoint("previous", MODEL)
    assert registry.at(MODEL, "previous") is None and registry.at("bmfm-other", "champion") is None

    registry.point("champion", first)
    named = artefacts_named_in([reference.texts for reference in references_in_store(uri)])
    assert named == {("finetune", "0a1b"), ("evaluate", "9f")}


def test_a_decision_is_kept_with_the_run_that_made_the_model(registry):
    from mlflow import MlflowClient

    first, second = registry.versions(MODEL)[1], registry.versions(MODEL)[0]
    assert registry.attach(first, "promotion/now.json", '{"promoted": true}')
    assert not registry.attach(second, "promotion/now.json", "{}")
    client = MlflowClient(registry._uri)
    (file,) = client.list_artifacts(first.run_id, "promotion")
    assert file.path == "promotion/now.json" and client.get_run(first.run_id).info.status == "FINISHED"


def test_secrets_do_not_reach_the_registry(registry, monkeypatch):
    monkeypatch.setenv("LAB_PASSWORD", "s3cr3t-planted-value")
    monkeypatch.setenv("PWD", "/w/artefacts")  # the working folder is none
    (second, *_) = registry.versions(MODEL)
    registry.tag(second, {"note": "with s3cr3t-planted-value", "where": FIRST, "left out": None})
    tags = registry.versions(MODEL)[0].tags
    assert tags["note"] == "with [redacted]" and tags["where"] == FIRST and "left out" not in tags


def test_a_store_that_does_not_answer_or_keeps_no_aliases_is_said():
    with pytest.raises(StorageError, match="cannot be reached, and without it nobody knows which model is champion"):
        Registry("http://127.0.0.1:9").at(MODEL, "champion")
    with pytest.raises(StorageError, match="keeps no registered models with aliases"):
        Registry("/tmp/mlruns").at(MODEL, "champion")
