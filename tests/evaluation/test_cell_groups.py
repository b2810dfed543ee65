"""Which test cells are resampled together: read from obs, said, kept beside the predictions."""

import numpy as np
import pytest

from bmfm_pipeline.errors import ConfigError
from bmfm_pipeline.evaluation.groups import (
    check_group_column,
    donors_not_respected,
    groups_of_cells,
    read_groups,
    write_groups,
)


class Obs:
    """The obs columns of a store."""

    def __init__(self, **columns):
        self.columns = {name: np.array(values, dtype=object) for name, values in columns.items()}
        self.obs_columns = list(columns)
        self.obs_names = np.array([f"c{i}" for i in range(len(next(iter(columns.values()))))], dtype=object)

    def column(self, name):
        return self.columns[name]


CELLS = [f"c{i}" for i in (5, 0, 3, 1)]


def test_groups_are_those_of_the_test_cells_in_their_order():
    groups, notes = groups_of_cells(Obs(donor=["a", "a", "b", "b", "c", "d"]), "donor", CELLS)
    assert groups.tolist() == ["d", "a", "b", "a"]
    assert notes == [
        "intervals resample whole values of donor, of which the test cells have 3; with so few, they are rough and tend to be too narrow"
    ]
    many, notes = groups_of_cells(Obs(donor=list(range(24))), "donor", [f"c{i}" for i in range(24)])
    assert many[23] == "23" and notes[0].endswith("have 24")


def test_a_cell_without_a_value_counts_by_itself():
    groups, notes = groups_of_cells(Obs(donor=["a", np.nan, "b", None, "c", "a"]), "donor", CELLS)
    assert len(set(groups)) == 3 and groups[0] == groups[1] == "a"
    assert notes[0] == "intervals: 2 of 4 test cells have no donor and count one by one"


def test_of_one_group_cells_count_one_by_one_and_it_is_said():
    groups, notes = groups_of_cells(Obs(donor=["a"] * 6), "donor", CELLS)
    assert groups is None and "all test cells have the same donor" in notes[0]
    assert groups_of_cells(Obs(donor=["a"] * 6), None, CELLS) == (None, [])


def test_a_column_that_is_not_there_is_refused():
    with pytest.raises(
        ConfigError,
        match=r"evaluation\.group_column: the processed data have no obs column 'patient'; there are batch, donor\.",
    ):
        check_group_column(Obs(donor=["a"], batch=["1"]), "patient")
    check_group_column(Obs(donor=["a"]), None)


def test_donors_that_nobody_respects_are_pointed_out():
    split = {"groups": {"donor_id": {"train": 6, "test": 5}, "mouse": {"train": 1, "test": 1}}}
    (note,) = donors_not_respected(split, None)
    assert "5 values of donor_id" in note and note.endswith("evaluation.group_column=donor_id resamples whole ones")
    assert donors_not_respected(split, "donor_id") == donors_not_respected({}, None) == []


def test_groups_survive_their_file(tmp_path):
    groups = np.array(["d", "a", "b", "a"], dtype=object)
    write_groups(tmp_path, "donor", groups)
    column, found = read_groups(tmp_path)
    assert column == "donor" and found.tolist() == groups.tolist()
    write_groups(tmp_path, "donor", None)
    assert read_groups(tmp_path) == read_groups(tmp_path / "elsewhere") == (None, None)
