"""The preprocess stage from the command line: what it leaves, and what each kind of bad input ends with."""

import json
import os
import resource
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from bmfm_pipeline import cli
from bmfm_pipeline.storage import load_artefact, read_json


def cells_of(n_cells=90, n_genes=40, seed=0) -> anndata.AnnData:
    """Small counts with three classes."""
    random = np.random.default_rng(seed)
    counts = random.poisson(1.0, (n_cells, n_genes)).astype(np.float32)
    counts[:, :3] += 1
    return anndata.AnnData(
        sparse.csr_matrix(counts),
        obs=pd.DataFrame(
            {"celltype": [("A", "B", "C")[row % 3] for row in range(n_cells)]},
            index=[f"c{row}" for row in range(n_cells)],
        ),
        var=pd.DataFrame(index=[f"GENE{column}" for column in range(n_genes)]),
    )


@pytest.fixture
def preprocess(tmp_path, capsys):
    """preprocess(cells or path, *words) -> (exit code, JSON, stderr)."""

    def run(cells, *words):
        path = cells
        if isinstance(cells, anndata.AnnData):
            path = tmp_path / "cells.h5ad"
            cells.write_h5ad(path)
        code = cli.main(["preprocess", str(path), "label=celltype", *map(str, words), "--json"])
        captured = capsys.readouterr()
        return code, json.loads(captured.out.splitlines()[-1]), captured.err

    return run


def published(workspace=None) -> list[Path]:
    folder = Path(workspace or os.environ["BMFM_WORKSPACE"]) / "artefacts" / "preprocess"
    return sorted(folder.iterdir()) if folder.exists() else []


def test_the_artefact_holds_data_split_labels_vocabulary_and_a_report(preprocess):
    code, found, _ = preprocess(cells_of())
    assert code == 0
    folder = Path(found["artefacts"]["preprocess"])
    artefact = load_artefact(str(folder))
    assert {"processed.h5ad", "split.csv", "split.json", "label_dict.json", "transforms.json", "report.json"} <= set(
        artefact.files
    )
    labels = read_json(folder / "label_dict.json")
    assert labels == [{"label_name": "celltype", "label_values": {"A": 0, "B": 1, "C": 2}}]
    split = pd.read_csv(folder / "split.csv")["split"].value_counts()
    assert split["test"] == 18 and split["dev"] == 8 and split["train"] == 64  # 20 %, and 10 % of the rest
    report = read_json(folder / "report.json")
    assert [set(step) for step in report["steps"]] == [{"step", "cells", "genes", "counts"}] * len(report["steps"])
    assert report["steps"][0]["cells"] == 90 and report["steps"][0]["genes"] == 40
    processed = anndata.read_h5ad(folder / "processed.h5ad")
    assert processed.layers["counts"].dtype == np.uint8 or processed.layers["counts"].dtype.kind in "iu"
    assert processed.obs["split_stratified_celltype"].isin(["train", "dev", "test"]).all()


def test_the_same_input_is_reused_and_another_seed_is_not(preprocess):
    first = preprocess(cells_of())[1]["artefacts"]
    code, again, said = preprocess(cells_of())
    assert code == 0 and again["artefacts"] == first and "preprocess: reused" in said
    assert preprocess(cells_of(), "seed.seed_value=7")[1]["artefacts"] != first
    assert len(published()) == 2


def spoil(change) -> anndata.AnnData:
    cells = cells_of()
    change(cells)
    return cells


def _set(cells, values) -> None:
    cells.X.data[: len(values)] = values


def _log(cells) -> None:
    cells.X.data = np.log1p(cells.X.data)


def _twice(names) -> list[str]:
    return [names[0], *names[:-1]]


def _one_of_a_kind(cells) -> None:
    cells.obs["celltype"] = ["lonely", *cells.obs["celltype"].tolist()[1:]]


