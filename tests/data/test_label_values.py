"""Label columns as arrays: class ids, several classes a cell, numbers; and the file that keeps the ids, shared by processes."""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from bmfm_pipeline.data.label_files import extend_label_dict, read_label_dict, write_label_dict
from bmfm_pipeline.data.label_values import encode_classes, encode_members, encode_numbers, missing_mask
from bmfm_pipeline.data.labels import build_label_dict, count_labels, labels_unseen_in_training
from bmfm_pipeline.errors import DataError


def column(name, **kind):
    plain = {
        "is_regression_label": False,
        "is_multilabel": False,
        "multilabel_str_sep": "|",
        "silent_label_values": None,
    }
    return SimpleNamespace(label_column_name=name, **(plain | kind))


def test_classes_are_ids_and_what_is_unknown_is_ignored():
    values = ["B", None, "A", np.nan, "", "nan", "odd"]
    found = encode_classes(values, {"A": 0, "B": 1, "odd": 2}, ["odd"], "obs['x']")
    assert found.dtype == np.int64 and found.tolist() == [1, -100, 0, -100, -100, -100, -100]
    assert missing_mask(values).tolist() == [False, True, False, True, True, True, False]
    with pytest.raises(DataError, match=r"obs\['x'\] holds labels that the label dictionary does not know: odd"):
        encode_classes(values, {"A": 0, "B": 1}, None, "obs['x']")


def test_several_classes_a_cell_are_zeros_and_ones():
    known = {"T": 0, "B": 1, "NK": 2}
    found = encode_members(["T|NK", "B", None, "|", " B | T ", "B"], known, None, "|", "obs['x']")
    assert found.dtype == np.float32
    assert found.tolist() == [[1, 0, 1], [0, 1, 0], [-100] * 3, [0, 0, 0], [1, 1, 0], [0, 1, 0]]
    silent = encode_members(["T|NK", "B", "B|T"], known, ["B"], "|", "obs['x']")
    assert silent.tolist() == [[1, -100, 1], [-100] * 3, [1, -100, 0]]
    with pytest.raises(DataError, match="does not know: Mast, Neutrophil"):
        encode_members(["T|Neutrophil", "Mast"], known, None, "|", "obs['x']")


def test_numbers_stay_nan_where_unknown():
    found = encode_numbers([3, "4.5", None, np.nan, "", -1.0, np.int32(7)], ["-1.0"], "obs['age']")
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.array([3, 4.5, np.nan, np.nan, np.nan, np.nan, 7], dtype=np.float32))
    with pytest.raises(DataError, match=r"obs\['age'\].*text or infinite values in 3 cells, e.g. 'old', inf"):
        encode_numbers([1, "old", "old", np.inf], None, "obs['age']")


def test_ten_thousand_classes_are_encoded_and_unknown_ones_said_shortly():
    obs = pd.DataFrame({"clone": [f"t{row % 10_000}" for row in range(200_000)]})
    known = build_label_dict(obs, [column("clone")])["clone"]
    ids = encode_classes(obs["clone"].to_numpy(), known, None, "obs['clone']")
    assert len(known) == 10_000 and ids[7] == known["t7"] and np.bincount(ids).min() == 20
    with pytest.raises(DataError) as caught:
        encode_classes(obs["clone"].to_numpy(), {"t0": 0}, None, "obs['clone']")
    assert "and 9989 more" in str(caught.value) and len(str(caught.value)) < 400


def test_a_file_that_knows_few_of_many_classes_says_so_shortly(tmp_path):
    write_label_dict(tmp_path / "labels.json", {"clone": {"t0": 0}})
    obs = pd.DataFrame({"clone": [f"t{row}" for row in range(10_000)]})
    with pytest.raises(DataError) as caught:
        build_label_dict(obs, [column("clone")], tmp_path / "labels.json")
    assert "and 9989 more" in str(caught.value) and len(str(caught.value)) < 800


def test_what_is_missing_silent_or_empty_is_counted():
    obs = pd.DataFrame(
        {"kind": ["a", None, "x", "", "a"], "age": [1, np.nan, 3, 4, 5], "tags": ["p|q", "q", None, "|", "p"]}
    )
    columns = [
        column("kind", silent_label_values=["x"]),
        column("age", is_regression_label=True),
        column("tags", is_multilabel=True),
    ]
    labels = {"kind": {"a": 0, "x": 1, "gone": 2}, "age": {"0": 0}, "tags": {"p": 0, "q": 1}}
    assert count_labels(obs, columns, labels) == {
        "kind": {"missing": 2, "silent": 1, "classes": 3, "classes_without_cells": ["gone"]},
        "age": {"missing": 1},
        "tags": {"missing": 1, "classes": 2, "classes_without_cells": []},
    }


def test_members_that_training_never_sees_are_counted_and_unused_cells_do_not_matter():
    obs = pd.DataFrame({"tags": ["p|q", "q|r", "r", "s", "s|t"]})
    split = ["train", "test", "dev", "unused", "test"]
    assert labels_unseen_in_training(obs, split, ["tags"], {"tags": "|"}) == {"tags": {"r": 2, "s": 1, "t": 1}}
    assert labels_unseen_in_training(obs, ["train", "unused", "unused", "unused", "unused"], ["tags"]) == {}


class TestSharedFile:
    def test_columns_are_appended_and_others_stay_as_they_are(self, tmp_path):
        path = tmp_path / "labels.json"
        assert extend_label_dict(path, {"celltype": {"a": 0, "b": 1}}) == ["celltype"]
        assert extend_label_dict(path, {"celltype": {"a": 0, "b": 1}, "tissue": {"gut": 0}}) == ["tissue"]
        before = path.read_bytes()
        assert extend_label_dict(path, {"tissue": {"gut": 0}}) == [] and path.read_bytes() == before
        with pytest.raises(DataError, match=r"labels\.json: .*'tissue' has other ids for gut, skin"):
            extend_label_dict(path, {"tissue": {"skin": 0, "gut": 1}})
        assert path.read_bytes() == before and [entry.name for entry in tmp_path.iterdir()] == ["labels.json"]

    def test_processes_that_add_columns_at_once_lose_nothing(self, tmp_path):
        path = tmp_path / "labels.json"
        code = (
            "import sys; from bmfm_pipeline.data.label_files import extend_label_dict\n"
            "who = sys.argv[2]; print('ready', flush=True); sys.stdin.readline()\n"
            "for n in range(12): extend_label_dict(sys.argv[1], {f'{who}{n}': {'x': 0, who: 1}, 'shared': {'y': 0}})\n"
        )
        writers = [
            subprocess.Popen(
                [sys.executable, "-c", code, str(path), who], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            for who in "abc"
        ]
        assert [writer.stdout.readline() for writer in writers] == ["ready\n"] * 3
        for writer in writers:
            writer.stdin.write("go\n")
            writer.stdin.flush()
        while any(writer.poll() is None for writer in writers):
            if path.exists():
                json.loads(path.read_text())  # whole at every moment
        assert [writer.wait() for writer in writers] == [0, 0, 0]
        stored = read_label_dict(path)
        assert set(stored) == {"shared", *(f"{who}{number}" for who in "abc" for number in range(12))}
        assert stored["b7"] == {"x": 0, "b": 1}
