"""The form of the benchmark flow, and where work is spread to."""

import pytest
from pydantic import ValidationError

from bmfm_pipeline.config.suites import load_suite, suite_with
from bmfm_pipeline.errors import ConfigError
from flows.benchmark_parameters import BenchmarkParameters


def test_every_field_has_a_title_a_description_and_one_type():
    for name, field in BenchmarkParameters.model_json_schema()["properties"].items():
        assert field["title"] and field["title"] != name, name
        assert field["description"].endswith("."), name
        assert isinstance(field["type"], str), name
        assert field.get("default", "") is not None, name


def test_what_is_filled_in_becomes_the_words_of_the_command_line():
    form = BenchmarkParameters(
        suite="demo", seeds=3, models=" ", controls="full", seeds_of="training", overrides=["task.max_steps=5"]
    )
    assert form.words() == ["seeds=3", "seeds_of=training", "controls=full", "task.max_steps=5"]
    suite = suite_with(load_suite("demo"), form.words())
    assert (len(suite.seeds), suite.seeds_of, suite.control_words) == (3, "training", "full")
    assert BenchmarkParameters().words() == [] and BenchmarkParameters(seeds=[4, 5]).seeds == "[4, 5]"
    with pytest.raises(ValidationError, match="extra"):
        BenchmarkParameters(target="zheng68k")


def test_where_work_is_done(monkeypatch):
    pytest.importorskip("prefect")
    from flows.fanning import place_of_work

    monkeypatch.delenv("BMFM_DASK", raising=False)
    assert place_of_work() == place_of_work("here") == "here"
    assert place_of_work("dask") == "dask" and place_of_work("tcp://one:8786") == "tcp://one:8786"
    monkeypatch.setenv("BMFM_DASK", "local")
    assert place_of_work() == "dask" and place_of_work("here") == "here"
    monkeypatch.setenv("BMFM_DASK", "cluster")
    with pytest.raises(ConfigError, match=r"BMFM_DASK=cluster: write here, dask .* or the address of a scheduler"):
        place_of_work()
