"""Everything on s3://: the source, the workspace, and the places a config names; then read by another machine. And the whole chain."""

import json
from pathlib import Path

import anndata
import numpy as np
import pytest

from bmfm_pipeline import cli
from bmfm_pipeline.data import CellStore, open_store
from bmfm_pipeline.stages.planning import plan_pipeline, plan_stage
from bmfm_pipeline.stages.running import run_stage
from bmfm_pipeline.storage import load_artefact, release_copies

pytestmark = pytest.mark.slow


@pytest.fixture
def on_s3(s3, mini_h5ad, monkeypatch, tmp_path, capsys):
    """on_s3(*words) preprocesses the demonstration's cells on s3 -> (exit code, JSON, stderr)."""
    s3.put("data/mini.h5ad", mini_h5ad.read_bytes())
    monkeypatch.setenv("BMFM_STATE", str(tmp_path / "state"))

    def run(*words: str):
        words = (f"{s3.uri}/data/mini.h5ad", "label=celltype", *words, "--workspace", f"{s3.uri}/w", "--json")
        code = cli.main(["preprocess", *words])
        captured = capsys.readouterr()
        return code, json.loads(captured.out.splitlines()[-1]), captured.err

    yield run
    release_copies()


def test_from_s3_to_s3_and_read_on_another_machine(s3, on_s3, mini_h5ad, monkeypatch, tmp_path):
    places = [
        f"data_module.transform_kwargs.processed_data_source={s3.uri}/places/processed.h5ad",
        f"data_module.dataset_kwargs.label_dict_path={s3.uri}/places/label_dict.json",
    ]
    code, found, said = on_s3(*places)
    assert code == 0, said
    uri = found["artefacts"]["preprocess"]
    assert uri.startswith(f"{s3.uri}/w/artefacts/preprocess/")
    assert not any("secret" in text for text in (said, json.dumps(found)))

    for variable, folder in (("BMFM_STATE", "other-state"), ("BMFM_CACHE_DIR", "other-cache")):
        monkeypatch.setenv(variable, str(tmp_path / folder))
    folder = load_artefact(uri).local()
    assert folder.is_relative_to(tmp_path / "other-cache")
    store, cells = CellStore(folder / "processed.h5ad"), anndata.read_h5ad(mini_h5ad)
    assert store.n_cells == 700 and store.obs_names.tolist() == cells.obs_names.tolist()
    rows = np.array([699, 0, 17])
    kept = [cells.var_names.get_loc(gene) for gene in store.var_names]
    np.testing.assert_array_equal(store.counts.rows(rows).toarray(), cells.X[rows][:, kept].toarray())
    placed = open_store(f"{s3.uri}/places/processed.h5ad")
    np.testing.assert_array_equal(placed.rows(rows).toarray(), store.rows(rows).toarray())
    assert json.loads(s3.get("places/label_dict.json")) == json.loads((folder / "label_dict.json").read_text())

    code, again, said = on_s3(*places)  # this machine has neither state nor cache of the other
    assert code == 0 and again["artefacts"] == found["artefacts"] and "preprocess: reused" in said, said


def test_a_source_that_is_not_there(s3, on_s3):
    s3.client.delete_object(Bucket=s3.name, Key="data/mini.h5ad")
    code, _, said = on_s3()
    assert code != 0 and f"{s3.uri}/data/mini.h5ad: does not exist" in said and "Traceback" not in said
    assert s3.keys() == []


def test_several_files_on_s3_as_one_dataset(s3, mini_h5ad, tmp_path):
    cells = anndata.read_h5ad(mini_h5ad)
    for name, part in (("a", cells[:400]), ("b", cells[400:])):
        part.write_h5ad(tmp_path / f"{name}.h5ad")
        s3.put(f"data/{name}.h5ad", (tmp_path / f"{name}.h5ad").read_bytes())
    listed = json.dumps([f"{s3.uri}/data/{name}.h5ad" for name in "ba"])
    words = ["dataset=null", "label_columns=[]", f"data_module.transform_kwargs.source_h5ad_file_name={listed}"]
    (job,) = plan_stage("preprocess", config_name="fine_tune_train_config", overrides=words)
    folder = Path(run_stage(job)["uri"])
    release_copies()
    assert [row["cells"] for row in json.loads((folder / "report.json").read_text())["files"]["files"]] == [400, 300]
    assert job.name == "data" and set(job.inputs["source"]["files"]) == {"a", "b"}
    s3.put("data/b.h5ad", (tmp_path / "a.h5ad").read_bytes())
    (again,) = plan_stage("preprocess", config_name="fine_tune_train_config", overrides=words)
    assert again.key != job.key and "input source changed (b changed)" in again.reason


def test_the_chain_on_s3_leaves_results_only(s3, mini_h5ad, monkeypatch, tmp_path):
    """Preprocessed, trained in a child process, tested; then all of it is reused on a machine that has seen none of it."""
    cells = anndata.read_h5ad(mini_h5ad)[:200].copy()
    cells.obs = cells.obs[[]]
    cells.write_h5ad(tmp_path / "cells.h5ad")
    source = s3.put("data/cells.h5ad", (tmp_path / "cells.h5ad").read_bytes())
    monkeypatch.setenv("BMFM_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    words = [*(f"model.{name}={size}" for name, size in sizes.items()), "data_module.max_length=32", "task.max_steps=4"]
    jobs = plan_pipeline(source, overrides=words, workspace=f"{s3.uri}/w")
    results = [run_stage(job) for job in jobs]
    assert [job.stage for job in jobs] == ["preprocess", "pretrain", "evaluate"]
    assert results[1]["summary"]["checkpoints_uploaded"] >= 1
    assert "checkpoint_uploads_failed" not in results[1]["summary"]
    assert {key.split("/")[1] for key in set(s3.keys()) if key.startswith("w/")} == {"artefacts"}
    for variable, folder in (("BMFM_STATE", "other-state"), ("BMFM_CACHE_DIR", "other-cache")):
        monkeypatch.setenv(variable, str(tmp_path / folder))
    assert all(job.cached for job in plan_pipeline(source, overrides=words, workspace=f"{s3.uri}/w"))
    release_copies()
