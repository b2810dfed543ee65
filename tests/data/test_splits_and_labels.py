"""Splits are seeded, stratified and stored with a hash; label ids are fixed once and never shift unseen."""

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from bmfm_pipeline.data.label_files import read_label_dict, write_label_dict
from bmfm_pipeline.data.labels import build_label_dict, empty_or_none, labels_unseen_in_training
from bmfm_pipeline.data.splits import make_split, read_split, read_split_info, write_split
from bmfm_pipeline.errors import DataError

WEIGHTS = {"train": 0.72, "dev": 0.08, "test": 0.2}


def column(name, regression=False, multilabel=False, silent=None):
    return SimpleNamespace(
        label_column_name=name,
        is_regression_label=regression,
        is_multilabel=multilabel,
        multilabel_str_sep="|",
        silent_label_values=silent,
    )


def cells(n=500, classes=("A", "B", "C"), seed=0):
    random = np.random.default_rng(seed)
    labels = random.choice(classes, n, p=np.array(range(1, len(classes) + 1)) / sum(range(1, len(classes) + 1)))
    return pd.DataFrame({"celltype": pd.Categorical(labels)}, index=[f"c{index}" for index in range(n)])


def test_stratified_split_keeps_shares_and_follows_the_seed():
    obs = cells()
    split = make_split(obs, weights=WEIGHTS, stratify="celltype", seed=3)
    assert split.value_counts().to_dict() == {"train": 360, "test": 100, "dev": 40}
    for name in ("train", "test"):
        shares = obs.loc[(split == name).to_numpy(), "celltype"].value_counts(normalize=True)
        expected = obs["celltype"].value_counts(normalize=True)
        assert (shares - expected).abs().max() < 0.01
    assert split.equals(make_split(obs, weights=WEIGHTS, stratify="celltype", seed=3))
    assert not split.equals(make_split(obs, weights=WEIGHTS, stratify="celltype", seed=4))


def test_random_split_is_numpys_categorical_draw():
    obs = cells()
    drawn = np.random.default_rng(7).choice(["train", "dev", "test"], size=500, p=[0.72, 0.08, 0.2])
    assert make_split(obs, weights=WEIGHTS, stratify=None, seed=7).tolist() == drawn.tolist()


def test_split_from_an_obs_column():
    obs = cells(6)
    obs["fold"] = ["train", "test", "dev", "train", "train", "test"]
    assert make_split(obs, weights=WEIGHTS, stratify="celltype", seed=0, column="fold").tolist() == obs["fold"].tolist()
    obs["fold"] = ["train", "test", "ood", "train", "valid", "test"]
    with pytest.raises(
        DataError, match=r"obs\['fold'\] must hold only train.*found also ood \(1\), valid \(1\).*valid: dev"
    ):
        make_split(obs, weights=WEIGHTS, stratify=None, seed=0, column="fold")
    with pytest.raises(DataError, match=r"obs has no column 'folds'; did you mean 'fold'\?; columns: celltype, fold"):
        make_split(obs, weights=WEIGHTS, stratify=None, seed=0, column="folds")


def test_more_classes_than_test_cells_is_said():
    obs = cells(30, classes=[f"t{index}" for index in range(10)])
    obs["celltype"] = [f"t{index % 10}" for index in range(30)]
    with pytest.raises(DataError, match=r"obs\['celltype'\]: cannot be split.*classes.*random split"):
        make_split(obs, weights={"train": 0.8, "dev": 0.1, "test": 0.1}, stratify="celltype", seed=0)


def test_a_few_unlabelled_cells_stay_in_training():
    obs = cells(100)
    obs.loc["c5", "celltype"] = np.nan
    assert make_split(obs, weights=WEIGHTS, stratify="celltype", seed=0)["c5"] == "train"


def test_weights_that_do_not_add_up():
    with pytest.raises(DataError, match="split_weights: train, dev and test must be given, none negative, with sum 1"):
        make_split(cells(), weights={"train": 0.8, "dev": 0.1, "test": 0.2}, stratify=None, seed=0)


