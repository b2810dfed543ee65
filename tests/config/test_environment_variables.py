"""Environment variables are looked up when they are needed, and named when they are missing."""

import pytest

from bmfm_pipeline.config import compose, require_path
from bmfm_pipeline.errors import ConfigError

ZHENG = "BMFM_TARGETS_ZHENG68K_DATA"
ON_FINE_TUNING = "defaults: [fine_tune_train_config, _self_]\n"


def test_a_variable_that_is_not_set_is_no_error_until_its_path_is_needed():
    run = compose("fine_tune_train_config")
    assert run.data_module.data_dir == f"${{oc.env:{ZHENG}}}"
    with pytest.raises(ConfigError) as error:
        require_path(run.data_module.data_dir, "data_module.data_dir")
    for part in ("data_module.data_dir", ZHENG, f"export {ZHENG}=", "h5ad/zheng68k.h5ad", "bmfm run zheng68k-mini"):
        assert part in str(error.value)


def test_a_variable_that_is_set_is_taken_over(monkeypatch):
    monkeypatch.setenv(ZHENG, "/data/zheng")
    assert compose("fine_tune_train_config").data_module.data_dir == "/data/zheng"


def test_a_variable_that_is_set_later_or_elsewhere_is_used_then(monkeypatch):
    run = compose("fine_tune_train_config")
    monkeypatch.setenv(ZHENG, "/data/zheng")
    assert require_path(run.data_module.data_dir, "data_module.data_dir") == "/data/zheng"


def test_a_variable_inside_a_path_keeps_the_rest(tmp_path, write, monkeypatch):
    text = (
        ON_FINE_TUNING + "data_module: {transform_kwargs: {source_h5ad_file_name: '${oc.env:MY_CELLS}/raw/a.h5ad'}}\n"
    )
    named = compose("mine", config_dir=write(tmp_path, "mine", text)).data_module.transform_kwargs.source_h5ad_file_name
    assert named == "${oc.env:MY_CELLS}/raw/a.h5ad"
    with pytest.raises(ConfigError, match="MY_CELLS is not set"):
        require_path(named, "source")
    monkeypatch.setenv("MY_CELLS", "/cells")
    assert require_path(named, "source") == "/cells/raw/a.h5ad"
    assert (
        compose("mine", config_dir=tmp_path).data_module.transform_kwargs.source_h5ad_file_name == "/cells/raw/a.h5ad"
    )


def test_a_variable_that_is_reached_through_another_key_stays_lazy(tmp_path, write):
    text = (
        ON_FINE_TUNING
        + "work: ${oc.env:MY_CELLS}\ndata_module: {dataset_kwargs: {label_dict_path: '${work}/labels.json'}}\n"
    )
    run = compose("mine", config_dir=write(tmp_path, "mine", text))
    assert run.data_module.dataset_kwargs.label_dict_path == "${oc.env:MY_CELLS}/labels.json"


def test_an_empty_variable_counts_as_not_set(monkeypatch):
    monkeypatch.setenv(ZHENG, "")
    with pytest.raises(ConfigError, match=ZHENG):
        require_path(compose("fine_tune_train_config").data_module.data_dir, "data_module.data_dir")


def test_a_default_that_the_config_gives_is_taken(tmp_path, write):
    text = (
        ON_FINE_TUNING
        + "data_module: {transform_kwargs: {source_h5ad_file_name: '${oc.env:MY_CELLS,/fallback.h5ad}'}}\n"
    )
    run = compose("mine", config_dir=write(tmp_path, "mine", text))
    assert run.data_module.transform_kwargs.source_h5ad_file_name == "/fallback.h5ad"


def test_the_training_folder_that_is_not_set_is_the_workspace(tmp_path, write, monkeypatch):
    text = ON_FINE_TUNING + "task: {default_root_dir: '${oc.env:BMFM_TARGETS_TRAINING_DIR}'}\n"
    assert compose("mine", config_dir=write(tmp_path, "mine", text)).task.default_root_dir is None
    monkeypatch.setenv("BMFM_TARGETS_TRAINING_DIR", "/runs")
    assert compose("mine", config_dir=tmp_path).task.default_root_dir == "/runs"


def test_a_plain_path_needs_no_variable():
    assert require_path("s3://bucket/a.h5ad", "source") == "s3://bucket/a.h5ad"


def test_a_folder_is_not_used_by_a_dataset_that_is_built():
    run = compose("fine_tune_train_config", ["dataset=zheng68k-mini", "data_module.data_dir=/data"])
    assert run.data_module.data_dir is None
    assert any("data_module.data_dir is not used" in note for note in run.notes)
