"""Offline transforms, splits and label dictionaries against the stored output of the compatible package bmfm_targets."""

import hashlib
import json
import os
from pathlib import Path
from types import SimpleNamespace

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from bmfm_pipeline.data.labels import build_label_dict
from bmfm_pipeline.data.sources import open_source
from bmfm_pipeline.data.splits import make_split
from bmfm_pipeline.data.store import CellStore
from bmfm_pipeline.data.transforms import build_chain

# The default chain of a data set whose golden folder does not list it.
SCALED_CHAIN = [
    {"transform_name": "ScaleCountsTransform", "transform_args": {"scale_factor": 10}},
    {"transform_name": "BinTransform", "transform_args": {"binning_method": "int_cast"}},
    {"transform_name": "FilterCellsTransform", "transform_args": {"min_counts": 2}},
    {"transform_name": "FilterGenesTransform", "transform_args": {"min_counts": 1}},
]
DEFAULT_WEIGHTS = {"train": 0.8, "dev": 0.1, "test": 0.1}


def _section() -> Path | None:
    folder = os.environ.get("BMFM_GOLDEN_DIR")
    return Path(folder) / "preprocess" if folder and Path(folder).is_dir() else None


def _single_cases() -> list:
    section = _section()
    if section is None:
        return [pytest.param(None, None, id="no-golden")]
    found = []
    for manifest in sorted(section.glob("*/manifest.json")):
        for name, case in json.loads(manifest.read_text())["transforms"].items():
            found.append(pytest.param(manifest.parent, (name, case), id=f"{manifest.parent.name}-{name}"))
    return found


def _folders(pattern: str) -> list:
    section = _section()
    return (
        [pytest.param(path, id=path.parent.name) for path in sorted(section.glob(pattern))]
        if section
        else [pytest.param(None, id="no-golden")]
    )


def _matrix(stored) -> sparse.csr_matrix:
    return sparse.csr_matrix((stored["data"], stored["indices"], stored["indptr"]), shape=tuple(stored["shape"]))


def _read(path: Path) -> tuple[CellStore, sparse.csr_matrix]:
    store = CellStore(path)
    return store, sparse.csr_matrix((store.data, store.indices, store.indptr), shape=store.shape)


def _sha(array) -> str:
    return hashlib.sha256(np.ascontiguousarray(array, dtype="<i4").tobytes()).hexdigest()


def _sha_lines(lines) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _raw(data_dir: Path, name: str) -> Path:
    found = sorted(data_dir.glob(f"*/{name}"))
    if not found:
        pytest.skip(f"{name} is not in the data folder")
    return found[0]


@pytest.mark.parametrize(("folder", "case"), _single_cases())
def test_every_single_transform(folder, case, golden_dir, tmp_path, request):
    name, description = case
    given = np.load(folder / "input.npz")
    cells = anndata.AnnData(
        _matrix(given),
        obs=pd.DataFrame(index=given["obs_names"].astype(str)),
        var=pd.DataFrame(index=given["var_names"].astype(str)),
    )
    cells.write_h5ad(tmp_path / "input.h5ad")
    steps = json.loads(json.dumps(description["chain"]))
    for step in steps:
        if isinstance(step["transform_args"], str):  # "ARGUMENT: see FILE"
            argument, file = step["transform_args"].split(": see ")
            step["transform_args"] = {argument: json.loads((folder / file).read_text())}
        if "vocab_identifier" in step["transform_args"]:
            tokenizers = request.getfixturevalue("data_dir") / "tokenizers"
            step["transform_args"]["vocab_identifier"] = str(tokenizers / step["transform_args"]["vocab_identifier"])
    build_chain(steps).run(open_source(tmp_path / "input.h5ad"), None, tmp_path / "out.h5ad", {}, keep_empty=True)
    store, matrix = _read(tmp_path / "out.h5ad")
    expected = np.load(folder / f"{name}.npz")
    wanted, genes = _matrix(expected), expected["var_names"].tolist()
    if description["columns_sorted_by_name"]:
        matrix = matrix[:, np.argsort(store.var_names)]
        store.var_names.sort()
    assert list(matrix.shape) == description["shape"]
    assert store.obs_names.tolist() == expected["obs_names"].tolist()
    assert store.var_names == genes
    for column in (key.removeprefix("obs__") for key in expected.files if key.startswith("obs__")):
        if column in store.var_names or column in store.obs.columns:
            np.testing.assert_allclose(store.obs[column].to_numpy(float), expected[f"obs__{column}"], rtol=1e-5)
    if description["deterministic"]:
        np.testing.assert_allclose(matrix.toarray().astype(np.float64), wanted.toarray().astype(np.float64), rtol=1e-5)
    else:
        _same_bins_but_for_ties(given, matrix, wanted)


def _same_bins_but_for_ties(given, ours: sparse.csr_matrix, theirs: sparse.csr_matrix) -> None:
    """Where a value could only go to one bin in a cell it goes there; ranges agree; order within the cell is kept."""
    source = _matrix(given).tocsr()
    assert (ours.data.min(), ours.data.max()) == (theirs.data.min(), theirs.data.max())
    compared = 0
    for row in range(source.shape[0]):
        raw, mine, other = (np.asarray(matrix[row].toarray(), dtype=float).ravel() for matrix in (source, ours, theirs))
        assert ((mine > 0) == (raw > 0)).all()
        for value in np.unique(raw[raw > 0]):
            here = raw == value
            if here.sum() > 1 and len(set(other[here])) == 1 and len(set(mine[here])) == 1:
                compared += 1
                assert set(mine[here]) == set(other[here])
            assert mine[here].max() <= mine[raw > value].min(initial=np.inf)
    assert compared > 20


