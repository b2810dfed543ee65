"""Genes of one name are added up in a stream, the chain that did it predicts without a file, and the report counts every name."""

import json

import anndata
import numpy as np
import pytest
from gene_files import write_hgnc, write_orthologs
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from bmfm_pipeline.config.gene_names import GeneNames
from bmfm_pipeline.data.gene_report import CATEGORIES, report_genes
from bmfm_pipeline.data.sources import check_genes, open_source
from bmfm_pipeline.data.transforms import Chain, build_chain
from bmfm_pipeline.data.transforms.columns import ColumnMap, take_columns
from bmfm_pipeline.data.transforms.standardising import protein_coding_genes, with_standard_names
from bmfm_pipeline.errors import ConfigError, DataError

NAMES = ["CD3D", "GNB2L1", "RACK1", "ENSG00000167286.3", "B4", "OCT1", "mine", "2-Sep"]
AFTER = ["CD3D", "RACK1", "CD19", "OCT1", "mine", "SEPTIN2"]


@pytest.fixture
def table(tmp_path):
    return str(write_hgnc(tmp_path))


def counts_of(n_cells: int, n_genes: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).poisson(1.5, (n_cells, n_genes)).astype(np.float32)


def step(**arguments) -> list[dict]:
    return [{"transform_name": "StandardizeGeneNamesTransform", "transform_args": arguments}]


def added_up(dense: np.ndarray) -> np.ndarray:
    """What NAMES become, added by hand."""
    return np.stack(
        [dense[:, 0] + dense[:, 3], dense[:, 1] + dense[:, 2], dense[:, 4], dense[:, 5], dense[:, 6], dense[:, 7]],
        axis=1,
    )


@given(
    st.lists(st.integers(-1, 4), min_size=1, max_size=12),
    st.integers(1, 6),
    st.integers(0, 2**16),
)
@settings(max_examples=40, deadline=None)
def test_columns_are_moved_and_added_up(target, n_cells, seed):
    random = np.random.default_rng(seed)
    dense = (random.random((n_cells, len(target))) < 0.5) * random.integers(1, 9, (n_cells, len(target)))
    columns = ColumnMap(np.array(target, dtype=np.int32), 5)
    expected = np.zeros((n_cells, 5))
    for column, position in enumerate(target):
        if position >= 0:
            expected[:, position] += dense[:, column]
    for form in (columns, columns.simplified()):
        if form is not None:
            moved = take_columns(sparse.csr_matrix(dense.astype(np.float32)), form)
            np.testing.assert_array_equal(moved.toarray(), expected)
            assert moved.dtype == np.float32
    np.testing.assert_allclose(columns.totals(dense.sum(axis=0)), expected.sum(axis=0))


def test_values_and_counts_are_added_up_in_chunks(make_h5ad, table, tmp_path, monkeypatch):
    dense = counts_of(80, 8)
    dense[:, 0] += 1
    monkeypatch.setattr("bmfm_pipeline.data.sources.h5ad.VALUES_PER_CHUNK", 50)
    path = make_h5ad(sparse.csr_matrix(dense), genes=NAMES)
    chain = build_chain([*step(table=table), {"transform_name": "LogTransform", "transform_args": {"base": 2}}])
    report = chain.run(open_source(path), None, tmp_path / "out.h5ad", {})
    result = anndata.read_h5ad(tmp_path / "out.h5ad")
    assert result.var_names.tolist() == AFTER
    np.testing.assert_array_equal(result.layers["counts"].toarray(), added_up(dense))
    np.testing.assert_allclose(result.X.toarray(), np.log1p(added_up(dense)) / np.log(2), rtol=1e-6)
    assert report.share_of_counts == 1.0 and report.steps[1].genes == 6


def test_the_column_with_the_highest_total_of_the_training_cells_is_kept(make_h5ad, table, tmp_path):
    dense = counts_of(40, 8)
    dense[:, 0] += 1
    dense[:10, 1] += 20  # GNB2L1 leads in the first cells, RACK1 over all of them
    dense[10:, 2] += 50
    path = make_h5ad(sparse.csr_matrix(dense), genes=NAMES)
    chain = build_chain(step(table=table, dup_gene_strategy="highest"))
    chain.run(open_source(path), np.arange(10), tmp_path / "out.h5ad", {})
    result = anndata.read_h5ad(tmp_path / "out.h5ad")
    assert result.var_names.tolist() == AFTER
    np.testing.assert_array_equal(result.layers["counts"].toarray()[:, 1], dense[:, 1])
    again = Chain.from_json(json.loads(json.dumps(chain.to_json())))
    values, _ = again.apply(sparse.csr_matrix(dense), NAMES)
    np.testing.assert_array_equal(values.toarray()[:, 1], dense[:, 1])


