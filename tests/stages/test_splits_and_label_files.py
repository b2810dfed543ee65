"""Splits with names, few training cells, and label files that several runs share, through the preprocess stage."""

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from bmfm_pipeline.config import RunConfig
from bmfm_pipeline.errors import DataError, StorageError
from bmfm_pipeline.stages import plan_stage, run_stage
from bmfm_pipeline.storage import list_artefacts, read_json, write_json_atomic

SPLIT = "data_module.transform_kwargs.split"


@pytest.fixture(scope="module")
def cells(tmp_path_factory) -> Path:
    """120 cells of three types and four donors, with ages and with several states a cell."""
    random = np.random.default_rng(0)
    counts = random.poisson(1.0, (120, 30)).astype(np.float32)
    counts[:, :3] += 1
    obs = pd.DataFrame(
        {
            "celltype": [("A", "B", "C")[row % 3] for row in range(120)],
            "donor": [f"D{row % 4}" for row in range(120)],
            "age": [np.nan if row % 10 == 0 else 20.0 + row for row in range(120)],
            "state": [(None, "active|dividing", "active", "|")[row % 4] for row in range(120)],
        },
        index=[f"c{row}" for row in range(120)],
    )
    path = tmp_path_factory.mktemp("splits") / "cells.h5ad"
    genes = pd.DataFrame(index=[f"GENE{column}" for column in range(30)])
    anndata.AnnData(sparse.csr_matrix(counts), obs=obs, var=genes).write_h5ad(path)
    return path


def job_of(cells, *words, label="celltype"):
    place = str(cells.parent / "workspace")  # one for the module: a store of runs takes long to make
    return plan_stage("preprocess", str(cells), overrides=list(words), label=label, workspace=place)[0]


def preprocess(cells, *words, label="celltype") -> Path:
    return Path(run_stage(job_of(cells, *words, label=label))["uri"])


def sides(folder: Path) -> dict:
    table = pd.read_csv(folder / "split.csv")
    return table.groupby("split")["cell"].agg(set).to_dict()


def test_a_split_gets_a_name_and_is_used_again_with_fewer_training_cells(cells, tmp_path):
    first = preprocess(
        cells, f"{SPLIT}.group=donor", f"{SPLIT}.weights={{train: .5, dev: .25, test: .25}}", f"{SPLIT}.name=donors-v1"
    )
    made = read_json(first / "split.json")
    place = job_of(cells).place
    named = list_artefacts(place, "split")
    assert [(entry.summary["name"], entry.summary["hash"]) for entry in named] == [("donors-v1", made["hash"])]
    assert made["groups"]["donor"] == {"train": 2, "dev": 1, "test": 1, "in_train_and_test": 0, "on_two_sides": 0}

    job = job_of(
        cells, f"{SPLIT}.reuse=donors-v1", f"{SPLIT}.train_fraction=.25", "data_module.transform_kwargs.transforms=[]"
    )
    folder = Path(run_stage(job)["uri"])
    again = read_json(folder / "split.json")
    assert again["made_as"]["hash"] == made["hash"] and again["made_as"]["group"] == "donor"
    assert {name: sides(folder)[name] == sides(first)[name] for name in ("dev", "test")} == {"dev": True, "test": True}
    assert sides(folder)["train"] < sides(first)["train"] and again["counts"]["unused"] == 60 - again["counts"]["train"]
    by_address = job_of(
        cells, f"{SPLIT}.reuse={first}", f"{SPLIT}.train_fraction=.25", "data_module.transform_kwargs.transforms=[]"
    )
    assert by_address.key == job.key and by_address.cached

    with pytest.raises(StorageError, match="'donors-v1' is already the name of another split"):
        preprocess(cells, f"{SPLIT}.name=donors-v1")
    with pytest.raises(DataError, match=r"no split is called 'donors-v2' in workspace .* \(donors-v1\)"):
        job_of(cells, f"{SPLIT}.reuse=donors-v2")
    with pytest.raises(DataError, match="neither a csv file nor a folder with a split"):
        job_of(cells, f"{SPLIT}.reuse={tmp_path}/nothing")


