"""Files of other kinds as h5ad: the same cells from each, and what is wrong said of those that cannot be read."""

import gzip
import io
import tarfile

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.io
from anndata.io import write_elem
from r_files import rdata_bytes
from scipy import sparse

from bmfm_pipeline.config.reading import Reading
from bmfm_pipeline.data.sources.converting import convert
from bmfm_pipeline.errors import ConfigError, DataError

GENES = ["ACTB", "CD3D", "CD19", "GAPDH", "MALAT1", "MS4A1", "NKG7"]
IDS = [f"ENSG{number:011d}" for number in range(1, 8)]
CELLS = [f"cell{number}" for number in range(12)]
KINDS = ["T", "B", "NK"] * 4


@pytest.fixture(scope="module")
def cells():
    counts = np.random.default_rng(0).poisson(1.0, (12, 7)).astype(np.float32)
    counts[3] = 0
    obs = pd.DataFrame({"celltype": KINDS}, index=CELLS)
    return anndata.AnnData(sparse.csr_matrix(counts), obs=obs, var=pd.DataFrame({"gene_ids": IDS}, index=GENES))


def _frame(cells) -> pd.DataFrame:
    return pd.DataFrame(cells.X.toarray().astype(int), index=CELLS, columns=GENES)


def _tenx(cells, path) -> None:
    path.mkdir()
    matrix = io.BytesIO()
    scipy.io.mmwrite(matrix, cells.X.T.tocsc().astype(int), field="integer")
    (path / "matrix.mtx.gz").write_bytes(gzip.compress(matrix.getvalue()))
    rows = zip(IDS, GENES, ["Gene Expression"] * 7, strict=True)
    (path / "features.tsv.gz").write_bytes(gzip.compress("".join("\t".join(row) + "\n" for row in rows).encode()))
    (path / "barcodes.tsv").write_text("\n".join(CELLS) + "\n")


def _tar(cells, path) -> None:
    folder = path.with_name("for_tar")
    _tenx(cells, folder)
    with tarfile.open(path, "w:gz") as archive:
        archive.add(folder, "matrices")


def _h5(cells, path) -> None:
    """With one feature that is no gene, as a CITE-seq run has."""
    wide = sparse.hstack([cells.X, np.ones((12, 1), np.float32)]).tocsr()
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix")
        group["data"], group["indices"], group["indptr"] = wide.data.astype("i4"), wide.indices, wide.indptr
        group["shape"], group["barcodes"] = (8, 12), np.array(CELLS, "S")
        group["features/id"] = np.array([*IDS, "ADT1"], "S")
        group["features/name"] = np.array([*GENES, "CD3"], "S")
        group["features/feature_type"] = np.array(["Gene Expression"] * 7 + ["Antibody Capture"], "S")


def _loom(cells, path) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("matrix", data=cells.X.toarray().T, chunks=(4, 5), compression="gzip")
        file["layers/spliced"] = cells.X.toarray().T * 2
        file["row_attrs/Gene"], file["row_attrs/gene_ids"] = np.array(GENES, "S"), np.array(IDS, "S")
        file["col_attrs/CellID"], file["col_attrs/celltype"] = np.array(CELLS, "S"), np.array(KINDS, "S")


def _h5mu(cells, path) -> None:
    with h5py.File(path, "w") as file:
        for name in ("X", "var"):
            write_elem(file, f"mod/rna/{name}", getattr(cells, name))
        write_elem(file, "mod/rna/obs", cells.obs[[]])
        write_elem(file, "mod/prot/X", np.zeros((12, 2)))
        write_elem(file, "obs", cells.obs)


def _soma(cells, path) -> None:
    tiledbsoma_io = pytest.importorskip("tiledbsoma.io")
    tiledbsoma_io.from_anndata(str(path), cells.copy(), "RNA", X_layer_name="raw")


def _r_header(cells, path) -> None:
    path.write_text(_frame(cells).T.to_csv(sep="\t").removeprefix("\t"))


WRITERS = {
    "cells.csv": lambda cells, path: _frame(cells).assign(celltype=KINDS).to_csv(path),
    "genes.tsv.gz": lambda cells, path: _frame(cells).T.to_csv(path, sep="\t"),
    "r.txt": _r_header,
    "tenx": _tenx,
    "tenx.tar.gz": _tar,
    "x.h5": _h5,
    "x.loom": _loom,
    "x.h5mu": _h5mu,
    "x.RData": lambda cells, path: path.write_bytes(rdata_bytes({"sm": (cells.X.T, GENES, CELLS)})),
    "census": _soma,
}