def test_of_one_name_twice_the_higher_column_is_kept(make_h5ad, table, tmp_path):
    dense = np.array([[1, 5, 2], [1, 3, 2]], dtype=np.float32)
    with pytest.warns(UserWarning, match="not unique"):
        path = make_h5ad(sparse.csr_matrix(dense), genes=["CD3D", "CD3D", "ACTB"], obs={})
    chain = build_chain(step(table=table, dup_gene_strategy="highest"))
    chain.fit(open_source(path), None)
    for fitted in (chain, Chain.from_json(json.loads(json.dumps(chain.to_json())))):
        values, names = fitted.apply(sparse.csr_matrix(dense), ["CD3D", "CD3D", "ACTB"])
        assert names == ["CD3D", "ACTB"] and values.toarray().tolist() == [[5, 2], [3, 2]]


def test_several_columns_of_a_gene_are_refused_when_asked_for(make_h5ad, table):
    chain = build_chain(step(table=table, dup_gene_strategy="refuse"))
    with pytest.raises(DataError, match=r"2 genes have several columns \(CD3D: CD3D, ENSG00000167286.3; RACK1"):
        chain.gene_names(NAMES)


def test_a_stored_chain_maps_other_namings_without_a_file(make_h5ad, table, tmp_path):
    dense = counts_of(30, 3)
    dense[:, 0] += 1
    chain = build_chain(
        [*step(table=table), {"transform_name": "FilterGenesTransform", "transform_args": {"min_counts": 1}}]
    )
    chain.run(
        open_source(make_h5ad(sparse.csr_matrix(dense), genes=["CD3D", "RACK1", "B4"])), None, tmp_path / "o.h5ad", {}
    )
    stored = json.dumps(chain.to_json())
    assert table not in stored
    (tmp_path / "hgnc_complete_set.txt").unlink()
    again = Chain.from_json(json.loads(stored))
    new = ["ENSG00000204628.2", "cd3d", "CD19_ENSG00000177455", "CD19", "unheard"]
    applied = again.apply_to_cells(sparse.csr_matrix(np.array([[1, 2, 3, 4, 5], [0, 0, 0, 0, 9]])), new)
    assert applied.gene_names == ["RACK1", "CD3D", "CD19"]
    np.testing.assert_array_equal(applied.values.toarray(), [[1, 2, 7], [0, 0, 0]])
    assert applied.reasons == [None, "no gene that the model knows is expressed"]


def test_protein_coding_genes_are_kept_with_the_chain(table, tmp_path):
    chain = build_chain(step(table=table, vocabulary=["GNB2L1", "MALAT1"]))
    (tmp_path / "transforms.json").write_text(json.dumps(chain.to_json()))
    assert protein_coding_genes(tmp_path / "transforms.json") == ["GNB2L1"]
    (tmp_path / "transforms.json").write_text(json.dumps(build_chain([]).to_json()))
    assert protein_coding_genes(tmp_path / "transforms.json") is None


def test_names_that_a_model_does_not_know():
    with pytest.raises(DataError) as caught:
        check_genes(["ENSMUSG00000032094"], ["CD3D"], "the model", cure="Rename them.")
    said = str(caught.value)
    assert "the model knows none of the 1 gene names" in said and said.endswith("Rename them.")
    assert "They look like mouse Ensembl ids" in said and "tokenizer.identifier" not in said