def test_unused_cells_are_in_no_loader_and_labels_come_as_they_are_meant(cells):
    from bmfm_pipeline.objectives import build_objectives
    from bmfm_pipeline.training.data_module import build_data_module

    labels = (
        "++label_columns=[{label_column_name: celltype, is_stratification_label: true},"
        "{label_column_name: state, is_multilabel: true}, {label_column_name: age, is_regression_label: true}]"
    )
    job = job_of(
        cells,
        labels,
        f"{SPLIT}.cells_per_class=4",
        "data_module.max_length=32",
        "data_module.batch_size=24",
        label=None,
    )
    folder = Path(run_stage(job)["uri"])
    assert read_json(folder / "split.json")["counts"] == {"train": 12, "dev": 10, "test": 24, "unused": 74}
    report = read_json(folder / "report.json")["labels"]
    assert report["age"] == {"missing": 12} and report["state"]["missing"] == 30

    data = build_data_module(RunConfig.model_validate(job.config), folder)
    data.setup("fit")
    assert {name: len(rows) for name, rows in data.rows.items()} == {"train": 12, "dev": 10, "test": 24, "predict": 120}
    states, ages = data.prepared.labels(data.run)["state"], data.prepared.labels(data.run)["age"]
    assert states[:5].tolist() == [[-100, -100], [1, 1], [1, 0], [0, 0], [-100, -100]]
    assert np.isnan(ages[0]) and ages[1] == 21

    import torch

    batch = next(iter(data.test_dataloader()))
    found = batch["labels"]
    assert found["state"].dtype == torch.float32 and found["state"].shape == (24, 2)
    rows = batch["cell_index"].numpy()
    np.testing.assert_array_equal(found["state"].numpy(), states[rows])
    losses = [{"label_column_name": "state", "name": "bce_with_logits"}, {"label_column_name": "age", "name": "mse"}]
    objectives = build_objectives(losses, [], data.run.model_dump(mode="json")["label_columns"])
    scores = {"state": torch.randn(24, 2), "age": torch.randn(24, 1)}
    result = objectives.compute(scores, found)
    known = states[rows, 0] >= 0
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        scores["state"][known], torch.from_numpy(states[rows][known])
    )
    assert torch.isclose(result.values["state_bce_with_logits_loss"], expected)
    error = (scores["age"][:, 0] - found["age"])[~torch.isnan(found["age"])] ** 2
    assert torch.isclose(result.values["age_mse_loss"], error.mean(), rtol=1e-5)


def test_runs_with_other_labels_share_one_label_file(cells, tmp_path):
    path = tmp_path / "labels.json"
    named = f"data_module.dataset_kwargs.label_dict_path={path}"
    first = preprocess(cells, named)
    assert job_of(cells, named).cached and job_of(cells, named).uri == str(first)  # its own file says nothing new
    preprocess(cells, named, label="donor")
    stored = {entry["label_name"]: entry["label_values"] for entry in read_json(path)}
    assert stored == {"celltype": {"A": 0, "B": 1, "C": 2}, "donor": {f"D{number}": number for number in range(4)}}
    assert job_of(cells, named).uri == str(first)

    write_json_atomic(path, [{"label_name": "celltype", "label_values": {"C": 0, "B": 1, "A": 2}}])
    other = preprocess(cells, named)
    assert other != first and read_json(other / "label_dict.json")[0]["label_values"] == {"C": 0, "B": 1, "A": 2}
    write_json_atomic(path, [{"label_name": "celltype", "label_values": {"A": 0, "B": 1}}])
    with pytest.raises(DataError, match=r'labels\.json.*does not know: C\..*"C": 2'):
        preprocess(cells, named)


def test_intervals_resample_the_groups_that_the_split_kept_whole():
    from types import SimpleNamespace

    from bmfm_pipeline.stages.evaluate import _groups

    store = SimpleNamespace(obs_names=["a", "b", "c", "d"], column=lambda name: ["D1", "D2", "D1", "D3"])
    groups, notes = _groups(SimpleNamespace(store=store), "donor", ["c", "b", "a"])
    assert groups.tolist() == ["D1", "D2", "D1"]
    assert notes == [
        "intervals resample whole values of donor, of which the test cells have 2; with so few, they are rough"
    ]
    assert _groups(SimpleNamespace(store=store), None, ["c"]) == (None, [])
    one, notes = _groups(SimpleNamespace(store=store), "donor", ["a", "c"])
    assert one is None and "all test cells have the same donor" in notes[0]
