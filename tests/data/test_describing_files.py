"""What `describe_file` says of real and damaged files: values, storage, names, labels, what would be kept, the next command."""

import shlex

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from bmfm_pipeline.config import compose
from bmfm_pipeline.config.catalogue import default_transforms
from bmfm_pipeline.data.sources import open_source
from bmfm_pipeline.data.sources.description import describe_file
from bmfm_pipeline.data.sources.label_columns import best_labels, look_at_columns
from bmfm_pipeline.data.sources.matrix_facts import matrix_facts
from bmfm_pipeline.data.transforms import build_chain
from bmfm_pipeline.data.transforms.survey import survey

RANDOM = np.random.default_rng(0)
COUNTS = RANDOM.poisson(0.8, (60, 25)).astype(np.float32)
COUNTS[:, 0] += 1
LOGS = np.log1p(COUNTS / COUNTS.sum(1, keepdims=True) * 1e4)


def described(path, layer=None, **how):
    return describe_file(open_source(path, layer), **how)


class TestValues:
    @pytest.mark.parametrize(
        ("values", "kind", "more"),
        [
            (COUNTS, "counts", {"min": 1.0}),
            (COUNTS.astype(np.int64), "counts", {"dtype": "int64"}),
            (LOGS, "log-normalised", {"normalised_to": 10000, "log_base": "ln"}),
            (LOGS / np.log(2), "log-normalised", {"normalised_to": 10000, "log_base": "log2"}),
            (COUNTS / COUNTS.sum(1, keepdims=True) * 1e6, "normalised", {"normalised_to": 1e6}),
            (COUNTS - COUNTS.mean(0), "scaled", {}),
            (np.where(COUNTS > 3, np.nan, COUNTS), "not finite", {"not_finite": int((COUNTS > 3).sum())}),
            (np.zeros_like(COUNTS), "empty", {}),
        ],
    )
    @pytest.mark.parametrize("storage", ["csr", "csc", "dense"])
    def test_their_kind_is_known_however_they_are_stored(self, make_h5ad, values, kind, more, storage):
        matrix = values if storage == "dense" else getattr(sparse, f"{storage}_matrix")(values)
        with h5py.File(make_h5ad(matrix), "r") as file:
            found = matrix_facts(file, "X")
        assert (found["storage"], found["kind"]) == (storage, kind)
        if storage == "csc":  # the totals of cells are not at hand
            more = {key: value for key, value in more.items() if key not in ("normalised_to", "log_base")}
        assert {key: found[key] for key in more} == more
        assert found["filled"] == pytest.approx((values != 0).mean())

    def test_stored_zeros_and_unsorted_indices_are_counted_over_row_ends(self, make_h5ad):
        matrix = sparse.csr_matrix(COUNTS)
        matrix.data[[3, 7]] = 0
        first, second = matrix.indptr[:2]
        matrix.indices[first:second] = matrix.indices[first:second][::-1]
        with h5py.File(make_h5ad(matrix), "r+") as file:
            file["X/indices"][...] = matrix.indices
            found = matrix_facts(file, "X")
        assert found["zeros_stored"] == 2 and found["unsorted"] == second - first - 1

    def test_a_large_matrix_is_looked_at_in_three_places(self, make_h5ad, monkeypatch):
        from bmfm_pipeline.data.sources import matrix_facts as module

        monkeypatch.setattr(module, "PART", 40)
        values = COUNTS.copy()
        values[-1] = 0.5  # only the end tells
        for matrix in (values, sparse.csr_matrix(values), sparse.csc_matrix(values)):
            with h5py.File(make_h5ad(matrix), "r") as file:
                found = matrix_facts(file, "X")
            assert found["share_seen"] < 0.2
            assert found["storage"] == "csc" or found["kind"] == "log-normalised"


