"""PanglaoDB: studies chosen by their table, converted in the workspace, split by study, aligned, and set aside where damaged."""

import os
import pickle
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import yaml
from r_files import rdata_bytes

from bmfm_pipeline import compose
from bmfm_pipeline.errors import ConfigError, DataError
from bmfm_pipeline.stages import conversion
from bmfm_pipeline.stages.fanning import spread_by
from bmfm_pipeline.stages.inputs import find_source
from bmfm_pipeline.stages.planning import plan_stage
from bmfm_pipeline.stages.running import run_stage
from bmfm_pipeline.storage import read_json

KWARGS = "data_module.transform_kwargs"
HUMAN, MOUSE = "Homo sapiens", "Mus musculus"
# The block of the user's document, verbatim.
BLOCK = """
data_module:
  _target_: bmfm_targets.datasets.panglaodb.PanglaoDBDataModule
  _partial_: true
  num_workers: 8
  mlm: true
  collation_strategy: "language_modeling"
  batch_size: 2
  transform_datasets: false
  dataset_kwargs:
    data_dir: ${oc.env:BMFM_TARGETS_PANGLAO_DATA}
    data_info_path: ${oc.env:BMFM_TARGETS_PANGLAO_METADATA}
    filter_query: 'Species == "Homo sapiens"'
    num_workers: 8
    convert_rdata_to_h5ad: false
"""


@pytest.fixture(autouse=True)
def _one_tracking_store(state, monkeypatch):
    monkeypatch.setenv("BMFM_STATE", str(state))


@pytest.fixture
def studies(tmp_path, monkeypatch):
    """Five human studies of ten cells each, one with two files; a mouse study; a file without a row; a row without a file."""
    folder, rows = tmp_path / "panglao" / "rdata", []
    folder.mkdir(parents=True)
    names = [("SRA1", "SRS1"), ("SRA1", "SRS2"), ("SRA2", "SRS3"), ("SRA3", "SRS4"), ("SRA4", "SRS5"), ("SRA5", "SRS6")]
    for number, (study, sample) in enumerate([*names, ("SRA8", "SRS8"), ("SRA9", "SRS9")]):
        generator = np.random.default_rng(number)
        # Files have different genes, and one symbol under two ids: which of them comes first differs.
        genes = [f"G{gene}_ENSG{gene:011d}.{number}" for gene in generator.permutation(20)[:12]]
        genes += [f"TWICE_ENSG{(1, 2)[(number + part) % 2]:011d}.1" for part in (0, 1)]
        counts = generator.poisson(2.0, (len(genes), 10)) + generator.choice([0, 0.5], (len(genes), 10))
        cells = [f"cell{cell}" for cell in range(10)]
        (folder / f"{study}_{sample}.sparse.RData").write_bytes(rdata_bytes({"sm": (counts, genes, cells)}))
        rows.append([study, sample, MOUSE if study == "SRA8" else HUMAN, "\\N" if number == 0 else number])
    rows = [row for row in rows if row[0] != "SRA9"] + [["SRA7", "SRS7", HUMAN, 1], ["SRA7", "notused", HUMAN, 1]]
    columns = ["SRA Accession", "SRS Accession", "Species", "Number of Cell Clusters"]
    pd.DataFrame(rows, columns=columns).to_csv(tmp_path / "metadata.csv", index=False)
    monkeypatch.setenv("BMFM_TARGETS_PANGLAO_DATA", str(folder.parent))
    monkeypatch.setenv("BMFM_TARGETS_PANGLAO_METADATA", str(tmp_path / "metadata.csv"))
    return folder


def preprocess(*words, **options) -> Path:
    (job,) = plan_stage("preprocess", "panglaodb", overrides=words, **options)
    return Path(run_stage(job)["uri"])


def test_files_are_chosen_converted_and_split_by_study(studies, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in studies.parent.rglob("*")}
    studies.chmod(0o555), studies.parent.chmod(0o555)
    try:
        folder = preprocess()
    finally:
        studies.chmod(0o755), studies.parent.chmod(0o755)
    assert {path: path.stat().st_mtime_ns for path in studies.parent.rglob("*")} == before
    cells = anndata.read_h5ad(folder / "processed.h5ad")
    assert cells.n_obs == 60 and set(cells.obs["Species"]) == {HUMAN}
    assert cells.obs_names[0] == "SRA1_SRS1:cell0" and cells.obs["Number of Cell Clusters"].isna().sum() == 10
    by_study = cells.obs.groupby("SRA Accession", observed=True)[read_json(folder / "split.json")["column"]].nunique()
    assert (by_study == 1).all() and len(by_study) == 5
    # Aligned by name: a gene that a file lacks is zero there, and one symbol is one column whichever id came first.
    assert (
        "TWICE" in cells.var_names
        and cells.var_names.is_unique
        and all("_ENSG" not in name for name in cells.var_names)
    )
    found = read_json(folder / "report.json")["files"]
    counted = {
        name: found["selection"][name]
        for name in ("rows", "chosen", "outside_query", "without_file", "without_row", "not_used")
    }
    assert counted == {"rows": 9, "chosen": 6, "outside_query": 1, "without_file": 1, "without_row": 1, "not_used": 1}
    assert found["selection"]["without_row_examples"] == ["SRA9_SRS9"] and found["set_aside"] == []
    assert all(row["share_of_counts_kept"] == 1 and row["cells_kept"] == 10 for row in found["files"])
    assert any("none of the 6 files holds whole counts" in note for note in found["notes"])


