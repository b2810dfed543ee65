"""Several h5ad files in the preprocess stage: joined, counted file by file, and set aside where they cannot be used."""

import json
import shutil
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import yaml
from gene_files import write_hgnc
from scipy import sparse

from bmfm_pipeline import cli
from bmfm_pipeline.config import compose
from bmfm_pipeline.data.transforms import Chain
from bmfm_pipeline.errors import ConfigError, DataError, StorageError
from bmfm_pipeline.stages.inputs import find_source
from bmfm_pipeline.stages.planning import plan_stage
from bmfm_pipeline.stages.running import run_stage
from bmfm_pipeline.stages.several_files import said_once
from bmfm_pipeline.storage import read_json

KWARGS = "data_module.transform_kwargs"
GENE_NAMES = f"{KWARGS}.gene_names"
SYMBOLS = ["CD3D", "CD3E", "CD19", "ACTB", "RACK1", "MALAT1", "POU5F1", "SEPTIN2"]
ENSEMBL = [
    "ENSG00000167286", "ENSG00000198851", "ENSG00000177455", "ENSG00000075624", "ENSG00000204628", "ENSG00000251562",
    "ENSG00000204531", "ENSG00000168385",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _one_tracking_store(state, monkeypatch):
    """All runs of this module are tracked in one place, for making another takes longer than a run."""
    monkeypatch.setenv("BMFM_STATE", str(state))


@pytest.fixture
def write(tmp_path):
    """write(name, genes=..., seed=..., change=...) -> path of 30 cells in tmp_path/studies, named after the file."""

    def make(name, genes=SYMBOLS, seed=0, cells=None, change=None, obs=None):
        counts = np.random.default_rng(seed).poisson(2.0, (30, len(genes))).astype(np.float32)
        counts[:, 0] += 1
        table = anndata.AnnData(
            sparse.csr_matrix(counts),
            obs=pd.DataFrame(obs or {"celltype": ["A", "B", "C"] * 10}, index=cells or [f"{name}-{row}" for row in range(30)]),
            var=pd.DataFrame(index=pd.Index(genes, dtype=object)),
        )  # fmt: skip
        if change is not None:
            change(table)
        path = tmp_path / "studies" / f"{name}.h5ad"
        path.parent.mkdir(exist_ok=True)
        table.write_h5ad(path)
        return path

    return make


def preprocess(target, *words, label="celltype") -> Path:
    """The folder of the artefact."""
    (job,) = plan_stage("preprocess", str(target), label=label, overrides=[f"{KWARGS}.transforms=[]", *words])
    return Path(run_stage(job)["uri"])


def source_of(*names, words=()):
    listed = json.dumps([str(name) for name in names]) if len(names) > 1 else json.dumps(str(names[0]))
    run = compose("fine_tune_train_config", ["dataset=null", f"{KWARGS}.source_h5ad_file_name={listed}", *words])
    return find_source(run)


def negative(cells) -> None:
    cells.X.data[:2] = -1


def logged(cells) -> None:
    cells.X.data = np.log1p(cells.X.data)


class TestWhichFiles:
    def test_a_folder_a_pattern_and_a_list(self, write, tmp_path):
        paths = {name: str(write(name)) for name in ("b", "a", "c")}
        (tmp_path / "studies" / "notes.txt").write_text("x")
        expected = {name: paths[name] for name in "abc"}
        for named in ([tmp_path / "studies"], [tmp_path / "studies" / "*.h5ad"], [paths["c"], paths["a"], paths["b"]]):
            assert list(source_of(*named).files.items()) == list(expected.items())
        assert source_of(paths["a"]).files == {} and list(
            source_of(paths["a"], words=[f"{KWARGS}.cell_names=prefix"]).files
        ) == ["a"]

    def test_files_of_one_name_are_told_by_their_folders(self, write, tmp_path):
        path = write("counts")
        for study in ("GSM1", "GSM2"):
            (tmp_path / study).mkdir()
            shutil.copy(path, tmp_path / study / "counts.h5ad")
        assert list(source_of(tmp_path / "GSM*" / "*.h5ad").files) == ["GSM1/counts", "GSM2/counts"]

    def test_what_cannot_be_a_set_of_files(self, write, tmp_path):
        path = write("a")
        (tmp_path / "empty").mkdir()
        (tmp_path / "studies" / "notes.txt").write_text("x")
        refused = {
            (tmp_path / "absent.h5ad", path): r"absent\.h5ad: no such file",
            (tmp_path / "empty", path): "empty: is a folder that holds no h5ad file.*it holds nothing",
            (tmp_path / "*.nothing",): "no file fits this pattern",
            (tmp_path / "studies" / "*",): r"notes\.txt: is no h5ad file by its name \(1 of 2\).*narrow",
            (path, tmp_path / "studies" / "notes.txt"): r"notes\.txt: is no h5ad file by its name.*take it out",
            (path, tmp_path / "studies"): r"a\.h5ad: is named twice",
        }
        for names, words in refused.items():
            with pytest.raises(DataError, match=words):
                source_of(*names)
        with pytest.raises(ConfigError, match="patterns stand for local files"):
            source_of("s3://bucket/*.h5ad")
        with pytest.raises(ConfigError, match="the list is empty"):
            compose("fine_tune_train_config", [f"{KWARGS}.source_h5ad_file_name=[]"])
        with pytest.raises(ConfigError, match="made from no file"):
            find_source(compose("fine_tune_train_config", ["dataset=zheng68k-mini", f"{KWARGS}.cell_names=prefix"]))

    def test_a_folder_without_h5ad_files_is_refused_by_the_command_line(self, tmp_path, capsys):
        (tmp_path / "notes").mkdir()
        (tmp_path / "notes" / "read.me").write_text("later\n")
        assert cli.main(["plan", str(tmp_path / "notes")]) == 2
        assert "notes: is a folder; name an h5ad file in it" in capsys.readouterr().err

    def test_a_dataset_of_the_catalogue(self, write, tmp_path, monkeypatch, capsys):
        write("a")
        write("b")
        entry = {"name": "mine", "title": "t", "source": {"file": "studies/*.h5ad"}, "transforms": []}
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(entry))
        monkeypatch.setenv("BMFM_DATASETS", str(tmp_path))
        assert list(find_source(compose("pre_train_config", ["dataset=mine"])).files) == ["a", "b"]
        assert cli.main(["datasets", "--json"]) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])[-1]["state"] == "ready"