class TestLabels:
    OBS = pd.DataFrame(
        {
            "n_counts": RANDOM.random(60),
            "donor_id": [f"d{index % 5}" for index in range(60)],
            "batch": [index % 2 for index in range(60)],
            "leiden": pd.Categorical([str(index % 4) for index in range(60)]),
            "cell_type": [("T", "B", "NK")[index % 3] for index in range(60)],
            "cell_type_ontology_term_id": [f"CL:000000{index % 3}" for index in range(60)],
            "sex": ["female" if index % 2 else "male" for index in range(60)],
            "age": [20.0 + index % 30 for index in range(60)],
            "barcode": [f"ACGT{index}" for index in range(60)],
            "assay": "10x",
            "nothing": np.nan,
            "fold": [("train", "val", "test")[index % 3] for index in range(60)],
            "split_random": [("train", "ood")[index % 2] for index in range(60)],
        }
    )

    def test_every_column_has_its_role(self):
        roles = {entry["name"]: entry["role"] for entry in look_at_columns(self.OBS)}
        assert roles == {
            "n_counts": "number", "donor_id": "group", "batch": "group", "leiden": "label", "cell_type": "label",
            "cell_type_ontology_term_id": "label", "sex": "label", "age": "number", "barcode": "id", "assay": "constant",
            "nothing": "empty", "fold": "split", "split_random": "split",
        }  # fmt: skip

    def test_the_likeliest_label_is_first_and_a_description_of_the_donor_is_none(self):
        assert [entry["name"] for entry in best_labels(look_at_columns(self.OBS))] == [
            "cell_type",
            "cell_type_ontology_term_id",
        ]

    def test_where_no_column_is_likely_one_possible_one_is_taken(self):
        columns = look_at_columns(self.OBS[["leiden", "donor_id"]])
        assert [entry["name"] for entry in best_labels(columns)] == ["leiden"]
        assert best_labels(look_at_columns(self.OBS[["donor_id", "n_counts"]])) == []

    def test_missing_values_and_small_classes_are_counted(self):
        values = ["A"] * 30 + ["B"] * 20 + ["C", "C", "D"] + [None] * 6 + ["nan"]
        (found,) = look_at_columns(pd.DataFrame({"label": values}))
        assert (found["classes"], found["smallest"], found["missing"]) == (4, 1, 7)
        assert found["small"] == ["C", "D"] and "7 missing" in found["what"]

    def test_every_kind_of_column_that_a_file_can_hold_is_read(self, make_h5ad):
        obs = {
            "nullable": pd.array([1, None] * 30, dtype="Int64"),
            "flag": np.arange(60) % 2 == 0,
            "nullable_flag": pd.array([True, False, None] * 20, dtype="boolean"),
            "text": pd.array(["a", "b", "c"] * 20, dtype="string"),
            "rank": pd.Categorical(["low", "high"] * 30, ordered=True),
            "holes": pd.Categorical([None, "x"] * 30),
            "level": np.repeat([0.0, 1.0, np.nan], 20),
        }
        found = described(make_h5ad(sparse.csr_matrix(COUNTS), obs=obs), quick=True)
        assert {entry["name"]: (entry["role"], entry["missing"]) for entry in found["obs"]} == {
            "nullable": ("constant", 30), "flag": ("label", 0), "nullable_flag": ("label", 20), "text": ("label", 0),
            "rank": ("label", 0), "holes": ("constant", 30), "level": ("label", 20),
        }  # fmt: skip
        assert found["labels"] == ["text"]


