"""Splits with names, few training cells, label files that several runs share, labels in an ontology, through the preprocess stage."""

import shutil
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

from bmfm_pipeline.config import RunConfig
from bmfm_pipeline.errors import ConfigError, DataError, StorageError
from bmfm_pipeline.stages import plan_stage, run_stage
from bmfm_pipeline.storage import list_artefacts, read_json, write_json_atomic
from bmfm_pipeline.training import build_data_module, build_module

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


SIZES = [
    "model.hidden_size=16",
    "model.num_hidden_layers=1",
    "model.num_attention_heads=2",
    "model.intermediate_size=16",
    "data_module.max_length=32",
]


def labelled_jobs(place, data_dir, ontology, stage="finetune"):
    """The jobs up to `stage` on real cells whose labels lie in an ontology."""
    column = f"[{{label_column_name: cell_type, label_ontology: {ontology}}}]"
    return plan_stage(
        stage,
        str(data_dir / "cellxgene_220" / "cellxgene.h5ad"),
        overrides=[f"++label_columns={column}", f"{SPLIT}.method=random", *SIZES],
        workspace=str(place.parent / "workspace"),
    )


@pytest.fixture(scope="module")
def cell_ontology(data_dir) -> Path:
    return data_dir / "genes" / "cl.v2024-04-05.owl.gz"


def test_labels_of_mixed_detail_are_trained_and_scored(cells, data_dir, cell_ontology, tmp_path):
    preprocess, *_, finetune = labelled_jobs(cells, data_dir, cell_ontology)
    folder = Path(run_stage(preprocess)["uri"])
    placed = read_json(folder / "label_ontology.json")["cell_type"]
    assert placed["terms"]["T cell"] == "CL:0000084" and placed["terms"]["Hofbauer cell"] == "CL:3000001"
    assert placed["allowed"]["T cell"] == ["T cell", "regulatory T cell"]
    assert set(placed["allowed"]["native cell"]) == set(placed["terms"])  # obsolete, and replaced by `cell`
    assert read_json(folder / "labels.json")["cell_type"]["ontology"]["placed"] == 22

    run = RunConfig.model_validate(finetune.config)
    assert run.trainer.losses == [{"label_column_name": "cell_type", "name": "hce"}]
    data = build_data_module(run, folder)
    data.setup("fit")
    module = build_module(run, data)
    batch = module.on_before_batch_transfer(next(iter(data.train_dataloader())), 0)
    logits, positions = module.outputs(batch)
    result = module.objectives.compute(logits, batch["labels"], positions)
    result.total.backward()
    ids = data.prepared.label_dict["cell_type"]
    scores, shares = logits["cell_type"].detach(), torch.softmax(logits["cell_type"].detach(), dim=-1)
    within = {ids[name]: [ids[other] for other in below] for name, below in placed["allowed"].items()}
    truth = batch["labels"]["cell_type"].tolist()
    expected = -np.mean([float(shares[row, within[label]].sum().log()) for row, label in enumerate(truth)])
    assert float(result.total.detach()) == pytest.approx(expected, rel=1e-5)
    head = next(p for name, p in module.model.named_parameters() if "label_decoders" in name)
    assert head.grad.abs().sum() > 0
    module.metrics.update(logits, batch["labels"], positions)
    said = scores.argmax(dim=-1).tolist()
    right = np.mean([guess in within[label] for guess, label in zip(said, truth, strict=True)])
    assert module.metrics.compute()["cell_type_hierarchical_accuracy"] == pytest.approx(right)

    # The same content elsewhere is the same data; without the ontology they are other data, which hce cannot be trained on.
    copied = shutil.copy(cell_ontology, tmp_path / "cl.owl.gz")
    assert labelled_jobs(cells, data_dir, copied, "preprocess")[0].key == preprocess.key
    tables = data.prepared.class_tables(run)
    assert tables["cell_type"].counts.sum() == len(data.rows["train"])
    assert (
        tables["cell_type"].counts.tolist()
        == np.bincount(data.prepared.labels(run)["cell_type"][data.rows["train"]], minlength=22).tolist()
    )
    (folder / "label_ontology.json").unlink()
    with pytest.raises(ConfigError, match="preprocess them with label_ontology set"):
        build_module(run, data)


def test_an_ontology_that_is_not_there_is_refused_before_anything_runs(cells, data_dir, tmp_path):
    with pytest.raises(DataError, match=r"label_columns\.0\.label_ontology\.file: .*none\.obo does not exist"):
        labelled_jobs(cells, data_dir, tmp_path / "none.obo")
