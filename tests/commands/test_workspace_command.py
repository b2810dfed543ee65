"""`bmfm workspace ls | verify | gc`, as a person and a script meet them."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest

from bmfm_pipeline import cli
from bmfm_pipeline.storage import Workspace, publish

NOWHERE = "http://127.0.0.1:9"


@pytest.fixture
def bmfm(capsys, tmp_path, monkeypatch):
    """bmfm(*words) -> (exit code, JSON or None, what a person reads)."""
    for variable in ("PREFECT_API_URL", "PREFECT_PROFILE", "PREFECT_PROFILES_PATH"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))

    def run(*words: str):
        code = cli.main(["workspace", *words])
        said = capsys.readouterr()
        return code, json.loads(said.out.splitlines()[-1]) if "--json" in words else None, said.out + said.err

    return run


@pytest.fixture
def models():
    """Three fine-tuned models of a data set, the first two 60 and 50 days old, each with its evaluation, and their data."""
    place = Workspace()
    data = _made(place, "preprocess", "d" * 32, {}, 60)
    made = {}
    for key, days in (("a", 60), ("b", 50), ("c", 45)):
        model = _made(place, "finetune", key * 32, {"data": data}, days, "config.json")
        made[key] = model, _made(place, "evaluate", f"e{key}" * 16, {"data": data, "model": model}, days)
    return made


def _made(place, stage, key, inputs, days, file="data.bin"):
    staging = place.run_dir(key) / "artefact"
    staging.mkdir(parents=True)
    (staging / file).write_text("{}")
    entries = {role: {"id": one.key, "uri": one.uri, "stage": one.stage} for role, one in inputs.items()}
    made = publish(staging, place, stage, key, inputs=entries, config={}, code_version="c", summary={"name": "cells"})
    shutil.rmtree(place.run_dir(key))
    manifest = Path(made.uri) / "artefact.json"
    then = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(time.time() - 86400 * days))
    manifest.write_text(manifest.read_text().replace(made.created, then))
    return made


def test_a_listing_for_people_and_for_scripts(bmfm, models):
    code, found, _ = bmfm("ls", "--json")
    assert code == 0 and found["stages"]["finetune"]["artefacts"] == 3
    rows = {row["uri"]: row for row in found["artefacts"]}
    model, test = models["a"]
    assert rows[test.uri]["references"] == sorted([model.uri, f"{found['workspace']}/artefacts/preprocess/{'d' * 32}"])
    assert rows[model.uri]["referenced_by"] == [test.uri] and rows[model.uri]["bytes"] > 2
    assert found["bytes"]["artefacts"] == sum(row["bytes"] for row in found["artefacts"])
    code, _, said = bmfm("ls")
    line = next(line for line in said.splitlines() if line.strip().startswith("aaaaaaaaaaaa"))
    assert "cells" in line and "60 d  from preprocess dddddddddddd  used by evaluate eaeaeaeaeaea" in line
    assert said.index("preprocess:") < said.index("finetune:") < said.index("evaluate:") < said.index("artefacts")


def test_damage_is_named_ends_with_1_and_is_mended_with_repair(bmfm, models):
    assert bmfm("verify")[::2] == (0, bmfm("verify")[2]) and "nothing is wrong" in bmfm("verify")[2]
    model, _ = models["b"]
    (Path(model.uri) / "config.json").write_text("[]")
    code, found, _ = bmfm("verify", "--json")
    assert code == 1 and [(entry["kind"], entry["key"]) for entry in found["findings"]] == [("damaged", "b" * 32)]
    code, _, said = bmfm("verify", "--repair")
    assert code == 0 and f"damaged: {model.uri}" in said and "the next run makes it again" in said
    code, found, said = bmfm("verify", "--json")
    kinds = {entry["kind"]: entry["what"] for entry in found["findings"]}
    assert code == 1 and kinds["missing input"] == "its input model, finetune bbbbbbbbbbbb, is not in the workspace"


def test_gc_shows_first_and_deletes_then(bmfm, models):
    going = [*models["a"], *models["b"]]
    code, found, _ = bmfm("gc", "--dry-run", "--json")
    assert code == 0 and {entry["uri"] for entry in found["removals"]} == {artefact.uri for artefact in going}
    assert all(Path(artefact.uri).exists() for artefact in going) and found["bytes"] > 0
    code, _, said = bmfm("gc", "--dry-run")
    assert "would go: artefact finetune cells aaaaaaaaaaaa" in said and "60 days old" in said
    assert f"finetune/{'c' * 32}: is what `latest` stands for" in said
    assert bmfm("gc", "--dry-run", "--older-than", "55d", "--json")[1]["removals"][-1]["uri"] == models["a"][0].uri
    code, _, said = bmfm("gc")
    assert code == 0 and not any(Path(artefact.uri).exists() for artefact in going) and "3 artefacts stay" in said
    code, found, _ = bmfm("gc", "--even-latest", "--json")
    assert len(found["removals"]) == 3 and {entry["outcome"] for entry in found["removals"]} == {"removed"}


def test_no_model_goes_while_the_registry_cannot_be_asked(bmfm, models, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", NOWHERE)
    code, found, _ = bmfm("gc", "--json")
    assert code == 0 and not any("finetune" in entry["uri"] for entry in found["removals"])
    assert f"MLflow at {NOWHERE} cannot be asked" in found["notes"][0] and "--without-registry" in found["notes"][0]
    assert all(Path(model.uri).exists() for model, _ in models.values())
    code, found, _ = bmfm("gc", "--json", "--without-registry")
    assert {entry["uri"] for entry in found["removals"] if "finetune" in entry["uri"]} == {
        models["a"][0].uri, models["b"][0].uri,
    }  # fmt: skip


def test_no_model_goes_while_the_deployments_cannot_be_asked(bmfm, models, monkeypatch):
    monkeypatch.setenv("PREFECT_API_URL", f"{NOWHERE}/api")
    _, found, _ = bmfm("gc", "--json", "--dry-run")
    assert not found["removals"] and "--without-deployments" in found["notes"][0]
    _, found, _ = bmfm("gc", "--json", "--dry-run", "--without-deployments")
    assert len(found["removals"]) == 4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("ls", "--workspace", "absent"), "absent: nothing lies there; name the workspace"),
        (("gc", "--older-than", "soon"), "--older-than soon: is no age; write for example 30d"),
    ],
)
def test_mistakes_are_said_in_words(bmfm, models, words, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, text = bmfm(*words)
    assert code == 2 and said in text and "Traceback" not in text and os.getcwd() == str(tmp_path)