def test_a_conversion_is_done_once_and_in_pieces_that_travel(studies, monkeypatch):
    monkeypatch.setattr(conversion, "MOST_PIECES", 3)
    pieces = []

    def elsewhere(function, items, names):
        pieces.extend(names)
        return [pickle.loads(pickle.dumps(function))(pickle.loads(pickle.dumps(item))) for item in items]

    with spread_by(elsewhere):
        preprocess("seed.seed_value=5")
    assert pieces[:3] == [
        "convert SRA1_SRS1 and 1 more",
        "convert SRA2_SRS3 and 1 more",
        "convert SRA4_SRS5 and 1 more",
    ]

    def refuse(*arguments):
        raise AssertionError("converted again")

    monkeypatch.setattr(conversion, "_convert", refuse)
    preprocess("seed.seed_value=6")


def test_a_damaged_file_is_set_aside_up_to_a_share(studies):
    path = studies / "SRA3_SRS4.sparse.RData"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(
        DataError,
        match=r"1 of 6 files cannot be used, and 10% may be set aside(.|\n)*SRA3_SRS4: is damaged or cut short",
    ):
        preprocess()
    folder = preprocess(f"{KWARGS}.max_share_of_files_set_aside=0.2")
    (entry,) = read_json(folder / "report.json")["files"]["set_aside"]
    assert entry["file"] == "SRA3_SRS4" and entry["path"] == str(path)
    assert read_json(folder / "artefact.json")["summary"]["files_set_aside"] == 1


def test_a_changed_table_makes_other_data(studies, monkeypatch):
    key = plan_stage("preprocess", "panglaodb")[0].key
    assert plan_stage("preprocess", "panglaodb", overrides=[f"{KWARGS}.num_workers=3"])[0].key == key
    table = Path(os.environ["BMFM_TARGETS_PANGLAO_METADATA"])
    table.write_text(table.read_text().replace("SRA5,SRS6,Homo sapiens", "SRA5,SRS6,Mus musculus"))
    assert plan_stage("preprocess", "panglaodb")[0].key != key


def test_the_block_of_the_users_document_is_followed(studies, tmp_path):
    (tmp_path / "mine.yaml").write_text(f"defaults: [pre_train_config, _self_]\n{BLOCK}")
    run = compose("mine", config_dir=tmp_path)
    settings = run.data_module
    assert run.dataset == "panglaodb" and settings.transform_datasets and settings.batch_size == 2
    assert (
        settings.transform_kwargs.files.query == 'Species == "Homo sapiens"'
        and settings.transform_kwargs.num_workers == 8
    )
    assert list(find_source(run).files) == [
        "SRA1_SRS1",
        "SRA1_SRS2",
        "SRA2_SRS3",
        "SRA3_SRS4",
        "SRA4_SRS5",
        "SRA5_SRS6",
    ]
    block = yaml.safe_load(BLOCK)
    block["data_module"]["dataset_kwargs"] |= {
        "filter_query": "Species == 'x'",
        "post_transforms": [{"transform_name": "LogTransform"}],
    }
    (tmp_path / "other.yaml").write_text("defaults: [pre_train_config, _self_]\n" + yaml.safe_dump(block))
    run = compose("other", config_dir=tmp_path)
    assert run.data_module.transform_kwargs.transforms[-1].transform_name == "LogTransform"
    with pytest.raises(DataError, match="none of 8 files is chosen"):
        find_source(run)


def test_what_is_missing_is_said(studies, monkeypatch):
    with pytest.raises(ConfigError, match="the table has no column 'species'; did you mean 'Species'"):
        find_source(compose("pre_train_config", ["dataset=panglaodb", f"+{KWARGS}.files.query=\"species == 'x'\""]))
    with pytest.raises(ConfigError, match="has no column SRX; its columns are SRA Accession"):
        find_source(compose("pre_train_config", ["dataset=panglaodb", f"+{KWARGS}.files.name='{{SRX}}'"]))
    monkeypatch.delenv("BMFM_TARGETS_PANGLAO_METADATA")
    with pytest.raises(ConfigError, match="BMFM_TARGETS_PANGLAO_METADATA is not set"):
        find_source(compose("pre_train_config", ["dataset=panglaodb"]))
    for path in studies.iterdir():
        path.unlink()
    with pytest.raises(DataError, match="no file fits this pattern"):
        find_source(compose("pre_train_config", ["dataset=panglaodb"]))


@pytest.mark.skipif(not os.environ.get("BMFM_DATA_DIR"), reason="BMFM_DATA_DIR names no folder of real data")
def test_the_real_files_without_the_mouse_study(tmp_path, monkeypatch):
    folder = Path(os.environ["BMFM_DATA_DIR"]) / "panglao"
    names = [path.name.split(".")[0].split("_") for path in sorted((folder / "rdata").iterdir())]
    rows = [[*name, MOUSE if name[0] == "SRA578634" else HUMAN] for name in names]
    pd.DataFrame(rows, columns=["SRA Accession", "SRS Accession", "Species"]).to_csv(tmp_path / "all.csv", index=False)
    monkeypatch.setenv("BMFM_TARGETS_PANGLAO_DATA", str(folder))
    monkeypatch.setenv("BMFM_TARGETS_PANGLAO_METADATA", str(tmp_path / "all.csv"))
    cells = anndata.read_h5ad(preprocess() / "processed.h5ad")
    assert cells.obs["file"].nunique() == 10 and 490 <= cells.n_obs <= 500
    assert {"ACTB", "MALAT1"} <= set(cells.var_names)
