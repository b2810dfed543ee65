"""Gene names of real files in the preprocess stage: what is matched, what stops it, and what enters the key."""

import json
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from gene_files import write_hgnc, write_orthologs
from scipy import sparse

from bmfm_pipeline import cli
from bmfm_pipeline.config import RunConfig, compose
from bmfm_pipeline.data.sources import check_source, open_source
from bmfm_pipeline.data.transforms import Chain, build_chain
from bmfm_pipeline.errors import ConfigError, DataError
from bmfm_pipeline.stages.gene_names import chain_steps, check_gene_names
from bmfm_pipeline.stages.gene_tables import downloaded_table
from bmfm_pipeline.stages.labels import lost_classes
from bmfm_pipeline.stages.planning import plan_stage
from bmfm_pipeline.storage import read_json
from bmfm_pipeline.vocabulary import build_vocabularies

GENE_NAMES = "data_module.transform_kwargs.gene_names"


def report_of(path, *words):
    """The gene report of a file, as the check step makes it."""
    run = compose(
        "fine_tune_train_config",
        ["dataset=null", "label_columns=[]", f"data_module.transform_kwargs.source_h5ad_file_name={path}", *words],
    )
    cells = open_source(path)
    totals = check_source(cells, duplicate_genes="sum")["gene_totals"]
    return check_gene_names(run, build_chain(chain_steps(run)), cells, totals, {})


@pytest.fixture(scope="module")
def hgnc(tmp_path_factory):
    import os

    folder = os.environ.get("BMFM_DATA_DIR")
    if not folder or not Path(folder).is_dir():
        pytest.skip("real data: $BMFM_DATA_DIR is not set to a folder")
    return Path(folder) / "genes" / "hgnc_complete_set.zip"


@pytest.fixture
def cells_of(tmp_path):
    """cells_of(names, name=...) -> path of an h5ad with 60 cells of these genes."""

    def make(names, name="cells.h5ad", var=None):
        counts = np.random.default_rng(0).poisson(2.0, (60, len(names))).astype(np.float32)
        counts[:, 0] += 1
        cells = anndata.AnnData(
            sparse.csr_matrix(counts),
            obs=pd.DataFrame({"celltype": ["A", "B", "C"] * 20}, index=[f"c{row}" for row in range(60)]),
            var=pd.DataFrame(var or {}, index=pd.Index(names, dtype=object)),
        )
        cells.write_h5ad(tmp_path / name)
        return tmp_path / name

    return make


class TestRealFiles:
    def test_ensembl_ids(self, data_dir, hgnc):
        path = data_dir / "onek1k" / "onek1k_7811x1000_counts.h5ad"
        vocabulary = f"tokenizer.identifier={data_dir / 'tokenizers' / 'gene2vec'}"
        with pytest.raises(DataError) as caught:
            report_of(path, vocabulary)
        for word in (
            "knows none of the 1000 gene names",
            "human Ensembl ids",
            "bmfm genes download",
            "ENSG00000251562: 30.2%",
        ):
            assert word in str(caught.value)
        found = report_of(path, vocabulary, f"{GENE_NAMES}.table={hgnc}").to_dict()
        assert found["genes_known"] == 881 and found["share_of_counts_kept"] > 0.99
        assert found["categories"]["renamed"]["how"] == {"ensembl": 881}

    def test_compounds_and_older_symbols(self, data_dir, hgnc):
        found = report_of(data_dir / "scp1884" / "scp1884.h5ad", f"{GENE_NAMES}.table={hgnc}").to_dict()
        how = found["categories"]["renamed"]["how"]
        assert how["compound"] >= 20 and how["previous"] > 400 and found["categories"]["merged"]["names"] > 20
        assert found["categories"]["ambiguous"]["names"] == 3 and found["share_of_counts_kept"] > 0.99
        assert sum(entry["names"] for entry in found["categories"].values()) == 18708

    def test_older_symbols_meet_a_vocabulary_of_another_age(self, data_dir, hgnc):
        path = data_dir / "zheng_sorted" / "zheng_sorted_counts.h5ad"
        vocabulary = f"tokenizer.identifier={data_dir / 'tokenizers' / 'protein_coding'}"
        without, found = (report_of(path, vocabulary, *more) for more in ((), (f"{GENE_NAMES}.table={hgnc}",)))
        assert len(without.of("matched")) + len(without.of("renamed")) == 12616
        assert len(found.of("matched")) + len(found.of("renamed")) > 13000
        assert found.share_of_counts > without.share_of_counts > 0.9
        renamed = {fate.name: fate.target for fate in found.of("renamed")}
        assert renamed["GNB2L1"] == "RACK1"