def test_split_is_stored_with_how_it_was_made(tmp_path):
    obs = cells(200)
    obs.index = ['a,"b"', *obs.index[1:]]
    split = make_split(obs, weights=WEIGHTS, stratify=None, seed=5)
    info = write_split(tmp_path, split, "split_random", seed=5, stratify=None, weights=WEIGHTS)
    assert read_split(tmp_path).equals(split)
    stored = read_split_info(tmp_path)
    assert stored == info
    assert (stored["seed"], stored["stratify"], stored["weights"]) == (5, None, WEIGHTS)
    assert sum(stored["counts"].values()) == 200
    again = write_split(tmp_path / "again", split, seed=5)
    other = split.copy()
    other.iloc[0] = "dev" if other.iloc[0] != "dev" else "test"
    assert again["hash"] == info["hash"] != write_split(tmp_path / "other", other)["hash"]


def test_label_ids_are_alphabetical_and_the_file_keeps_its_format(tmp_path):
    obs = pd.DataFrame(
        {"celltype": ["b", "a", None, "c"], "age": [1.0, 2.0, 3.0, np.nan], "tags": ["x|y", "y", None, "z"]}
    )
    labels = build_label_dict(
        obs, [column("celltype"), column("age", regression=True), column("tags", multilabel=True)]
    )
    assert labels == {"celltype": {"a": 0, "b": 1, "c": 2}, "age": {"0": 0}, "tags": {"x": 0, "y": 1, "z": 2}}
    write_label_dict(tmp_path / "labels.json", labels)
    stored = json.loads((tmp_path / "labels.json").read_text())
    assert stored[0] == {"label_name": "celltype", "label_values": {"a": 0, "b": 1, "c": 2}}
    assert read_label_dict(tmp_path / "labels.json") == labels


def test_an_existing_file_keeps_its_ids(tmp_path):
    path = tmp_path / "labels.json"
    write_label_dict(path, {"celltype": {"z": 0, "a": 1, "unused": 2}})
    assert build_label_dict(pd.DataFrame({"celltype": ["a", "z"]}), [column("celltype")], path)["celltype"] == {
        "z": 0,
        "a": 1,
        "unused": 2,
    }


def test_a_label_that_the_file_does_not_know_is_refused_with_the_cure(tmp_path):
    path = tmp_path / "labels.json"
    write_label_dict(path, {"celltype": {"a": 0, "b": 1}})
    before = path.read_bytes()
    with pytest.raises(DataError) as caught:
        build_label_dict(pd.DataFrame({"celltype": ["a", "new", "newer"]}), [column("celltype")], path)
    assert "does not know: new, newer" in str(caught.value) and '"new": 2, "newer": 3' in str(caught.value)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == before
    silent = build_label_dict(pd.DataFrame({"celltype": ["a", "new"]}), [column("celltype", silent=["new"])], path)
    assert silent["celltype"] == {"a": 0, "b": 1}


def test_a_file_that_is_no_label_dictionary(tmp_path):
    (tmp_path / "labels.json").write_text('{"celltype": {"a": 0}}')
    with pytest.raises(DataError, match=r"labels\.json: not a label dictionary; expected"):
        build_label_dict(pd.DataFrame({"celltype": ["a"]}), [column("celltype")], tmp_path / "labels.json")


def test_labels_that_training_never_sees_are_counted():
    obs = pd.DataFrame({"celltype": ["a", "b", "c", "c", None, "a"]})
    split = pd.Series(["train", "train", "test", "dev", "test", "test"])
    assert labels_unseen_in_training(obs, split, ["celltype"]) == {"celltype": {"c": 2}}


def test_an_empty_value_that_may_mean_none_of_the_classes_is_said():
    obs = pd.DataFrame({"marks": ["a|b", "", "a", ""], "kind": ["x", "", "y", "x"]})
    marks = SimpleNamespace(label_column_name="marks", is_multilabel=True, multilabel_str_sep="|")
    kind = SimpleNamespace(label_column_name="kind", is_multilabel=False, multilabel_str_sep="|")
    (said,) = empty_or_none(obs, [marks, kind])
    assert said.startswith("marks: 2 of 4 rows are empty") and "write the separator alone, '|'" in said
    assert empty_or_none(obs.assign(marks=["a|b", "", "|", ""]), [marks]) == []
    assert empty_or_none(obs.assign(marks=["a|b", "b", "a", "b"]), [marks]) == []
