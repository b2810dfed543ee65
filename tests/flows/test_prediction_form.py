"""The form of the predict flow: what a page shows, what it refuses, what it asks of a prediction."""

import pytest
from pydantic import ValidationError

from flows.prediction_parameters import PredictParameters

NEEDED = {"model": "latest", "input": "cells.h5ad", "output": "out"}


def test_every_field_has_a_title_a_description_and_one_type():
    schema = PredictParameters.model_json_schema()
    fields = schema["properties"]
    assert schema["required"] == list(fields)[:3] == list(NEEDED)
    assert list(fields)[-1] == "workspace"
    assert [field["position"] for field in fields.values()] == list(range(len(fields)))
    for name, field in fields.items():
        assert field["title"] and field["description"].endswith("."), name
        assert isinstance(field["type"], str) and field.get("default", "") is not None, name


def test_a_form_asks_for_what_it_says():
    form = PredictParameters(**NEEDED, pooling=["first_token", "3"], format="parquet", unknown_below="0.5", umap=True)
    asked = form.asked()
    assert (list(asked.poolings), asked.format, asked.unknown_below, asked.umap) == (
        ["first_token", "3"],
        "parquet",
        0.5,
        True,
    )
    assert asked.annotated == "predicted.h5ad"
    empty = {name: " " for name in ("layer", "format", "batch_column", "unknown_below", "workspace")}
    assert PredictParameters(**NEEDED, **empty, pooling=None) == PredictParameters(**NEEDED)
    assert PredictParameters(**NEEDED, h5ad=False).asked().annotated is None
    assert PredictParameters(**{**NEEDED, "input": "s3://bucket/windows.fa.gz"}).asked().annotated is None, (
        "of sequences"
    )


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"pooling": ["mean"]}, "unknown method 'mean'"),
        ({"unknown_below": "1.5"}, "between 0 and 1"),
        ({"format": "tsv"}, "format"),
        ({"labels": "x"}, "labels"),
        ({"input": ""}, "input"),
    ],
)
def test_what_cannot_be_done_is_refused_at_once(wrong, words):
    with pytest.raises(ValidationError, match=words):
        PredictParameters(**{**NEEDED, **wrong})