BAD = {
    "negative values": (lambda cells: _set(cells, [-1, -2]), ["X: 2 values are negative"]),
    "NaN": (lambda cells: _set(cells, [np.nan]), ["X: 1 values are NaN or infinite, in 1 cells, e.g. c0"]),
    "log-normalised values": (_log, ["are not whole numbers", "log-normalised", "counts are needed"]),
    "duplicate genes": (lambda cells: setattr(cells, "var_names", _twice(cells.var_names.tolist())), ["1 duplicate gene names (var): GENE0", "duplicate_genes=sum"]),
    "duplicate cells": (lambda cells: setattr(cells, "obs_names", _twice(cells.obs_names.tolist())), ["1 duplicate cell names (obs): c0", "obs_names_make_unique"]),
    "a label with one cell": (_one_of_a_kind, ["'lonely' (1)", "is_stratification_label=false"]),
    "no such label": (lambda cells: cells.obs.rename(columns={"celltype": "cell_type"}, inplace=True), ["no label column 'celltype'; did you mean 'cell_type'?"]),
    "no expressed gene at all": (lambda cells: setattr(cells, "X", sparse.csr_matrix(cells.shape, dtype=np.float32)), ["every value is zero"]),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*names are not unique")
@pytest.mark.parametrize("kind", BAD)
def test_bad_cells_end_with_their_names_and_publish_nothing(kind, preprocess):
    change, words = BAD[kind]
    code, found, said = preprocess(spoil(change))
    assert code == 2 and found["kind"] == "DataError"
    for word in ["cells.h5ad", *words]:
        assert word in said
    assert "Traceback" not in said and published() == []


def test_files_that_are_no_h5ad(preprocess, tmp_path):
    (tmp_path / "text.h5ad").write_text("cell,gene\n")
    code, _, said = preprocess(tmp_path / "text.h5ad")
    assert code == 2 and "text.h5ad: is not a readable h5ad" in said
    code, _, said = preprocess(tmp_path / "absent.h5ad")
    assert code == 2 and "absent.h5ad: no such file" in said
    (tmp_path / "folder.h5ad").mkdir()
    code, _, said = preprocess(tmp_path / "folder.h5ad")
    assert code == 2 and "is a folder" in said


def test_an_empty_matrix_is_refused(preprocess):
    code, _, said = preprocess(cells_of()[:0].copy())
    assert code == 2 and "is empty: 0 cells x 40 genes" in said


def test_a_cell_without_genes_is_dropped_and_counted(preprocess):
    cells = cells_of()
    matrix = cells.X.tolil()
    matrix[4] = 0
    cells.X = matrix.tocsr()
    code, found, _ = preprocess(cells)
    report = read_json(Path(found["artefacts"]["preprocess"]) / "report.json")
    assert code == 0 and report["check"]["cells_without_counts_examples"] == ["c4"]
    assert sum(report["dropped_cells"].values()) == 1 and report["dropped_examples"]["cells"] == ["c4"]


def test_a_label_that_no_training_cell_has_is_counted(preprocess):
    cells = cells_of()
    cells.obs["celltype"] = ["new" if row == 89 else name for row, name in enumerate(cells.obs["celltype"])]
    cells.obs["fold"] = ["test" if row >= 70 else "dev" if row >= 60 else "train" for row in range(90)]
    code, found, _ = preprocess(cells, "data_module.transform_kwargs.split_column_name=fold")
    report = read_json(Path(found["artefacts"]["preprocess"]) / "report.json")
    assert code == 0 and report["split"]["labels_not_in_training"] == {"celltype": {"new": 1}}


def test_a_length_that_is_no_multiple_says_what_would_be(preprocess):
    code, _, said = preprocess(cells_of(), "data_module.max_length=100")
    assert code == 2 and "max_length 100 is not a multiple of pad_to_multiple_of 16; use 96 or 112" in said


def test_genes_that_a_tokenizer_does_not_know_are_counted_and_listed(preprocess, tmp_path):
    from bmfm_pipeline.vocabulary import build_vocabularies

    build_vocabularies([f"GENE{column}" for column in range(30)], 10).save(tmp_path / "known")
    code, found, _ = preprocess(cells_of(), f"tokenizer.identifier={tmp_path / 'known'}")
    folder = Path(found["artefacts"]["preprocess"])
    report = read_json(folder / "report.json")["vocabulary"]
    assert code == 0 and (report["known"], report["unknown"]) == (30, 10)
    assert report["unknown_examples"] == [f"GENE{column}" for column in range(30, 40)]
    build_vocabularies(["TP53", "ACTB"], 10).save(tmp_path / "strange")
    code, _, said = preprocess(cells_of(), f"tokenizer.identifier={tmp_path / 'strange'}")
    assert code == 2 and "knows none of the 40 gene names" in said


def test_a_full_disk_while_publishing_leaves_no_artefact_and_the_next_run_succeeds(preprocess, tmp_path):
    cells_of(400, 300).write_h5ad(tmp_path / "many.h5ad")
    cells = tmp_path / "many.h5ad"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, hard))  # enough for the databases, not for the processed file
    try:
        code, found, said = preprocess(cells)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 2 and found["kind"] == "StorageError" and "disk is full or a file size limit was reached" in said
    assert "Traceback" not in said and published() == []
    assert preprocess(cells)[0] == 0 and len(published()) == 1