@pytest.fixture
def made(cells, tmp_path):
    """made(name) -> the path of the cells as a file of that kind."""

    def make(name):
        WRITERS[name](cells, tmp_path / name)
        return tmp_path / name

    return make


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_holds_the_same_cells(name, made, cells, tmp_path):
    path = made(name)
    about = convert(path, tmp_path / "out.h5ad")
    found = anndata.read_h5ad(tmp_path / "out.h5ad")
    assert found.var_names.tolist() == GENES and found.obs_names.tolist() == CELLS
    assert np.array_equal(found.X.toarray(), cells.X.toarray())
    assert (about["cells"], about["genes"], about["values"]) == (12, 7, cells.X.nnz)
    if name in ("cells.csv", "x.loom", "x.h5mu", "census"):
        assert found.obs["celltype"].astype(str).tolist() == KINDS
    if name in ("tenx", "x.h5", "x.loom"):
        assert found.var["gene_ids"].astype(str).tolist() == IDS
    if name == "x.loom":
        assert np.array_equal(found.layers["spliced"].toarray(), 2 * cells.X.toarray())
    said = {"x.h5": "1 features of type Antibody Capture are left out", "x.h5mu": "other modalities are left out: prot"}
    if name in said:
        assert about["notes"] == [said[name]]
    assert not list(tmp_path.glob(".*"))