class TestTheKey:
    def test_names_and_contents_count_and_folders_do_not(self, write, tmp_path):
        for number, name in enumerate("ab"):
            write(name, seed=number)

        def key(folder):
            return plan_stage("preprocess", str(folder), label="celltype")[0].key

        first = key(tmp_path / "studies")
        shutil.copytree(tmp_path / "studies", tmp_path / "moved")
        assert key(tmp_path / "moved") == first
        (tmp_path / "moved" / "a.h5ad").rename(tmp_path / "moved" / "z.h5ad")
        assert key(tmp_path / "moved") != first
        write("b", seed=5)
        assert key(tmp_path / "studies") != first

    def test_the_plan_says_which_file_made_it_differ(self, write, tmp_path):
        write("a")
        write("b")
        preprocess(tmp_path / "studies")
        write("b", seed=5)
        write("c")
        (job,) = plan_stage(
            "preprocess", str(tmp_path / "studies"), label="celltype", overrides=[f"{KWARGS}.transforms=[]"]
        )
        assert "input source changed (c is new, b changed)" in job.reason
        assert job.name == "studies"

    def test_files_that_come_while_the_run_goes_on(self, write, tmp_path):
        write("a")
        write("b")
        (job,) = plan_stage("preprocess", str(tmp_path / "studies"), label="celltype")
        write("c")
        with pytest.raises(StorageError, match=r"files came or went since the run began \(c\)"):
            run_stage(job)


