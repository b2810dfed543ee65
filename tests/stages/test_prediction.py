"""Prediction from a published model alone: a row for every cell, the same numbers as evaluation, nothing lost."""

import json
import os
import resource
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest

from bmfm_pipeline import cli
from bmfm_pipeline.errors import CheckpointError, DataError, StorageError
from bmfm_pipeline.stages.predict import predict_file

pytestmark = pytest.mark.slow


def tables(output: Path):
    """predictions, probabilities, embeddings."""
    return (
        pd.read_csv(output / "predictions.csv", index_col=0),
        pd.read_csv(output / "probabilities.csv", index_col=0),
        pd.read_csv(output / "embeddings.csv", index_col=0, header=None),
    )


@pytest.fixture(scope="module")
def predicted(finished, tmp_path_factory):
    output = tmp_path_factory.mktemp("predicted")
    summary = predict_file(finished.artefacts["finetune"], str(finished.file), output, workspace=finished.workspace)
    return summary, output


def test_every_cell_has_a_row_in_the_order_of_the_input(finished, predicted):
    summary, output = predicted
    cells = anndata.read_h5ad(finished.file).obs_names.tolist()
    labels, probabilities, embeddings = tables(output)
    assert [table.index.tolist() for table in (labels, probabilities, embeddings)] == [cells] * 3
    assert list(labels.columns) == ["celltype", "reason", "celltype_confidence"] and embeddings.shape == (700, 32)
    assert summary["cells"] == 700 and summary["unusable"] == 0
    assert np.allclose(probabilities.sum(axis=1), 1, atol=1e-4)
    assert (probabilities.idxmax(axis=1).str.removeprefix("celltype_") == labels["celltype"]).all()
    assert np.allclose(probabilities.max(axis=1), labels["celltype_confidence"], atol=1e-6)


def test_predictions_are_those_of_the_evaluation(finished, predicted):
    stored = pd.read_parquet(Path(finished.artefacts["evaluate"]) / "predictions.parquet").set_index("cell")
    labels = tables(predicted[1])[0]
    assert (labels.loc[stored.index, "celltype"] == stored["celltype_predicted"]).all()
    logits = pd.read_csv(predicted[1] / "logits.csv", index_col=0).loc[stored.index].to_numpy()
    own = np.exp(logits - logits.max(axis=1, keepdims=True))
    own /= own.sum(axis=1, keepdims=True)  # those of predict are calibrated
    assert np.abs(own - np.stack(stored["celltype_probabilities"])).max() < 1e-3  # stored as float16


def test_a_cell_is_predicted_alike_whatever_is_beside_it(finished, predicted, tmp_path):
    cells = anndata.read_h5ad(finished.file)
    few = cells[[650, 3, 77]].copy()[:, ::-1].copy()
    few.write_h5ad(tmp_path / "few.h5ad")
    predict_file(finished.artefacts["finetune"], str(tmp_path / "few.h5ad"), tmp_path / "out", batch_size=2)
    for whole, alone in zip(tables(predicted[1])[1:], tables(tmp_path / "out")[1:], strict=True):
        assert np.abs(whole.loc[few.obs_names].to_numpy() - alone.to_numpy()).max() < 1e-5


def test_cells_that_cannot_be_used_keep_their_row_with_a_reason(finished, tmp_path):
    cells = anndata.read_h5ad(finished.file)[:6].copy()
    matrix = cells.X.toarray()
    matrix[1] = 0
    matrix[3, 5] = np.nan
    cells.X = matrix
    cells.write_h5ad(tmp_path / "some.h5ad")
    summary = predict_file(finished.artefacts["finetune"], str(tmp_path / "some.h5ad"), tmp_path / "out")
    labels, probabilities, embeddings = tables(tmp_path / "out")
    assert labels["celltype"].isna().tolist() == [False, True, False, True, False, False]
    assert labels["reason"].iloc[1] == "no expressed gene"
    assert labels["reason"].iloc[3] == "holds negative, NaN or infinite values"
    assert probabilities.iloc[[1, 3]].isna().all(axis=None) and embeddings.iloc[[1, 3]].isna().all(axis=None)
    assert summary["unusable"] == 2