class TestArguments:
    @pytest.mark.parametrize(
        ("word", "meaning"), [("REMOVE", "highest"), ("aggregate", "sum"), ("sum", "sum"), ("refuse", "refuse")]
    )
    def test_older_spellings(self, table, word, meaning):
        assert build_chain(step(table=table, dup_gene_strategy=word)).steps[0][1].dup_gene_strategy == meaning

    def test_rename_is_refused(self, table):
        with pytest.raises(ConfigError, match="no vocabulary knows; use sum, highest or refuse"):
            build_chain(step(table=table, dup_gene_strategy="rename"))

    def test_a_map_of_the_user_drops_what_it_does_not_name(self, tmp_path):
        (tmp_path / "map.json").write_text(json.dumps({"ID1": "CD3D", "ID2": "CD3D", "id3": "CD19"}))
        chain = build_chain(step(gene_map=str(tmp_path / "map.json")))
        assert chain.gene_names(["ID2", "CD3D", "ID3", "other"]) == ["CD3D", "CD19"]
        chain = build_chain(step(gene_map={"ID1": "CD3D"}, unmapped="keep"))
        assert chain.gene_names(["ID1", "other"]) == ["CD3D", "other"]
        chain = build_chain(step(gene_map={"a|b": "CD3D", 'say "c"': "CD19"}))
        again = Chain.from_json(json.loads(json.dumps(chain.to_json())))
        assert again.gene_names(["a|b", 'say "c"', "a"]) == ["CD3D", "CD19"]

    def test_nothing_to_map_with(self):
        with pytest.raises(ConfigError, match="nothing to map names with; run `bmfm genes download`"):
            build_chain(step()).gene_names(["CD3D"])


class TestWhereTheStepStands:
    def placed(self, steps, **given) -> list[str]:
        tables = {"vocabulary": None, "table": "t", "orthologs": None, "map_orthologs": None, **given}
        return [entry["transform_name"] for entry in with_standard_names(steps, GeneNames(), **tables)]

    def test_first_but_after_maps_of_the_user(self):
        by_map = {"transform_name": "RenameGenesTransform", "transform_args": {"gene_map": "var:symbol"}}
        cut = {"transform_name": "RenameGenesTransform", "transform_args": {"gene_map": None}}
        own = "StandardizeGeneNamesTransform"
        assert self.placed([cut]) == [own, "RenameGenesTransform"]
        assert self.placed([by_map, cut]) == ["RenameGenesTransform", own, "RenameGenesTransform"]

    def test_where_the_config_puts_it(self):
        steps = [{"transform_name": "KeepGenesTransform", "transform_args": {}}, *step()]
        assert self.placed(steps) == [entry["transform_name"] for entry in steps]
        (_, filled) = with_standard_names(
            steps, GeneNames(duplicates="refuse"), vocabulary=["A"], table="t", orthologs=None, map_orthologs=None
        )
        assert filled["transform_args"]["table"] == "t" and filled["transform_args"]["dup_gene_strategy"] == "refuse"

    def test_nowhere_without_anything_to_compare_names_with(self):
        assert self.placed([], table=None) == []


