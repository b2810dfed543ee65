"""Every golden checkpoint: read without the program that wrote it, all weights used, the same numbers, the same predictions."""

import json

import anndata
import numpy as np
import pandas as pd
import pytest
import torch

from bmfm_pipeline.models import load_model, pool
from bmfm_pipeline.models.unpickling import CheckpointFile, plain
from bmfm_pipeline.stages.predict import predict_file

ATOL, RTOL = 2e-5, 1e-4
PREDICTED = 1e-5


@pytest.fixture(scope="module")
def cases(golden_dir):
    """The .ckpt files, each with its contents, inputs and expected outputs beside it."""
    paths = sorted((golden_dir / "checkpoint").glob("*/*.ckpt"))
    assert paths
    return paths


def beside(path, what):
    return path.with_name(f"{path.stem}_{what}")


def test_what_is_inside_is_read_as_it_was_written(cases):
    for path in cases:
        contents = json.loads(beside(path, "contents.json").read_text())
        with CheckpointFile(path) as file:
            assert sorted(file.values) == contents["top_level_keys"]
            assert {name: list(tensor.shape) for name, tensor in file.state_dict().items()} == contents["state_dict"]
            assert plain(file.values["hyper_parameters"]) == contents["hyper_parameters"]


def test_every_checkpoint_gives_its_numbers(cases, say):
    for path in cases:
        contents = json.loads(beside(path, "contents.json").read_text())
        model = load_model(path)
        report = model.load_report
        assert report.clean and len(report.loaded) == len(contents["state_dict"])
        assert not (report.new_heads or report.not_used or report.notes)
        labels = {
            entry["label_name"]: entry["label_values"]
            for entry in json.loads((path.parent / "labels.json").read_text())
        }
        for label in model.config.model_labels:
            assert list(label.class_names) == sorted(labels[label.name], key=labels[label.name].get)
        inputs, expected = np.load(beside(path, "inputs.npz")), np.load(beside(path, "expected.npz"))
        ids, mask = torch.from_numpy(inputs["input_ids"]), torch.from_numpy(inputs["attention_mask"])
        with torch.no_grad():
            output = model(ids, mask, output_hidden_states=True)
        for key in expected.files:
            kind, _, rest = key.partition("__")
            if kind == "logits":
                got = output.logits[rest]
            elif kind == "pooling":
                got = pool(output, mask, rest)
            else:
                got = {"embeddings": output.embeddings, "hidden_last": output.hidden_states[-1]}[kind]
            got = got[: len(expected[key])].numpy()
            assert got.shape == expected[key].shape
            assert np.allclose(got, expected[key], atol=ATOL, rtol=RTOL), (
                path.name,
                key,
                np.abs(got - expected[key]).max(),
            )
    say(f"golden checkpoints: {len(cases)} reproduced")


def test_predictions_from_the_checkpoint_alone(cases, golden_dir, data_dir, tmp_path, caplog):
    """With no setting but the file: what the checkpoint leaves open is settled, and said."""
    expected = {path.name: path for path in (golden_dir / "checkpoint" / "predict_run").glob("*.csv")}
    model = next(path for path in cases if path.stem == "finetuned")
    cells = data_dir / "zheng68k_165" / "zheng68k.h5ad"
    summary = predict_file(str(model), str(cells), tmp_path / "out", workspace=str(tmp_path / "workspace"))
    assert any("data_module.max_length: 128" in line for line in summary["settings_by_default"])
    assert "so these settings are used" in caplog.text
    for name, path in expected.items():
        header = None if name == "embeddings.csv" else 0
        wanted = pd.read_csv(path, index_col=0, header=header)
        got = pd.read_csv(tmp_path / "out" / name, index_col=0, header=header)
        assert list(got.index) == list(wanted.index) == list(anndata.read_h5ad(cells, backed="r").obs_names)
        if name == "predictions.csv":
            tied = _close_seconds(pd.read_csv(expected["probabilities.csv"], index_col=0).to_numpy())
            assert ((got[wanted.columns] == wanted).all(axis=1).to_numpy() | tied).all()
            assert got["reason"].isna().all()
        else:
            assert list(got.columns) == list(wanted.columns)
            assert np.abs(got.to_numpy() - wanted.to_numpy()).max() < PREDICTED, name


def _close_seconds(probabilities):
    """Of each cell whether its two most probable classes are as good as tied."""
    largest = np.sort(probabilities, axis=1)
    return largest[:, -1] - largest[:, -2] < PREDICTED