def test_unknown_genes_are_counted_and_listed(finished, tmp_path):
    cells = anndata.read_h5ad(finished.file)[:20].copy()
    cells.var_names = [*cells.var_names[:-2], "NOT-A-GENE", "NEITHER"]
    cells.write_h5ad(tmp_path / "renamed.h5ad")
    summary = predict_file(finished.artefacts["finetune"], str(tmp_path / "renamed.h5ad"), tmp_path / "out")
    assert summary["genes"]["unknown"] == 2 and summary["genes"]["unknown_examples"] == ["NOT-A-GENE", "NEITHER"]


def test_input_without_meaning_is_refused(finished, tmp_path):
    model = finished.artefacts["finetune"]
    cells = anndata.read_h5ad(finished.file)[:20].copy()
    counts = cells.X.copy()
    cells.X.data = np.log1p(cells.X.data)
    cells.layers["counts"] = counts
    cells.write_h5ad(tmp_path / "logs.h5ad")
    with pytest.raises(
        DataError, match="the model was made from counts; layer 'counts' holds counts: name it with --layer counts"
    ):
        predict_file(model, str(tmp_path / "logs.h5ad"), tmp_path / "out")
    assert predict_file(model, str(tmp_path / "logs.h5ad"), tmp_path / "out", layer="counts")["cells"] == 20
    cells.var_names = [f"ENSG{number:011d}" for number in range(cells.n_vars)]
    cells.X = counts
    cells.write_h5ad(tmp_path / "ensembl.h5ad")
    with pytest.raises(DataError, match="Ensembl ids"):
        predict_file(model, str(tmp_path / "ensembl.h5ad"), tmp_path / "out")
    with pytest.raises(DataError, match=r"no such file"):
        predict_file(model, str(tmp_path / "absent.h5ad"), tmp_path / "out")
    with pytest.raises(CheckpointError, match="is a preprocess artefact, not a model"):
        predict_file(finished.artefacts["preprocess"], str(finished.file), tmp_path / "out")


def test_a_full_disk_leaves_the_earlier_files(finished, predicted, tmp_path):
    output = tmp_path / "out"
    model = finished.artefacts["finetune"]
    predict_file(model, str(finished.file), output)
    before = {path.name: path.read_bytes() for path in output.glob("*.csv")}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(StorageError, match="disk is full"):
            predict_file(model, str(finished.file), output)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name: path.read_bytes() for path in output.glob("*.csv")} == before
    assert {name for name in os.listdir(output) if not name.startswith(".")} == set(before)


def test_the_command_prints_where_and_how_many(finished, tmp_path, capsys):
    arguments = ["predict", "--model", finished.artefacts["finetune"], "--input", str(finished.file)]
    assert cli.main([*arguments, "--output", str(tmp_path / "out"), "--json"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out.splitlines()[-1])
    assert found["cells"] == 700 and found["output"] == str(tmp_path / "out")
    assert "700 cells predicted" in captured.err and "765 of 765 genes are known to the model" in captured.err


def test_a_config_with_a_predict_task_predicts(finished, tmp_path, monkeypatch):
    arguments = ["-cn", "predict_config", f"task.checkpoint={finished.artefacts['finetune']}"]
    arguments += [f"data_module.transform_kwargs.source_h5ad_file_name={finished.file}"]
    arguments += ["++trainer.pooling_method=[mean_pooling,first_token]"]
    assert cli.seed_main([*arguments, f"task.default_root_dir={tmp_path / 'out'}"]) == 0
    labels, _, embeddings = tables(tmp_path / "out")
    assert labels.shape == (700, 3) and embeddings.shape == (700, 64)


def test_a_pretrained_model_gives_embeddings(finished, tmp_path):
    predict_file(finished.artefacts["pretrain"], str(finished.file), tmp_path / "out")
    labels, probabilities, embeddings = tables(tmp_path / "out")
    assert embeddings.shape == (700, 32) and list(labels.columns) == ["reason"] and probabilities.shape == (700, 0)