class TestReport:
    def report(self, names, steps, known=None, totals=None, **more):
        totals = np.arange(1.0, len(names) + 1) if totals is None else np.asarray(totals, dtype=float)
        return report_genes(build_chain(steps), names, totals, "the vocabulary", known, **more)

    def categories(self, report) -> dict[str, list[str]]:
        return {name: [fate.name for fate in report.of(name)] for name in CATEGORIES if report.of(name)}

    def test_every_name_is_in_one_category(self, table):
        report = self.report(NAMES, step(table=table))
        assert self.categories(report) == {
            "matched": ["CD3D", "RACK1"],
            "renamed": ["B4", "2-Sep"],
            "merged": ["GNB2L1", "ENSG00000167286.3"],
            "ambiguous": ["OCT1"],
            "unknown": ["mine"],
        }
        plain = report.to_dict()
        assert plain["counts"] == 36 and plain["share_of_counts_kept"] == pytest.approx((36 - 6 - 7) / 36)
        assert plain["categories"]["renamed"]["how"] == {"alias": 1, "spreadsheet": 1}
        assert plain["spreadsheet"] == {"names": 1, "examples": ["2-Sep -> SEPTIN2"]}
        assert [loss["name"] for loss in plain["largest_losses"]] == ["mine", "OCT1"]

    @given(
        st.lists(st.sampled_from([*NAMES, "cd3d", "1-Mar", "Cd19", "MARCH1", "CD3D_ENSG00000167286.1"]), max_size=20)
    )
    @settings(max_examples=30, deadline=None)
    def test_numbers_add_up(self, tmp_path_factory, names):
        folder = tmp_path_factory.getbasetemp() / "numbers-add-up"
        folder.mkdir(exist_ok=True)
        table = folder / "hgnc_complete_set.txt"
        table = str(table if table.exists() else write_hgnc(folder))
        for steps, known in (
            (step(table=table), None),
            (step(table=table, vocabulary=["GNB2L1", "MARCH1", "CD3D"]), ["GNB2L1", "MARCH1", "CD3D"]),
            (step(table=table, dup_gene_strategy="highest"), None),
            ([{"transform_name": "RenameGenesTransform", "transform_args": {}}], None),
        ):
            report = self.report(names, steps, known)
            plain = report.to_dict()
            assert [fate.name for fate in report.fates] == names
            assert sum(entry["names"] for entry in plain["categories"].values()) == len(names)
            assert sum(entry["counts"] for entry in plain["categories"].values()) == pytest.approx(plain["counts"])
            matched, renamed = (plain["categories"][name]["names"] for name in ("matched", "renamed"))
            assert plain["genes_known"] == matched + renamed
            assert all(sum(entry["how"].values()) == entry["names"] for entry in plain["categories"].values())

    def test_what_steps_before_and_after_leave_out_is_said(self, table):
        keep = {"transform_name": "KeepGenesTransform", "transform_args": {"genes_to_keep": ["CD3D", "B4"]}}
        report = self.report(["CD3D", "B4", "ACTB"], [keep, *step(table=table)])
        assert self.categories(report) == {"matched": ["CD3D"], "renamed": ["B4"], "dropped": ["ACTB"]}
        assert "left out by KeepGenesTransform" in report.of("dropped")[0].why
        cut = {"transform_name": "RenameGenesTransform", "transform_args": {}}
        report = self.report(["CD3D", "CD3D_ENSG1", "CD19_ENSG2"], [cut])
        assert self.categories(report) == {"matched": ["CD3D"], "renamed": ["CD19_ENSG2"], "dropped": ["CD3D_ENSG1"]}
        assert "the first is kept" in report.of("dropped")[0].why and report.of("renamed")[0].how == "compound"

    def test_the_column_with_lower_counts_is_dropped_and_counted(self, table):
        report = self.report(["RACK1", "GNB2L1"], step(table=table, dup_gene_strategy="highest"))
        assert self.categories(report) == {"renamed": ["GNB2L1"], "dropped": ["RACK1"]}
        assert report.share_of_counts == pytest.approx(2 / 3)

    def test_below_the_floor_the_losses_are_listed(self, table):
        names = ["CD3D", *[f"strange{index}" for index in range(12)]]
        report = self.report(names, step(table=table), totals=[5, *range(100, 112)])
        with pytest.raises(DataError) as caught:
            report.check(0.5, ["do this"])
        said = str(caught.value)
        assert "the vocabulary knows 1 of the 13 gene names, which hold 0.4% of the counts; at least 50%" in said
        assert said.count("strange") == 10 + 5 and "strange11: 8.7% of counts" in said and "- do this" in said
        assert "strange1:" not in said
        report.check(0.003, [])
        with pytest.raises(DataError, match="knows none of the 1 gene names"):
            self.report(["strange"], step(table=table)).check(0.0, [])

    def test_all_names_of_a_table_for_a_person(self, table, tmp_path):
        self.report(NAMES, step(table=table)).write_csv(tmp_path / "names.csv")
        lines = (tmp_path / "names.csv").read_text().splitlines()
        assert lines[0] == "name,category,new_name,how,why,counts" and len(lines) == 9
        assert lines[2].startswith("GNB2L1,merged,RACK1,previous,")

    def test_orthologs(self, table, tmp_path):
        steps = step(table=table, orthologs=str(write_orthologs(tmp_path)), map_orthologs="mouse_to_human")
        report = self.report(["Cd3d", "Actb", "Actb2", "Double", "Gm1"], steps)
        assert self.categories(report) == {
            "renamed": ["Cd3d", "Actb"],
            "merged": ["Actb2"],
            "dropped": ["Double", "Gm1"],
        }
        assert report.to_dict()["naming"].startswith("mouse gene symbols")