class TestJoined:
    def test_every_file_has_its_own_numbers(self, write, tmp_path):
        write("a")
        write("b", [*SYMBOLS[2:], "EXTRA1"], seed=1, obs={"celltype": ["A", "B", "D"] * 10, "age": range(30)})
        folder = preprocess(
            tmp_path / "studies",
            f"{KWARGS}.split.group=file",
            f"{KWARGS}.split_weights={{train: 0.5, dev: 0, test: 0.5}}",
        )
        cells = anndata.read_h5ad(folder / "processed.h5ad")
        assert cells.shape == (60, 9) and cells.obs["age"].isna().sum() == 30
        split = pd.read_csv(folder / "split.csv", index_col=0)["split"]
        assert {frozenset(split[:30]), frozenset(split[30:])} == {frozenset({"train"}), frozenset({"test"})}
        found = read_json(folder / "report.json")["files"]
        rows = {row["file"]: row for row in found["files"]}
        for name, genes in (("a", 8), ("b", 7)):
            row = rows[name]
            assert (row["cells"], row["genes"], row["cells_kept"], row["whole_values"]) == (30, genes, 30, True)
            assert row["share_of_counts_kept"] == 1 and row["name_kind"] == "gene symbols"
        assert (found["genes_in_all_files"], found["genes_in_one_file"], found["set_aside"]) == (6, 3, [])
        by_file = read_json(folder / "gene_report.json")["files"]
        assert [entry["gene_names"] for entry in by_file] == [{"matched": 8}, {"matched": 7}]
        labels = read_json(folder / "label_dict.json")[0]["label_values"]
        assert list(labels) == ["A", "B", "C", "D"]

    def test_ids_and_symbols_meet_in_one_gene(self, write, tmp_path):
        write("a", SYMBOLS)
        write("b", ENSEMBL, seed=1)
        folder = preprocess(tmp_path / "studies", f"{GENE_NAMES}.table={write_hgnc(tmp_path)}")
        cells = anndata.read_h5ad(folder / "processed.h5ad")
        assert cells.var_names.tolist() == SYMBOLS
        both = [anndata.read_h5ad(tmp_path / "studies" / f"{name}.h5ad").X.toarray() for name in "ab"]
        np.testing.assert_array_equal(cells.layers["counts"].toarray(), np.concatenate(both))
        report = read_json(folder / "gene_report.json")
        assert report["share_of_counts_kept"] == 1 and report["merged"] == 8
        chain = Chain.from_json(read_json(folder / "transforms.json"))
        alone = chain.apply_to_cells(sparse.csr_matrix(both[1]), ENSEMBL)
        assert alone.gene_names == SYMBOLS and not any(alone.reasons)
        np.testing.assert_array_equal(alone.values.toarray(), cells.X[30:].toarray())

    def test_ids_and_symbols_without_a_table_are_warned_of(self, write, tmp_path, caplog):
        write("a", SYMBOLS)
        write("b", ENSEMBL)
        notes = read_json(preprocess(tmp_path / "studies") / "report.json")["files"]["notes"]
        assert len(notes) == 1 and "name genes in different ways" in notes[0] and notes[0] in caplog.text

    def test_genes_that_joining_would_take_from_a_file_stop_it(self, write, tmp_path):
        write("a", SYMBOLS)
        write("b", [f"{name}_ENSG0000000000{at}" for at, name in enumerate(SYMBOLS)])
        renaming = f"{KWARGS}.transforms=[{{transform_name: RenameGenesTransform, transform_args: {{gene_map: null}}}}]"
        with pytest.raises(DataError, match=r"1 files would lose genes.*\n- b: 100\.0% of its counts.*\n.*table=hgnc"):
            preprocess(tmp_path / "studies", renaming)
        write("b", ENSEMBL)
        highest = [f"{GENE_NAMES}.table={write_hgnc(tmp_path)}", f"{GENE_NAMES}.duplicates=highest"]
        with pytest.raises(DataError, match="another column of"):
            preprocess(tmp_path / "studies", *highest)

    def test_cell_names_of_several_files(self, write, tmp_path):
        cells = [f"cell{row}" for row in range(30)]
        write("a", cells=cells)
        write("b", cells=cells, seed=1)
        with pytest.raises(DataError, match=r"30 duplicate cell names.*cell0 in a, b.*cell_names=prefix"):
            preprocess(tmp_path / "studies")
        folder = preprocess(tmp_path / "studies", f"{KWARGS}.cell_names=prefix")
        assert anndata.read_h5ad(folder / "processed.h5ad").obs_names[30] == "b:cell0"

    def test_real_files_of_two_namings(self, data_dir, tmp_path):
        (tmp_path / "studies").mkdir()
        table = f"{GENE_NAMES}.table={data_dir / 'genes' / 'hgnc_complete_set.zip'}"
        ids = anndata.read_h5ad(data_dir / "onek1k" / "onek1k_7811x1000_counts.h5ad")[:300].copy()
        ids.obs["celltype"] = ids.obs["cell_type"].astype(str)
        ids.write_h5ad(tmp_path / "studies" / "onek1k.h5ad")
        symbols = anndata.read_h5ad(data_dir / "zheng_sorted" / "zheng_sorted_counts.h5ad")[::20]
        shared = symbols.var["ensembl"].isin(ids.var_names).to_numpy()
        symbols = symbols[:, shared | (np.arange(symbols.n_vars) < 1000)].copy()
        symbols.write_h5ad(tmp_path / "studies" / "zheng.h5ad")
        folder = preprocess(tmp_path / "studies", table, f"{KWARGS}.split.rare_classes=train")
        rows = {row["file"]: row for row in read_json(folder / "report.json")["files"]["files"]}
        assert rows["onek1k"]["share_of_counts_kept"] > 0.99 and rows["zheng"]["share_of_counts_kept"] > 0.9
        cells = anndata.read_h5ad(folder / "processed.h5ad")
        assert cells.n_vars < symbols.n_vars + 250  # most of the thousand ids are symbols of the other file
        from_ids = cells[(cells.obs["file"] == "onek1k").to_numpy()].layers["counts"]
        np.testing.assert_array_equal(np.asarray(from_ids.sum(1)).ravel(), np.asarray(ids.X.sum(1)).ravel())
        malat = cells[:, "MALAT1"].layers["counts"].toarray().ravel()[:300]
        np.testing.assert_array_equal(malat, ids[:, "ENSG00000251562"].X.toarray().ravel())