def test_rows_that_names_do_not_tell_are_asked_for(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("id,a1,a2\nb1,1,2\nb2,0,3\n")
    with pytest.raises(
        ConfigError, match=r"whether rows are cells or genes cannot be told.*reading\.rows=cells or =genes"
    ):
        convert(path, tmp_path / "out.h5ad")
    convert(path, tmp_path / "out.h5ad", Reading(rows="genes"))
    found = anndata.read_h5ad(tmp_path / "out.h5ad")
    assert found.var_names.tolist() == ["b1", "b2"] and found.to_df().loc["a2"].tolist() == [2, 3]


def test_columns_and_tables_describe_cells(tmp_path):
    (tmp_path / "x.csv").write_text("cell,age,ACTB,CD3D,GAPDH\nc1,30,1,2,0\nc2,40,0,3,1\n")
    (tmp_path / "about.tsv").write_text("cell\tdonor\tage\nc2\td2\t1\nc9\td9\t2\n")
    reading = Reading(rows="cells", obs_columns=["age"], cell_table=str(tmp_path / "about.tsv"))
    about = convert(tmp_path / "x.csv", tmp_path / "out.h5ad", reading)
    found = anndata.read_h5ad(tmp_path / "out.h5ad")
    assert found.var_names.tolist() == ["ACTB", "CD3D", "GAPDH"] and found.obs["age"].tolist() == [30, 40]
    assert found.obs["donor"].astype(object).where(found.obs["donor"].notna(), None).tolist() == [None, "d2"]
    assert about["notes"][2:] == [
        "about.tsv says nothing of 1 of 2 cells", "about.tsv names 1 cells that x.csv does not have",
        "columns that the cells had already stay as they were: age",
    ]  # fmt: skip


def test_census_cells_are_chosen_in_its_own_words(made, tmp_path):
    path = made("census")
    convert(path, tmp_path / "out.h5ad", Reading(cell_filter="celltype == 'B'"))
    assert anndata.read_h5ad(tmp_path / "out.h5ad").obs_names.tolist() == CELLS[1::3]
    with pytest.raises(ConfigError, match=r"cell_filter: 'nothing == 1' is refused.*its columns are"):
        convert(path, tmp_path / "out.h5ad", Reading(cell_filter="nothing == 1"))
    with pytest.raises(ConfigError, match=r"soma_layer: .* has no layer of X 'normalized'; it has raw"):
        convert(path, tmp_path / "out.h5ad", Reading(soma_layer="normalized"))


MATRIX = np.array([[1, 0.5], [0, 2], [3, 0]])


class TestRData:
    def test_values_with_fractions_are_kept_and_said(self, tmp_path):
        objects = {"more": [1.0, 2.0], "sm2": (MATRIX, ["A", "B", "C"], None)}
        (tmp_path / "x.rda").write_bytes(rdata_bytes(objects))
        about = convert(tmp_path / "x.rda", tmp_path / "out.h5ad")
        assert about["notes"] == ["cells have no names and are numbered", "1 of 4 values are no whole numbers"]
        assert anndata.read_h5ad(tmp_path / "out.h5ad").to_df().loc["0"].tolist() == [1, 0, 3]

    def test_the_object_can_be_named(self, tmp_path):
        objects = {name: (MATRIX * scale, ["A", "B", "C"], ["x", "y"]) for name, scale in (("one", 1), ("two", 2))}
        path = tmp_path / "x.RData"
        path.write_bytes(rdata_bytes(objects))
        with pytest.raises(
            DataError, match=r"several sparse matrices: one \(dgCMatrix\), two \(dgCMatrix\); name one with"
        ):
            convert(path, tmp_path / "out.h5ad")
        convert(path, tmp_path / "out.h5ad", Reading(r_object="two"))
        assert anndata.read_h5ad(tmp_path / "out.h5ad").to_df().loc["x"].tolist() == [2, 0, 6]
        with pytest.raises(ConfigError, match="has no object 'three'"):
            convert(path, tmp_path / "out.h5ad", Reading(r_object="three"))

    def test_what_is_no_matrix_is_named(self, tmp_path):
        path = tmp_path / "x.RData"
        path.write_bytes(rdata_bytes({"meta": [1.0]}))
        with pytest.raises(DataError, match=r"holds no sparse matrix \(dgCMatrix\): meta \(REAL\)"):
            convert(path, tmp_path / "out.h5ad")
        path.write_bytes(rdata_bytes({"sm": (MATRIX, ["A", "B", "C"], None, "dgTMatrix")}))
        with pytest.raises(DataError, match="sm is a dgTMatrix; a dgCMatrix is read"):
            convert(path, tmp_path / "out.h5ad")

    @pytest.mark.parametrize("share", [0.02, 0.5, 0.97])
    def test_a_cut_file_is_no_file(self, tmp_path, share):
        whole = rdata_bytes({"sm": (MATRIX, ["A", "B", "C"], ["x", "y"])})
        (tmp_path / "x.RData").write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(DataError, match=r"damaged or cut short|no RData file"):
            convert(tmp_path / "x.RData", tmp_path / "out.h5ad")
        assert not (tmp_path / "out.h5ad").exists() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("name", ["genes.tsv.gz", "x.h5", "x.loom", "x.h5mu", "tenx.tar.gz"])
def test_files_that_are_cut_short_are_refused(name, made, tmp_path):
    path = made(name)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(
        DataError, match=r"cut short|damaged|cannot be read|could not be read|fetch it again|no readable"
    ):
        convert(path, tmp_path / "out.h5ad")
    assert not (tmp_path / "out.h5ad").exists()


def test_wrong_tables_say_where(tmp_path):
    path = tmp_path / "x.csv"
    cases = {
        "": "has 0 lines",
        "cell,ACTB,GAPDH\n": "has 1 lines",
        "cell,ACTB,ACTB\nc1,1,2\n": "columns have the same name: ACTB",
        "cell,ACTB,GAPDH\nc1,1,\nc2,2,3\n": "1 values are missing in 1 rows, e.g. GAPDH of c1",
        "sequence,label\nACGT,1\n": "is a table of sequences",
        "cell,kind\nc1,a\nc2,b\n": "no column holds numbers",
    }
    for text, said in cases.items():
        path.write_text(text)
        with pytest.raises(DataError, match=said):
            convert(path, tmp_path / "out.h5ad", Reading(rows="cells"))


def test_parts_that_do_not_fit_are_refused(made, tmp_path):
    path = made("tenx")
    (path / "barcodes.tsv").write_text("\n".join(CELLS[:5]))
    with pytest.raises(DataError, match="the matrix has 12 barcodes, and 5 are named"):
        convert(path, tmp_path / "out.h5ad")
    (path / "barcodes.tsv").unlink()
    with pytest.raises(DataError, match=r"no whole 10x matrix folder: it has no barcodes\.tsv"):
        convert(path, tmp_path / "out.h5ad")


def test_keys_of_another_kind_are_refused(made, tmp_path):
    with pytest.raises(
        ConfigError, match=r"reading: modality is not read for .*x\.loom \(loom\), which reads cell_table"
    ):
        convert(made("x.loom"), tmp_path / "out.h5ad", Reading(modality="rna"))
    with pytest.raises(ConfigError, match=r"has no modality 'atac'; it has prot, rna"):
        convert(made("x.h5mu"), tmp_path / "out.h5ad", Reading(modality="atac"))
    with pytest.raises(
        ConfigError, match=r"no feature of .* is of type 'Peaks'; there are Antibody Capture, Gene Expression"
    ):
        convert(made("x.h5"), tmp_path / "out.h5ad", Reading(feature_type="Peaks"))
