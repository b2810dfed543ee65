"""Vocabularies of the preprocess stage: fixed on training cells, with tokens to prepend, from a folder or a gene table."""

import json
import shutil
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from bmfm_pipeline.config import RunConfig, compose
from bmfm_pipeline.errors import ConfigError, DataError
from bmfm_pipeline.stages import plan_stage, run_stage
from bmfm_pipeline.stages.vocabularies import complete_vocabularies, fixed_vocabularies, make_vocabularies
from bmfm_pipeline.training import build_data_module
from bmfm_pipeline.vocabulary import MultiFieldVocabulary, build_vocabularies

GENES = ["CD3D", "LYZ", "MS4A1", "NKG7", "ACTB", "MALAT1", "GNLY", "FCGR3A", "CST3", "PPBP"]
DYNAMIC = "++fields.1.vocab_update_strategy=dynamic"


@pytest.fixture
def cells(tmp_path) -> Path:
    """Counts of at most 60 in the training cells; one test cell has 90, one dev cell 70."""
    counts = np.random.default_rng(0).poisson(2.0, (60, len(GENES))).astype(np.float32)
    counts[0, 0], counts[58, 1], counts[50, 2] = 60, 90, 70
    obs = pd.DataFrame({"fold": ["train"] * 40 + ["dev"] * 15 + ["test"] * 5}, index=[f"c{row}" for row in range(60)])
    file = tmp_path / "cells.h5ad"
    anndata.AnnData(sparse.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=GENES)).write_h5ad(file)
    return file


@pytest.fixture
def processed(cells, tmp_path) -> Path:
    """The cells as a processed file with static vocabularies beside it."""
    folder = tmp_path / "processed"
    build_vocabularies(GENES).save(folder)
    shutil.copyfile(cells, folder / "processed.h5ad")
    (folder / "vocabulary.json").write_text("{}")
    return folder


def run_of(*overrides: str) -> RunConfig:
    return compose("pre_train_config", ["dataset=zheng68k-mini", "preset=none", *overrides])


def test_the_stage_fixes_a_dynamic_vocabulary_on_training_cells_and_later_values_are_counted_as_unknown(cells):
    overrides = ["data_module.transform_kwargs.transforms=[]", "data_module.transform_kwargs.split_column_name=fold"]
    job = plan_stage(
        "preprocess", str(cells), overrides=[*overrides, DYNAMIC, "tokenizer.prepend_tokens=['[CLS_0]','[CLS_1]']"]
    )[-1]
    folder = Path(run_stage(job)["uri"])
    vocabularies = MultiFieldVocabulary.load(folder)
    assert vocabularies["expressions"].tokens[-1] == "60" and len(vocabularies["expressions"]) == 7 + 61
    report = json.loads((folder / "report.json").read_text())["vocabulary"]
    assert report["added_values"] == {"expressions": 11} and report["tokens"]["expressions"] == 68
    data = build_data_module(RunConfig.model_validate(job.config), folder)
    data.setup()
    batches = [batch for loader in (data.val_dataloader(), data.test_dataloader()) for batch in loader]
    assert all((batch["input_ids"][:, :, :2].numpy() == [5, 6]).all() for batch in batches)
    assert data.builder.report.values_outside_vocabulary == 2
    for _ in data.train_dataloader():
        pass
    assert data.builder.report.values_outside_vocabulary == 2


@pytest.mark.parametrize(
    ("overrides", "tokens", "added"),
    [
        ([], 5 + 50, {}),
        ([DYNAMIC], 5 + 61, {"expressions": 11}),
        ([DYNAMIC, "data_module.transform_kwargs.fit_on=all"], 5 + 91, {"expressions": 41}),
    ],
)
def test_values_of_a_static_and_a_dynamic_vocabulary(processed, overrides, tokens, added):
    assert complete_vocabularies(run_of(*overrides), processed, "fold") == added
    assert len(MultiFieldVocabulary.load(processed)["expressions"]) == tokens


def test_values_that_no_vocabulary_should_hold_are_refused(processed):
    stored = anndata.read_h5ad(processed / "processed.h5ad")
    stored.X[3, 3] = 123_456
    stored.write_h5ad(processed / "processed.h5ad")
    with pytest.raises(DataError, match=r"fields\.expressions: .*values reach 123456.*BinTransform"):
        complete_vocabularies(run_of(DYNAMIC), processed, "fold")


def test_dynamic_genes_are_added_to_those_of_a_folder():
    run = run_of("tokenizer.identifier=/folder", "++fields.0.vocab_update_strategy=dynamic")
    vocabularies, summary = make_vocabularies(run, GENES, None, build_vocabularies(GENES[:4]))
    found = vocabularies["genes"]
    assert found.ids(GENES).tolist() == [5, 6, 7, 8, *range(11, 17)] and found.ids(["[S]", "[T]"]).tolist() == [9, 10]
    assert (summary["unknown"], summary["added_genes"]) == (0, 6)
    _, summary = make_vocabularies(run_of("tokenizer.identifier=/folder"), GENES, None, build_vocabularies(GENES[:4]))
    assert (summary["known"], summary["unknown"]) == (4, 6)


def test_a_folder_without_the_tokens_or_without_genes_is_refused(tmp_path):
    build_vocabularies(GENES).save(tmp_path / "folder")
    run = run_of(f"tokenizer.identifier={tmp_path / 'folder'}", "tokenizer.prepend_tokens=['[CLS_0]']")
    with pytest.raises(DataError, match=r"the vocabulary of '\w+' has no \[CLS_0\]"):
        make_vocabularies(run, GENES, None, fixed_vocabularies(run))
    dna = MultiFieldVocabulary({"dna_chunks": build_vocabularies(GENES)["genes"]})
    with pytest.raises(DataError, match="has vocabularies of dna_chunks, none of genes"):
        make_vocabularies(run, GENES, None, dna)


def test_the_vocabulary_of_a_gene_table(data_dir):
    run, table = run_of("tokenizer.identifier=hgnc_protein_coding"), data_dir / "genes" / "hgnc_complete_set.zip"
    vocabularies, summary = make_vocabularies(run, GENES, None, fixed_vocabularies(run, 10, table=table))
    assert 19_000 < len(vocabularies["genes"]) < 19_500 and len(vocabularies["expressions"]) == 15
    assert (summary["unknown"], summary["unknown_examples"]) == (1, ["MALAT1"])
    every = run_of("tokenizer.identifier=hgnc")
    assert every.key_view("preprocess") != run.key_view("preprocess")
    with pytest.raises(ConfigError, match=r"gene_names\.table=hgnc after `bmfm genes download`"):
        fixed_vocabularies(every)