class TestSetAside:
    def test_files_that_cannot_be_used_are_left_out_and_named(self, write, tmp_path, caplog):
        for number in range(8):
            write(f"s{number}", seed=number)
        write("t-negative", change=negative, obs={"celltype": ["only here"] * 30})
        write("u-mouse", ["Cd3d", "Cd3e", "Cd19", "Actb", "Rack1", "Malat1"])
        (tmp_path / "studies" / "v-text.h5ad").write_text("no h5ad")
        with h5py.File(write("w-damaged"), "a") as file:
            del file["X/indptr"]
        words = [f"{GENE_NAMES}.table={write_hgnc(tmp_path)}", f"{KWARGS}.split.group=file"]
        with pytest.raises(DataError) as caught:
            preprocess(tmp_path / "studies", *words)
        said = str(caught.value)
        for text in (
            "4 of 12 files cannot be used, and 10% may be set aside",
            "- t-negative: X: 2 values are negative",
            "- u-mouse: the gene table hgnc_complete_set.txt knows none of the 6 gene names; its names look like mouse",
            "- v-text: is not a readable h5ad",
            "- w-damaged: could not be read (KeyError",
            "max_share_of_files_set_aside=0.34",
        ):
            assert text in said
        folder = preprocess(tmp_path / "studies", *words, f"{KWARGS}.max_share_of_files_set_aside=0.34")
        found = read_json(folder / "report.json")["files"]
        assert [entry["file"] for entry in found["set_aside"]] == ["t-negative", "u-mouse", "v-text", "w-damaged"]
        assert found["set_aside"][1]["largest_losses"][0]["share_of_counts"] > 0
        assert "set aside with all of its cells: v-text: is not a readable h5ad" in caplog.text
        cells = anndata.read_h5ad(folder / "processed.h5ad")
        assert cells.n_obs == 240 and cells.var_names.tolist() == SYMBOLS
        by_file = cells.obs.groupby("file", observed=True)["split_group_file_stratified_celltype"].nunique()
        assert len(by_file) == 8 and (by_file == 1).all()
        assert set(pd.read_csv(folder / "split.csv")["split"]) == {"train", "dev", "test"}
        assert list(read_json(folder / "label_dict.json")[0]["label_values"]) == ["A", "B", "C"]
        assert read_json(folder / "check.json")["files_set_aside"] == 4

    def test_values_that_are_no_counts(self, write, tmp_path):
        for number in range(3):
            write(f"s{number}", seed=number)
        write("z-logged", change=logged)
        with pytest.raises(DataError, match=r"1 of 4 files.*\n- z-logged: X: .* not whole numbers"):
            preprocess(tmp_path / "studies")
        folder = preprocess(tmp_path / "studies", f"{KWARGS}.input_values=any")
        found = read_json(folder / "report.json")["files"]
        assert [row["whole_values"] for row in found["files"]] == [True, True, True, False]
        assert "their values do not mean the same" in found["notes"][0]

    def test_a_single_file_ends_with_its_own_error(self, write, tmp_path):
        write("a", change=negative)
        with pytest.raises(DataError, match=r"a\.h5ad cannot be used:\n- X: 2 values are negative"):
            preprocess(tmp_path / "studies")

    def test_a_label_that_no_file_has(self, write, tmp_path):
        write("a")
        write("b")
        with pytest.raises(
            DataError, match=r"studies \(2 files\) cannot be used:\n- obs has no label column 'celltypes'"
        ):
            preprocess(tmp_path / "studies", label="celltypes")


def test_files_with_one_trouble_are_one_line_and_none_is_left_uncounted():
    found = [(f"s{number:03}", "empty") for number in range(300)] + [
        (f"t{number}", f"odd {number}") for number in range(30)
    ]
    lines = said_once([*found, ("u", "empty")], most=3)
    assert lines == [
        "s000, s001 and 299 more files: empty",
        "t0: odd 0",
        "t1: odd 1",
        "and 28 more files, in 28 other ways",
    ]