class TestGeneNames:
    @pytest.mark.parametrize(
        ("genes", "kind", "species", "said"),
        [
            (["CD3D", "MS4A1", "GAPDH"], "gene symbols", "human", None),
            (["Cd3d", "Ms4a1", "Gapdh"], "gene symbols", "mouse", "genes are those of mouse"),
            (["ENSG00000167286", "ENSG00000156738.18", "ENSG00000111640.2"], "Ensembl ids", "human", "genes are Ensembl ids"),
            (["CD3D_ENSG00000167286", "MS4A1_ENSG00000156738", "A_ENSG00000111640"], "compounds of symbol and Ensembl id", "human", None),
            (["1-Mar", "2-Sep", "MARCH3"], "dates made by a spreadsheet", "", "2 gene names were made dates by a spreadsheet"),
            (["101", "102", "103"], "numbers", "", "gene names are numbers"),
        ],
    )  # fmt: skip
    def test_their_kind_is_named_with_what_to_do(self, make_h5ad, genes, kind, species, said):
        found = described(make_h5ad(COUNTS[:, :3], genes=genes), quick=True)
        assert (found["gene_names"]["kind"], found["gene_names"]["species"]) == (kind, species)
        assert any(said in text for text in found["problems"]) if said else not found["problems"]

    def test_versions_repeats_and_a_column_with_symbols_are_seen(self, make_h5ad):
        ids = [f"ENSG{index:011d}.{index}" for index in range(25)]
        path = make_h5ad(COUNTS, genes=ids, var={"symbol": [f"ABC{index}" for index in range(25)]})
        found = described(path, quick=True)
        assert found["gene_names"]["with_version"] == 25
        assert found["gene_names"]["columns"] == [{"name": "symbol", "kind": "gene symbols", "species": "human"}]
        assert "gene_map=var:symbol" in found["problems"][0]
        path = make_h5ad(COUNTS, genes=["A1"] * 3 + [f"B{index}" for index in range(22)])
        found = described(path)
        assert found["gene_names"]["repeated"] == 1
        assert found["next"].endswith("duplicate_genes=sum") and "1 gene names repeat (e.g. A1)" in found["problems"][0]


class TestWhatIsKept:
    def test_it_is_what_the_chain_then_keeps(self, make_h5ad, tmp_path):
        """The survey counts in one pass what running the default chain leaves."""
        values = COUNTS.copy()
        values[4], values[:, 7], values[9, 1:], values[9, 0] = 0, 0, 0, 1
        for matrix in (sparse.csr_matrix(values), sparse.csc_matrix(values), values):
            source = open_source(make_h5ad(matrix))
            plain = survey(source, build_chain(default_transforms())).to_plain()
            report = build_chain(default_transforms()).run(source, None, tmp_path / "out.h5ad", {})
            out = anndata.read_h5ad(tmp_path / "out.h5ad")
            assert (plain["kept"]["cells"], plain["kept"]["genes"]) == out.shape
            assert plain["kept"]["share_of_counts"] == pytest.approx(report.share_of_counts, abs=1e-4)
            ran = [(entry.step, entry.cells, entry.genes) for entry in report.steps[:8]]
            assert [(entry["step"], entry["cells"], entry["genes"]) for entry in plain["kept"]["steps"]] == ran
        assert plain["cells_without_counts"] == 1 and plain["genes_without_counts"] == 1

    def test_totals_are_those_of_the_cells(self, make_h5ad):
        found = survey(open_source(make_h5ad(sparse.csr_matrix(COUNTS))), None)
        assert (found.totals == COUNTS.sum(1)).all() and (found.genes_found == (COUNTS > 0).sum(1)).all()
        assert (found.gene_totals == COUNTS.sum(0)).all() and found.steps == []

    def test_steps_after_the_first_that_must_see_all_cells_are_named(self, make_h5ad):
        steps = [
            {"transform_name": "FilterGenesTransform", "transform_args": {"min_cells": 3}},
            {"transform_name": "FilterCellsTransform", "transform_args": {"min_genes": 2}},
        ]
        plain = survey(open_source(make_h5ad(sparse.csr_matrix(COUNTS))), build_chain(steps)).to_plain()
        assert plain["kept"]["not_followed"] == ["FilterCells(min_genes=2)"]

    def test_quick_leaves_the_pass_out(self, make_h5ad):
        found = described(make_h5ad(sparse.csr_matrix(COUNTS)), quick=True)
        assert found["survey"] is None and found["next"].startswith("bmfm run ")


