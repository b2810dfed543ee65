"""Datasets by name: every entry is complete, and a name that is not there is answered with one that is."""

import pytest

from bmfm_pipeline.config import compose, list_entries, load_entry
from bmfm_pipeline.config.catalogue import FOLDER, DatasetEntry, default_transforms
from bmfm_pipeline.errors import ConfigError

NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))


def test_all_files_of_the_folder_are_entries():
    assert sorted(entry.name for entry in list_entries()) == NAMES
    assert {"zheng68k", "zheng68k-mini"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
class TestEveryEntry:
    def test_it_loads_under_the_name_of_its_file(self, name):
        entry = load_entry(name)
        assert entry.name == name and entry.title and entry.citation and entry.transforms

    def test_it_says_where_its_cells_come_from(self, name):
        source = load_entry(name).source
        assert (source.builder is None) == (source.env is not None and source.file is not None)

    def test_its_labels_with_known_classes_are_its_label_columns(self, name):
        entry = load_entry(name)
        assert set(entry.expected_labels) <= {label.label_column_name for label in entry.label_columns}
        for classes in entry.expected_labels.values():
            assert classes == sorted(set(classes))

    def test_both_trainings_compose_on_it(self, name):
        for config in ("pre_train_config", "fine_tune_train_config"):
            run = compose(config, [f"dataset={name}"])
            assert run.dataset == name
            assert [label.label_column_name for label in run.label_columns] == [
                label.label_column_name for label in load_entry(name).label_columns
            ]
            assert len(run.data_module.transform_kwargs.transforms) == len(load_entry(name).transforms)

    def test_its_transforms_exist_with_these_arguments(self, name):
        from bmfm_pipeline.data.transforms import build_chain

        build_chain([step.model_dump() for step in load_entry(name).transforms])

    def test_a_schedule_is_a_cron_line_in_a_time_zone_that_exists(self, name):
        import zoneinfo

        schedule = load_entry(name).evaluate_schedule
        if schedule is not None:
            assert len(schedule.cron.split()) == 5
            zoneinfo.ZoneInfo(schedule.timezone)


def test_the_default_chain_exists_with_these_arguments():
    from bmfm_pipeline.data.transforms import build_chain

    build_chain(default_transforms())


@pytest.mark.parametrize("name", ["zheng68", "zheng68k_mini", "Zheng68k"])
def test_a_name_that_is_nearly_right_is_answered_with_the_right_one(name):
    with pytest.raises(ConfigError, match=rf"dataset: '{name}' is not in the catalogue \(.*\); did you mean 'zheng68k"):
        compose("pre_train_config", [f"dataset={name}"])


@pytest.mark.parametrize("name", ["../run/pre_train_config", "/etc/passwd", "", "zheng68k/../zheng68k", "."])
def test_a_name_is_no_path(name):
    with pytest.raises(ConfigError, match="is not in the catalogue"):
        load_entry(name)


def test_a_data_module_of_bmfm_targets_stands_for_its_dataset():
    run = compose("fine_tune_train_config", ["++data_module._target_=bmfm_targets.datasets.scp1884.SCP1884DataModule"])
    assert run.dataset == "scp1884" and run.label_columns[0].label_column_name == "Celltype"


def test_a_dataset_with_a_split_of_its_own_is_split_by_it():
    run = compose("fine_tune_train_config", ["dataset=multiple_sclerosis"])
    assert run.data_module.transform_kwargs.split_column_name == "split_cross"
    assert run.data_module.transform_kwargs.input_values == "any"


def test_what_is_written_wins_over_the_entry():
    run = compose(
        "fine_tune_train_config",
        [
            "label_columns=[{label_column_name: donor}]",
            "data_module.transform_kwargs.transforms=[]",
            "data_module.data_dir=/d",
        ],
    )
    assert [label.label_column_name for label in run.label_columns] == ["donor"]
    assert run.data_module.transform_kwargs.transforms == []
    assert run.data_module.data_dir == "/d"


def test_a_run_does_not_share_its_lists_with_the_entry():
    compose("pre_train_config").data_module.transform_kwargs.transforms.clear()
    compose("pre_train_config").label_columns.clear()
    assert compose("pre_train_config").data_module.transform_kwargs.transforms
    assert load_entry("zheng68k").label_columns


@pytest.mark.parametrize("cron", ["every monday", "0 3 * *", "0 3 * * 1 2"])
def test_a_schedule_that_is_no_cron_line_is_refused(cron):
    entry = load_entry("zheng68k").model_dump()
    with pytest.raises(ValueError, match="five fields"):
        DatasetEntry.model_validate(entry | {"evaluate_schedule": {"cron": cron}})


def test_a_time_zone_that_does_not_exist_is_refused():
    entry = load_entry("zheng68k").model_dump()
    with pytest.raises(ValueError, match="Middle/Earth"):
        DatasetEntry.model_validate(entry | {"evaluate_schedule": {"cron": "0 3 * * 1", "timezone": "Middle/Earth"}})
