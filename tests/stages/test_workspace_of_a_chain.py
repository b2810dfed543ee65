"""The workspace of a finished chain with its real MLflow store: what an alias, or a run that goes on, points to is never deleted."""

import json
import shutil
from pathlib import Path

import pytest

from bmfm_pipeline import cli
from bmfm_pipeline.storage import Workspace
from bmfm_pipeline.storage.life import plan_removals, take_inventory, verify
from bmfm_pipeline.tracking import EXPERIMENT, StageTracker, references_in_store, tracking_uri

OLD = "2020-01-01T00:00:00+00:00"


@pytest.fixture
def aged(finished, tmp_path, monkeypatch):
    """A copy of the chain's workspace and state, every artefact years old, without what other tests have added to it."""
    place = Workspace(tmp_path / "w")
    shutil.copytree(finished.workspace, place.uri)
    chain, everything = {str(uri) for uri in finished.artefacts.values()}, take_inventory(Workspace(finished.workspace))
    own = {id for id, item in everything.stored.items() if item.uri in chain}
    while (more := own | {other for id in own for other in everything.references[id]}) != own:
        own = more
    own |= {id for id in everything.stored if id[0] == "control"}
    for stage, key in everything.stored.keys() - own:
        shutil.rmtree(Path(place.uri) / "artefacts" / stage / key)
    shutil.copytree(f"{finished.workspace}.state", place.state_dir, ignore=shutil.ignore_patterns("*-artifacts"))
    shutil.rmtree(Path(place.uri) / "runs")
    for manifest in Path(place.uri).glob("artefacts/*/*/artefact.json"):
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "created": OLD}))
    monkeypatch.setenv("BMFM_WORKSPACE", place.uri)
    for variable in ("PREFECT_API_URL", "PREFECT_PROFILE", "PREFECT_PROFILES_PATH"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    return place


def collect(capsys, *words: str) -> tuple[set[str], dict[str, str]]:
    """(stages of what goes, {stage: why its artefact stays})."""
    assert cli.main(["workspace", "gc", "--json", *words]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    going = {entry["uri"].split("/")[-2] for entry in found["removals"] if entry["kind"] == "artefact"}
    return going, {entry["uri"].split("/")[-2]: entry["why"] for entry in found["kept"]}


def test_a_real_chain_is_whole_and_hangs_together(aged):
    inventory = take_inventory(aged)
    assert [finding for finding in verify(inventory) if finding.is_problem] == []
    test = next(id for id in inventory.stored if id[0] == "evaluate")
    assert {stage for stage, _ in inventory.references[test]} == {"preprocess", "finetune"}
    plan = plan_removals(inventory, 0.0)
    assert [removal for removal in plan.removals if removal.kind == "artefact"] == []
    assert {stage for stage, _ in plan.kept} == {stage for stage, _ in inventory.stored}


def test_what_an_alias_or_a_run_points_to_stays(aged, capsys):
    from mlflow import MlflowClient

    store, inventory = tracking_uri(aged.state_dir), take_inventory(aged)
    assert references_in_store(store) == []
    model = next(item for item in inventory.stored.values() if item.stage == "finetune")
    client = MlflowClient(tracking_uri=store)
    client.create_registered_model("bmfm-cells")
    client.create_model_version("bmfm-cells", source="s3://elsewhere/model")
    # As one may be registered from its run: the address stands in a tag of that run.
    run = client.search_runs(
        [client.get_experiment_by_name(EXPERIMENT).experiment_id], f"tags.`bmfm.key` = '{model.key}'"
    )[0]
    version = client.create_model_version("bmfm-cells", source="s3://elsewhere/copy", run_id=run.info.run_id)
    client.set_registered_model_alias("bmfm-cells", "champion", version.version)
    (champion,) = references_in_store(store)
    assert champion.what == "champion of bmfm-cells (version 2)"
    going, kept = collect(capsys, "--even-latest", "--dry-run")
    assert going == set() and kept["finetune"] == "champion of bmfm-cells (version 2) points to it"
    assert kept["evaluate"] == "is the newest evaluation of a model that stays"
    assert {"pretrain", "preprocess"} <= set(kept) and kept["control"] == "is read by an evaluation that stays"

    client.delete_registered_model_alias("bmfm-cells", "champion")
    pretrained = next(item for item in inventory.stored.values() if item.stage == "pretrain")
    tags = {"bmfm.input.checkpoint": pretrained.uri}
    tracker = StageTracker(store, EXPERIMENT, "finetune-cells", tags=tags, state_dir=aged.state_dir)
    going, kept = collect(capsys, "--even-latest")
    assert going >= {"finetune", "evaluate", "control"} and set(kept) == {"preprocess", "pretrain"}
    assert kept["pretrain"] == "run finetune-cells points to it"
    tracker.end("FINISHED")
    assert collect(capsys, "--even-latest")[0] == {"preprocess", "pretrain"}
    assert take_inventory(aged).stored == {}


def test_predictions_are_uploaded_when_all_are_done(finished, s3, capsys, tmp_path, monkeypatch):
    model, out = finished.artefacts["finetune"], f"{s3.uri}/predictions"
    words = ["predict", "--model", model, "--input", str(finished.file), "--output"]
    assert cli.main([*words, out, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["output"] == out and f"{out}/predictions.csv" in found["files"]
    keys = s3.keys()
    assert {f"{s3.uri}/{key}" for key in keys} == set(found["files"])
    assert cli.main([*words, str(tmp_path / "here")]) == 0
    assert s3.get("predictions/predictions.csv") == (tmp_path / "here" / "predictions.csv").read_bytes()
    monkeypatch.chdir(tmp_path)
    assert cli.main(["export", "--model", model, "--output", f"{s3.uri}/shared"]) == 2
    assert "name a local one" in capsys.readouterr().err and not (tmp_path / "s3:").exists()