class TestNext:
    def test_counts_in_a_layer_or_in_raw_are_used(self, make_h5ad):
        path = make_h5ad(sparse.csr_matrix(LOGS), layers={"raw counts": sparse.csr_matrix(COUNTS)})
        found = described(path)
        assert found["next"] == f"bmfm run {path} label=celltype data_module.transform_kwargs.layer='raw counts'"
        assert "layer 'raw counts' holds counts" in found["problems"][0]
        assert found["survey"]["matrix"] == "layers/raw counts" and found["survey"]["kept"]["cells"] == 60
        path = make_h5ad(LOGS, raw=sparse.csr_matrix(COUNTS))
        assert described(path)["next"].endswith("data_module.transform_kwargs.layer=raw")
        assert described(path, "raw")["next"].endswith("data_module.transform_kwargs.layer=raw")

    def test_without_counts_the_file_is_to_be_mended(self, make_h5ad):
        found = described(make_h5ad(sparse.csr_matrix(LOGS)))
        assert "X is log-normalised; no layer of the file holds counts" in found["problems"][0]
        command = shlex.split(found["next"])[2:]
        assert command[1:] == ["label=celltype", "data_module.transform_kwargs.input_values=log_normalised"]
        overrides = [f"++{word}" for word in command[2:]]
        steps = compose("fine_tune_train_config", overrides).data_module.transform_kwargs.transforms
        names = [step.transform_name for step in steps]
        assert "BinTransform" in names and not {"NormalizeTotalTransform", "LogTransform"} & set(names)
        found = described(make_h5ad(sparse.csr_matrix(LOGS - LOGS.mean(0))))
        assert found["next"].startswith("mend the file, then: bmfm data inspect ") and found["survey"] is None

    def test_swapped_cells_and_genes_come_first(self, make_h5ad):
        genes = ["MT-CO1", "ACTB", *(f"RPL{index}" for index in range(23))]
        cells = [f"{'ACGT' * 4}-{index}" for index in range(60)]
        found = described(make_h5ad(COUNTS.T, obs={}, cells=genes, genes=cells))
        assert "cells and genes look swapped" in found["problems"][0] and found["next"].startswith("mend the file")

    @pytest.mark.parametrize("shape", [(0, 25), (60, 0)])
    def test_an_empty_file_is_said_to_be_empty(self, make_h5ad, shape):
        found = described(make_h5ad(sparse.csr_matrix(shape, dtype=np.float32), obs={}))
        assert f"the file has no {'cells' if shape[0] == 0 else 'genes'}" in found["problems"][0]
        assert found["next"].startswith("mend the file")

    def test_a_rare_class_is_kept_in_training(self, make_h5ad):
        labels = ["A"] * 30 + ["B"] * 29 + ["C"]
        found = described(make_h5ad(sparse.csr_matrix(COUNTS), obs={"celltype": labels}))
        assert "1 classes of celltype have fewer than 3 cells (e.g. 'C')" in found["problems"][0]
        assert found["next"].endswith("data_module.transform_kwargs.split.rare_classes=train")

    def test_repeated_cell_names_and_values_that_only_a_whole_pass_meets(self, make_h5ad, monkeypatch):
        from bmfm_pipeline.data.sources import matrix_facts as module

        found = described(make_h5ad(sparse.csr_matrix(COUNTS), cells=["a"] * 2 + [f"c{index}" for index in range(58)]))
        assert "1 cell names repeat (e.g. a)" in found["problems"][0] and found["next"].startswith("mend the file")
        monkeypatch.setattr(module, "PART", 5)
        values = sparse.csr_matrix(COUNTS)
        values.data[100:102] = (np.nan, -1)
        found = described(make_h5ad(values))
        assert found["problems"][:2] == [
            "X: 1 values are NaN or infinite, among counts; it cannot be used before that is mended",
            "X: 1 values are below zero, among counts; it cannot be used before that is mended",
        ]
        assert found["next"].startswith("mend the file")

    def test_a_file_without_obs_columns_is_for_pretraining(self, make_h5ad):
        path = make_h5ad(sparse.csr_matrix(COUNTS), obs={})
        assert described(path)["next"] == f"bmfm run {path}"
