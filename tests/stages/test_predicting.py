"""What prediction writes beside its tables, how it goes on after a stop, and that a cell's row is its own."""

import hashlib
import json
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest

from bmfm_pipeline import cli
from bmfm_pipeline.errors import ConfigError
from bmfm_pipeline.stages.predict import Asked, predict_file
from bmfm_pipeline.stages.predicting import chunks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(finished) -> str:
    return finished.artefacts["finetune"]


@pytest.fixture(scope="module")
def cells(finished, tmp_path_factory):
    """90 cells in a file of their own, one empty and one of few genes, with a batch column; compressed, with a layer, obsm and uns."""
    some = anndata.read_h5ad(finished.file)[np.arange(0, 630, 7)].copy()
    matrix = some.X.tolil()
    matrix[4], matrix[7, 250:] = 0, 0
    some.X = matrix.tocsr()
    some.obs["donor"] = pd.Categorical(np.where(np.arange(90) % 3 == 0, "one", "two"))
    some.layers["doubled"] = some.X * 2
    some.obsm["X_pca"] = np.ones((90, 2), dtype=np.float32)
    some.uns["about"] = {"from": "somewhere"}
    path = tmp_path_factory.mktemp("cells") / "cells.h5ad"
    some.write_h5ad(path, compression="gzip")
    return path