def test_a_workspace_that_cannot_be_written_is_said_at_once(preprocess, tmp_path):
    (tmp_path / "file").write_text("")
    code, found, said = preprocess(cells_of(), "--workspace", tmp_path / "file" / "workspace")
    assert code == 2 and found["kind"] == "StorageError" and "not writable" in said and "--workspace" in said


def test_a_damaged_artefact_is_rebuilt(preprocess):
    folder = Path(preprocess(cells_of())[1]["artefacts"]["preprocess"])
    whole = (folder / "label_dict.json").read_bytes()
    (folder / "label_dict.json").write_text("{}")
    code, _, said = preprocess(cells_of())
    assert code == 0 and "incomplete or damaged and will be rebuilt" in said
    assert (folder / "label_dict.json").read_bytes() == whole


def test_asked_copies_are_made_and_other_content_is_never_overwritten(preprocess, tmp_path):
    places = [
        f"data_module.transform_kwargs.processed_data_source={tmp_path / 'processed.h5ad'}",
        f"data_module.dataset_kwargs.label_dict_path={tmp_path / 'labels.json'}",
    ]
    code, found, _ = preprocess(cells_of(), *places)
    folder = Path(found["artefacts"]["preprocess"])
    assert code == 0 and (tmp_path / "processed.h5ad").read_bytes() == (folder / "processed.h5ad").read_bytes()
    assert read_json(tmp_path / "labels.json") == read_json(folder / "label_dict.json")
    for file in ("processed.h5ad", "labels.json"):
        (tmp_path / file).unlink()
    code, again, said = preprocess(cells_of(), *places)
    assert code == 0 and again["artefacts"] == found["artefacts"] and "preprocess: reused" in said
    assert (tmp_path / "processed.h5ad").exists() and (tmp_path / "labels.json").exists()
    (tmp_path / "processed.h5ad").write_bytes(b"something else")
    code, _, said = preprocess(cells_of(seed=1), *places)
    assert code == 2 and "exists with other content and is not overwritten" in said
    assert (tmp_path / "processed.h5ad").read_bytes() == b"something else"


def test_processed_data_can_be_the_input(preprocess, tmp_path):
    first = Path(preprocess(cells_of())[1]["artefacts"]["preprocess"])
    code, found, _ = preprocess(
        cells_of(),
        "data_module.transform_datasets=false",
        f"data_module.dataset_kwargs.processed_data_source={first / 'processed.h5ad'}",
        "data_module.dataset_kwargs.split_column_name=split_stratified_celltype",
    )
    assert code == 0
    again = anndata.read_h5ad(Path(found["artefacts"]["preprocess"]) / "processed.h5ad")
    before = anndata.read_h5ad(first / "processed.h5ad")
    assert (again.X != before.X).nnz == 0 and again.obs_names.equals(before.obs_names)
    assert (again.obs["split_stratified_celltype"] == before.obs["split_stratified_celltype"]).all()