class TestWhatStops:
    def test_mouse_data_against_a_human_vocabulary(self, cells_of, tmp_path):
        names = ["Cd3d", "Cd3e", "Cd19", "Actb", "Rack1", "Septin2", "Marchf1", "Malat1"]
        build_vocabularies([name.upper() for name in names], 10).save(tmp_path / "human")
        for table in ((), (f"{GENE_NAMES}.table={write_hgnc(tmp_path)}",)):
            with pytest.raises(DataError) as caught:
                report_of(cells_of(names), f"tokenizer.identifier={tmp_path / 'human'}", *table)
            for word in (
                "knows none of the 8 gene names",
                "look like mouse gene symbols",
                "these are mouse genes: name a table",
            ):
                assert word in str(caught.value)
        mapped = report_of(
            cells_of(["Cd3d", "Cd3e", "Actb", "Actb2"]),
            f"tokenizer.identifier={tmp_path / 'human'}",
            f"{GENE_NAMES}.orthologs={write_orthologs(tmp_path)}",
            "data_module.map_orthologs=mouse_to_human_orthologs",
        )
        assert [fate.category for fate in mapped.fates] == ["renamed", "renamed", "renamed", "merged"]

    def test_no_gene_in_common_points_to_a_column_that_has_names(self, cells_of, tmp_path):
        build_vocabularies(["CD3D", "CD19"], 10).save(tmp_path / "known")
        path = cells_of([f"probe{i}" for i in range(6)], var={"symbol": [f"GENE{i}" for i in range(6)]})
        with pytest.raises(DataError, match=r"var has a column 'symbol'.*gene_map=var:symbol"):
            report_of(path, f"tokenizer.identifier={tmp_path / 'known'}", f"{GENE_NAMES}.min_share_of_counts=0")

    def test_below_the_floor(self, cells_of, tmp_path):
        build_vocabularies(["CD3D", "CD19"], 10).save(tmp_path / "known")
        path, words = cells_of(["CD3D", "X1", "X2", "X3"]), f"tokenizer.identifier={tmp_path / 'known'}"
        with pytest.raises(
            DataError, match=r"knows 1 of the 4 gene names, which hold \d+\.\d% of the counts; at least 50%"
        ):
            report_of(path, words)
        assert report_of(path, words, f"{GENE_NAMES}.min_share_of_counts=0.1").share_of_counts > 0.2

    def test_a_table_that_is_not_there(self, monkeypatch, tmp_path, cells_of):
        monkeypatch.setenv("BMFM_CACHE_DIR", str(tmp_path / "cache"))
        with pytest.raises(ConfigError, match="run `bmfm genes download`"):
            report_of(cells_of(["CD3D"]), f"{GENE_NAMES}.table=hgnc")

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["data_module.limit_genes=protein_coding"], "needs a gene table; run `bmfm genes download`"),
            (["data_module.map_orthologs=mouse_to_human_orthologs"], "needs a table of mouse and human genes"),
            ([f"{GENE_NAMES}.duplicates=rename"], "duplicates"),
            ([f"{GENE_NAMES}.ortholog_columns=[a,b]"], "orthologs is not set"),
            ([f"+{GENE_NAMES}.tabel=x"], "did you mean 'table'"),
        ],
    )
    def test_settings_that_cannot_be(self, words, said):
        with pytest.raises(ConfigError, match=said):
            compose("fine_tune_train_config", words)


def test_a_class_whose_cells_all_lose_their_genes_is_named(tmp_path):
    counts = np.zeros((6, 2), dtype=np.float32)
    counts[:3, 0], counts[3:, 1] = 2, 3
    labels = {"celltype": ["T", "B", "B", "NK", "NK", "B"]}
    cells = anndata.AnnData(sparse.csr_matrix(counts), obs=pd.DataFrame(labels, index=[*"abcdef"]))
    cells.var_names = ["CD3D", "GNLY"]
    cells.write_h5ad(tmp_path / "cells.h5ad")
    source = open_source(tmp_path / "cells.h5ad")
    steps = [{"transform_name": "RenameGenesTransform", "transform_args": {"gene_map": {"CD3D": "CD3D"}}}]
    build_chain(steps).run(source, None, tmp_path / "processed.h5ad", {})
    run = compose("fine_tune_train_config", ["label_columns=[{label_column_name: celltype}]"])
    assert lost_classes(run, source.obs, tmp_path / "processed.h5ad") == {"celltype": {"NK": 2}}


