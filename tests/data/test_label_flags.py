"""True/false columns of obs gathered into one label column of several classes a cell."""

import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError

from bmfm_pipeline.config import LabelColumnInfo
from bmfm_pipeline.data.label_flags import with_gathered_columns
from bmfm_pipeline.data.label_values import encode_members
from bmfm_pipeline.errors import DataError


def column(**keys) -> LabelColumnInfo:
    named = {"label_column_name": "kinds", "is_multilabel": True, "from_columns": ["t", "b", "other"]}
    return LabelColumnInfo(**(named | keys))


@pytest.fixture
def obs() -> pd.DataFrame:
    """Four cells: t and other; none; unknown; b."""
    return pd.DataFrame(
        {"t": [True, False, True, False], "b": [0, 0, 1, 1], "other": ["yes", "No", None, "false"]},
        index=["one", "two", "three", "four"],
    )


def test_each_true_column_is_a_class_of_the_cell(obs):
    found = with_gathered_columns(obs, [column()], "cells.h5ad")
    assert found["kinds"].tolist()[:2] == ["t|other", "|"] and found["kinds"].isna().tolist() == [
        False,
        False,
        True,
        False,
    ]
    assert "kinds" not in obs, "the table it came from is left alone"
    encoded = encode_members(found["kinds"], {"b": 0, "other": 1, "t": 2}, None, "|", "kinds")
    assert encoded.tolist() == [[0, 1, 1], [0, 0, 0], [-100, -100, -100], [1, 0, 0]]


def test_categories_and_numbers_with_gaps_count_too(obs):
    obs["t"] = pd.Categorical(["True", "False", "True", "False"])
    obs["b"] = [0.0, 1.0, np.nan, 1.0]
    found = with_gathered_columns(obs, [column(multilabel_str_sep="; ")], "cells.h5ad")["kinds"]
    assert found.tolist()[:2] == ["t; other", "b"] and pd.isna(found.iloc[2]) and found.iloc[3] == "b"


def test_without_such_columns_the_table_is_what_it_was(obs):
    assert with_gathered_columns(obs, [LabelColumnInfo(label_column_name="t")], "cells.h5ad") is obs


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"b": [0, 1, 2, 0]}, r"obs\['b'\] is to be a class of its own \(from_columns\), and holds 2; true or false"),
        ({"kinds": "x"}, "obs has a column 'kinds' already"),
        ({"b": None}, "no column 'b', which label_columns names under from_columns"),
    ],
)
def test_what_cannot_be_gathered_is_said(obs, change, said):
    for name, values in change.items():
        obs = obs.drop(columns=name) if values is None else obs.assign(**{name: values})
    with pytest.raises(DataError, match=said):
        with_gathered_columns(obs, [column()], "cells.h5ad")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"is_multilabel": False}, "set is_multilabel=true"),
        ({"from_columns": ["t", "t"]}, "names t more than once"),
        ({"from_columns": ["a|b"]}, "set another multilabel_str_sep"),
        ({"from_columns": []}, "at least 1 item"),
    ],
)
def test_a_column_that_cannot_be_is_refused(keys, said):
    with pytest.raises(ValidationError, match=said):
        column(**keys)