@pytest.mark.parametrize("meta_file", _folders("*/meta.json"))
def test_whole_chains(meta_file, golden_dir, data_dir, tmp_path):
    meta = json.loads(meta_file.read_text())
    source = open_source(_raw(data_dir, meta["source"]))
    folder = meta_file.parent
    column = meta.get("split_column")
    dictionaries = json.loads((folder / "label_dict.json").read_text()) if (folder / "label_dict.json").exists() else []
    dictionaries += next((value for key, value in meta.items() if key.startswith("label_dict")), [])
    label = meta.get("stratify_on") or (_only_categorical(source, dictionaries) if "split" not in meta else None)
    if "split" in meta:
        split = source.obs[column].astype(str)  # the package's own names of this data set's splits
    else:
        weights = meta.get("split_weights", DEFAULT_WEIGHTS)
        split = make_split(source.obs, weights=weights, stratify=label, seed=meta["random_state"])
    chain = build_chain(meta.get("transforms", SCALED_CHAIN))
    chain.run(source, None, tmp_path / "out.h5ad", {"split": split.to_numpy()}, keep_empty=True)
    store, matrix = _read(tmp_path / "out.h5ad")
    splits = store.column("split")
    if "split" in meta:
        matrix, names = matrix[splits == meta["split"]], store.obs_names[splits == meta["split"]]
    else:
        names = store.obs_names
    assert list(matrix.shape) == meta["shape"]
    if "value_histogram" in meta:
        found, counts = np.unique(matrix.data, return_counts=True)
        assert {str(value): count for value, count in zip(found.tolist(), counts.tolist(), strict=True)} == meta[
            "value_histogram"
        ]
    if "split_counts" in meta:
        assert {name: int((splits == name).sum()) for name in meta["split_counts"]} == meta["split_counts"]
    _compare_hashes(meta, matrix, names, store, splits)
    _compare_arrays(folder, meta, matrix, names, store)
    if (folder / "obs_split.csv").exists():
        table = pd.read_csv(folder / "obs_split.csv", dtype=str).set_index("cell")
        assert table[column].to_dict() == dict(zip(names, splits, strict=True))
    for entry in dictionaries:
        columns = [
            SimpleNamespace(
                label_column_name=entry["label_name"],
                is_regression_label=False,
                is_multilabel=False,
                silent_label_values=None,
            )
        ]
        assert build_label_dict(store.obs, columns)[entry["label_name"]] == entry["label_values"]


def _only_categorical(source, dictionaries) -> str:
    """The label column of a folder that does not name it: the one whose splits the stored hash belongs to."""
    if dictionaries:
        return dictionaries[0]["label_name"]
    return max(
        (name for name in source.obs if source.obs[name].dtype == "category"), key=lambda name: "type" in name.lower()
    )


def _compare_hashes(meta: dict, matrix: sparse.csr_matrix, names, store: CellStore, splits) -> None:
    found = {
        "csr_data_int32": lambda: _sha(matrix.data),
        "csr_indices_int32": lambda: _sha(matrix.indices),
        "csr_indptr_int32": lambda: _sha(matrix.indptr),
        "obs_names_newline_joined": lambda: _sha_lines(names),
        "var_names_newline_joined": lambda: _sha_lines(store.var_names),
        "split_newline_joined": lambda: _sha_lines(splits),
        "data_sha256_int32": lambda: _sha(matrix.data),
        "indices_sha256_int32": lambda: _sha(matrix.indices),
        "obs_names_sha256": lambda: _sha_lines(names),
        "var_names_sha256": lambda: _sha_lines(store.var_names),
    }
    stored = {**meta.get("sha256", {}), **{name: value for name, value in meta.items() if "_sha256" in name}}
    for name, value in stored.items():
        assert found[name]() == value, name


def _compare_arrays(folder: Path, meta: dict, matrix: sparse.csr_matrix, names, store: CellStore) -> None:
    for file in sorted(folder.glob("*.npz")):
        stored = np.load(file)
        rows = stored["rows"] if "rows" in stored.files else np.arange(len(stored["obs_names"]))
        assert names[rows].tolist() == stored["obs_names"].tolist()
        assert store.var_names == stored["var_names"].tolist()
        assert (matrix[rows] != _matrix(stored)).nnz == 0


@pytest.mark.parametrize("table", _folders("splits/*.csv"))
@pytest.mark.parametrize("kind", ["stratified", "random"])
def test_splits(table, kind, golden_dir, data_dir):
    stored = pd.read_csv(table, dtype=str, keep_default_na=False).set_index("cell")
    obs = open_source(_raw(data_dir, table.name.replace("_splits.csv", ".h5ad"))).obs
    compared = 0
    for name in stored.columns:
        if not name.startswith(kind):
            continue
        what, *label, seed = name.split("__")
        shares = [float(share) for share in what.split("_")[1:]] or [8, 1, 1]
        weights = dict(zip(("train", "dev", "test"), np.array(shares) / sum(shares), strict=True))
        expected = stored[name].to_numpy()
        if "ERROR" in expected:
            continue
        split = make_split(
            obs, weights=weights, stratify=label[0] if label else None, seed=int(seed.removeprefix("seed"))
        )
        assert split.index.tolist() == stored.index.tolist()
        assert split.tolist() == expected.tolist(), name
        compared += 1
    assert compared