def preprocess(capsys, path, *words) -> tuple[int, dict, str]:
    code = cli.main(["preprocess", str(path), "label=celltype", *map(str, words), "--json"])
    captured = capsys.readouterr()
    return code, json.loads(captured.out.splitlines()[-1]), captured.err


@pytest.mark.filterwarnings("ignore:.*names are not unique")
def test_the_artefact_reports_and_its_chain_takes_other_namings(cells_of, tmp_path, capsys):
    names = ["CD3D", "GNB2L1", "RACK1", "1-Mar", "2-Sep", "mine", "CD3D"]
    path = cells_of(names)
    given = anndata.read_h5ad(path).X.toarray()
    table = write_hgnc(tmp_path)
    code, found, said = preprocess(
        capsys, path, f"{GENE_NAMES}.table={table}", "data_module.limit_genes=protein_coding"
    )
    assert code == 0 and "made dates by a spreadsheet: 1-Mar -> MARCHF1; 2-Sep -> SEPTIN2" in said
    folder = Path(found["artefacts"]["preprocess"])
    report = read_json(folder / "gene_report.json")
    assert {name: entry["names"] for name, entry in report["categories"].items()} == {
        "matched": 2, "renamed": 2, "merged": 2, "ambiguous": 0, "unknown": 1, "dropped": 0
    }  # fmt: skip
    assert report["spreadsheet"]["examples"] == ["1-Mar -> MARCHF1", "2-Sep -> SEPTIN2"]
    assert report["tables"].keys() == {"gene_table"} and read_json(folder / "report.json")["gene_names"] == report
    processed = anndata.read_h5ad(folder / "processed.h5ad")
    np.testing.assert_array_equal(processed[:, "CD3D"].layers["counts"].toarray().ravel(), given[:, 0] + given[:, 6])
    assert set(processed.var_names) == {"CD3D", "RACK1", "MARCHF1", "SEPTIN2", "mine"}
    assert (folder / "gene_names.csv").read_text().count("\n") == 8
    from bmfm_pipeline.training.prepared import PreparedData

    options = PreparedData(folder).builder_options(RunConfig.model_validate(read_json(folder / "run_config.json")))
    allowed = dict(zip(processed.var_names, options["tables"].allowed.tolist(), strict=True))
    assert allowed == {"CD3D": True, "RACK1": True, "MARCHF1": True, "SEPTIN2": True, "mine": False}
    table.unlink()
    chain = Chain.from_json(read_json(folder / "transforms.json"))
    applied = chain.apply_to_cells(sparse.csr_matrix(np.ones((1, 2))), ["ENSG00000167286", "SEPT2"])
    assert applied.gene_names == ["CD3D", "SEPTIN2"]


def test_the_content_of_a_table_enters_the_key_and_its_place_does_not(cells_of, tmp_path):
    path = cells_of(["CD3D", "ACTB"])
    (tmp_path / "other").mkdir()
    tables = [write_hgnc(tmp_path), write_hgnc(tmp_path / "other")]

    def key(*words) -> str:
        return plan_stage("preprocess", str(path), overrides=words, workspace=str(tmp_path / "w"))[0].key

    keys = [key(f"{GENE_NAMES}.table={table}") for table in tables]
    assert keys[0] == keys[1] != key()
    tables[1].write_text(tables[1].read_text() + "HGNC:99\tNEW1\tx\tx\tApproved\t\t\t\n")
    assert key(f"{GENE_NAMES}.table={tables[1]}") != keys[0]
    assert key(f"{GENE_NAMES}.table={tables[0]}", f"{GENE_NAMES}.duplicates=highest") != keys[0]


def test_a_table_in_the_cache_changes_nothing_unless_it_is_named(cells_of, tmp_path, monkeypatch):
    monkeypatch.setenv("BMFM_CACHE_DIR", str(tmp_path / "cache"))
    path = cells_of(["CD3D", "GNB2L1"])
    before = plan_stage("preprocess", str(path), workspace=str(tmp_path / "w"))[0].key
    downloaded_table().parent.mkdir(parents=True)
    write_hgnc(downloaded_table().parent)
    assert plan_stage("preprocess", str(path), workspace=str(tmp_path / "w"))[0].key == before
    assert [fate.category for fate in report_of(path).fates] == ["matched", "matched"]
    assert [fate.category for fate in report_of(path, f"{GENE_NAMES}.table=hgnc").fates] == ["matched", "renamed"]