def numbers(folder: Path, name: str = "embeddings") -> pd.DataFrame:
    return pd.read_csv(folder / f"{name}.csv", index_col=0, header=None if name.startswith("embeddings") else 0)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_stopped_run_goes_on_where_it_was_and_gives_the_same_bytes(model, finished, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(chunks, "ROWS", 100)
    asked = Asked(poolings=["first_token", "mean_pooling"])
    predict_file(model, str(finished.file), tmp_path / "whole", asked=asked)

    def stop(event):
        if event.get("step", 0) > 300:
            raise KeyboardInterrupt

    for _ in range(2):  # stopped in the same place again: nothing is lost
        with pytest.raises(KeyboardInterrupt):
            predict_file(model, str(finished.file), tmp_path / "parts", asked=asked, on_progress=stop)
    (unfinished,) = (tmp_path / "parts").iterdir()
    for rows in unfinished.glob("*.bin"):  # what a killed process had written of its next rows
        rows.write_bytes(rows.read_bytes() + b"torn")
    heard = []
    found = predict_file(model, str(finished.file), tmp_path / "parts", asked=asked, on_progress=heard.append)
    assert found["resumed_at"] == 300 and found["cells"] == 700
    assert heard[0]["message"].startswith("300 of 700 cells were predicted before")
    last = heard[-1]
    assert last["step"] == last["max_steps"] == 700 and last["eta_s"] == 0 and last["cells_per_s"] > 0
    assert files_of(tmp_path / "parts") == files_of(tmp_path / "whole")

    with pytest.raises(KeyboardInterrupt):
        predict_file(model, str(finished.file), tmp_path / "parts", asked=asked, on_progress=stop)
    found = predict_file(model, str(finished.file), tmp_path / "parts", asked=asked, batch_size=50)
    assert found["resumed_at"] == 0 and "300 cells predicted before with another batch size" in caplog.text
    assert files_of(tmp_path / "parts").keys() == files_of(tmp_path / "whole").keys()


def test_a_row_is_the_same_whatever_batch_the_cell_came_in(model, cells, tmp_path):
    whole = anndata.read_h5ad(cells)
    order = np.random.default_rng(0).permutation(len(whole))
    whole[order].copy().write_h5ad(tmp_path / "shuffled.h5ad")
    asked = Asked(poolings=["first_token", "mean_pooling", "pooling_layer", "5"])
    runs = {}
    for size, file in ((1, cells), (7, cells), (64, tmp_path / "shuffled.h5ad")):
        predict_file(model, str(file), tmp_path / str(size), batch_size=size, asked=asked)
        names = [
            "logits",
            *(f"embeddings_{name}" for name in ("first_token", "mean_pooling", "pooling_layer", "position_5")),
        ]
        runs[size] = [numbers(tmp_path / str(size), name).loc[whole.obs_names].to_numpy() for name in names]
    for size in (7, 64):
        for alone, beside in zip(runs[1], runs[size], strict=True):
            assert np.isnan(alone[4]).all() and np.isfinite(np.delete(alone, 4, axis=0)).all()
            assert np.nanmax(np.abs(alone - beside)) < 1e-5


def test_a_copy_of_the_input_carries_labels_and_embeddings(model, cells, tmp_path):
    before = hashlib.sha256(cells.read_bytes()).hexdigest()
    asked = Asked(annotated="labelled.h5ad", poolings=["mean_pooling"], umap=True)
    found = predict_file(model, str(cells), tmp_path / "out", asked=asked)
    assert hashlib.sha256(cells.read_bytes()).hexdigest() == before
    assert str(tmp_path / "out" / "labelled.h5ad") in found["files"]
    given, made = anndata.read_h5ad(cells), anndata.read_h5ad(tmp_path / "out" / "labelled.h5ad")
    assert (given.X != made.X).nnz == 0 and (given.layers["doubled"] != made.layers["doubled"]).nnz == 0
    pd.testing.assert_frame_equal(made.obs[given.obs.columns], given.obs)
    pd.testing.assert_frame_equal(made.var, given.var)
    assert list(made.obs.columns)[-3:] == ["bmfm_celltype", "bmfm_celltype_confidence", "bmfm_reason"]
    table = pd.read_csv(tmp_path / "out" / "predictions.csv", index_col=0)
    assert made.obs["bmfm_celltype"].astype(object).where(table["celltype"].notna()).equals(table["celltype"])
    assert np.allclose(made.obs["bmfm_celltype_confidence"], table["celltype_confidence"], atol=1e-6, equal_nan=True)
    assert made.obs["bmfm_reason"].notna().sum() == 1 and made.obs["bmfm_reason"].iloc[4] == "no expressed gene"
    assert made.obsm["X_bmfm"].dtype == np.float32 and np.isnan(made.obsm["X_bmfm"][4]).all()
    assert np.allclose(made.obsm["X_bmfm"], numbers(tmp_path / "out"), atol=1e-6, equal_nan=True)
    assert np.isnan(made.obsm["X_bmfm_umap"]).any(axis=1).sum() == 1 and "X_pca" in made.obsm
    assert made.uns["about"] == {"from": "somewhere"} and made.uns["bmfm"]["pooling"] == "mean_pooling"

    again = Asked(annotated=str(tmp_path / "again.h5ad"), poolings=["first_token", "mean_pooling"])
    predict_file(model, str(tmp_path / "out" / "labelled.h5ad"), tmp_path / "more", asked=again)
    twice = anndata.read_h5ad(tmp_path / "again.h5ad")
    assert list(twice.obs.columns) == list(made.obs.columns)
    assert {"X_bmfm_first_token", "X_bmfm_mean_pooling"} <= set(twice.obsm)
    with pytest.raises(ConfigError, match="is the input itself"):
        predict_file(model, str(cells), tmp_path / "out", asked=Asked(annotated=str(cells)))


def test_poolings_side_by_side_joined_and_too_far(model, cells, tmp_path, caplog):
    asked = Asked(poolings=["first_token", "mean_pooling", "mean_pooling+first_token", "0", "126"])
    found = predict_file(model, str(cells), tmp_path / "out", asked=asked)
    tables = {
        path.stem.removeprefix("embeddings_"): numbers(tmp_path / "out", path.stem)
        for path in (tmp_path / "out").glob("emb*")
    }
    assert set(tables) == {"first_token", "mean_pooling", "mean_pooling+first_token", "position_0", "position_126"}
    joined = np.hstack([tables["mean_pooling"], tables["first_token"]])
    assert np.array_equal(tables["mean_pooling+first_token"], joined, equal_nan=True)
    assert np.array_equal(tables["position_0"], tables["first_token"], equal_nan=True)
    assert np.flatnonzero(np.isnan(tables["position_126"]).any(axis=1)).tolist() == [4, 7]
    assert found["without_position"] == {"position_126": 1}
    assert "position_126: 1 cells are shorter" in caplog.text
    with pytest.raises(ConfigError, match="did you mean 'mean_pooling'"):
        predict_file(model, str(cells), tmp_path / "out", asked=Asked(poolings=["mean_poling"]))
    with pytest.raises(ConfigError, match="from the end of a batch"):
        predict_file(model, str(cells), tmp_path / "out", asked=Asked(poolings=["-1"]))


def test_the_command_writes_parquet_scores_batches_and_calls_cells_unknown(model, cells, tmp_path, capsys):
    words = ["predict", "--model", model, "--input", str(cells), "--output", str(tmp_path / "out"), "--json"]
    words += ["--format", "parquet", "--batch-column", "donor", "--unknown-below", "0.3", "--h5ad", "--umap"]
    assert cli.main(words) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert sorted(Path(file).name for file in found["files"]) == [
        "embeddings.parquet", "integration.json", "logits.parquet", "predicted.h5ad", "predictions.parquet",
        "probabilities.parquet", "umap.parquet",
    ]  # fmt: skip
    table = pd.read_parquet(tmp_path / "out" / "predictions.parquet")
    unsure = table["celltype_confidence"] < 0.3
    assert unsure.sum() > 0 and (table.loc[unsure, "celltype"] == "unknown").all()
    assert not (table.loc[~unsure, "celltype"] == "unknown").any()
    assert "unknown" in anndata.read_h5ad(tmp_path / "out" / "predicted.h5ad").obs["bmfm_celltype"].cat.categories
    scores = json.loads((tmp_path / "out" / "integration.json").read_text())
    assert scores["scores"]["ilisi"]["n"] == 89 and 0 <= scores["scores"]["total"]["value"] <= 1
    assert scores["notes"][0] == "integration: labels are the input's own 'celltype'"
    assert cli.main([*words[:-6], "--batch-column", "doner"]) == 2
    assert "did you mean 'donor'" in json.loads(capsys.readouterr().out)["error"]
    assert cli.main([*words[:8], "--unknown-below", "2"]) == 2


def test_an_evaluation_maps_its_test_cells(finished):
    place = Path(finished.artefacts["evaluate"])
    found = json.loads((place / "embedding_map.json").read_text())
    stored = pd.read_parquet(place / "predictions.parquet")
    assert found["cells"] == stored["cell"].tolist() and found["n_of"] == 140
    assert found["truth"]["celltype"] == stored["celltype"].tolist()
    assert found["predicted"]["celltype"] == stored["celltype_predicted"].tolist()
    assert np.ptp(found["x"]) > 1 and np.ptp(found["y"]) > 1 and found["integration"] == {}
