"""Datasets by name: every entry is complete, and a name that is not there is answered with one that is."""

import pytest

from bmfm_pipeline.config import compose, list_entries, load_entry
from bmfm_pipeline.config.catalogue import FOLDER, DatasetEntry, default_transforms
from bmfm_pipeline.config.splits import resolve_split
from bmfm_pipeline.errors import ConfigError

NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))


def test_all_files_of_the_folder_are_entries():
    assert sorted(entry.name for entry in list_entries()) == NAMES
    assert {"zheng68k", "zheng68k-mini"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
class TestEveryEntry:
    def test_it_loads_under_the_name_of_its_file(self, name):
        entry = load_entry(name)
        assert entry.name == name and entry.title and entry.citation and (entry.transforms or entry.kind == "dna")

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
    assert run.data_module.transform_kwargs.input_values == "log_normalised"


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


TRANSFORM = "data_module.transform_kwargs"


def split_of(*words: str) -> dict:
    run = compose("fine_tune_train_config", ["dataset=scp1884", *words])
    return resolve_split(run).made_with()


def test_a_rule_of_the_dataset_splits_it_and_takes_other_shares():
    assert (split_of()["method"], split_of()["group"]) == ("stratified_group", "donor_id")
    shares = split_of(f"{TRANSFORM}.split.weights={{train: 0.6, dev: 0.2, test: 0.2}}")
    assert shares["group"] == "donor_id" and shares["weights"]["train"] == 0.6


@pytest.mark.parametrize(
    ("word", "method"),
    [
        (f"{TRANSFORM}.split.group=null", "stratified"),
        (f"{TRANSFORM}.split.method=random", "random"),
        (f"{TRANSFORM}.split_column_name=fold", "column"),
        (f"{TRANSFORM}.split.n_folds=5", "kfold"),
    ],
)
def test_another_split_that_is_written_replaces_the_rule(word, method):
    found = split_of(word)
    assert found["method"] == method and "group" not in found


def test_words_of_a_split_column_are_mapped_by_the_entry():
    run = compose("fine_tune_train_config", ["dataset=sciplex3"])
    found = resolve_split(run).made_with()
    assert found["from_column"] == "split_random" and found["mapping"] == {
        "train": "train",
        "test": "dev",
        "ood": "test",
    }


def test_genes_and_batches_are_as_the_entry_says_and_as_is_written():
    run = compose("fine_tune_train_config", ["dataset=onek1k", f"{TRANSFORM}.gene_names.min_share_of_counts=0.2"])
    names = run.data_module.transform_kwargs.gene_names
    assert (names.table, names.min_share_of_counts) == ("hgnc", 0.2)
    run = compose("fine_tune_train_config", ["dataset=onek1k", f"{TRANSFORM}.gene_names.table=null"])
    assert run.data_module.transform_kwargs.gene_names.table is None
    assert compose("test_config", ["dataset=sceval"]).evaluation.batch_column == "batch"
    assert compose("test_config", ["dataset=sceval", "evaluation.batch_column=lab"]).evaluation.batch_column == "lab"


def test_another_file_of_a_dataset_is_looked_for_in_its_folder(monkeypatch):
    word = f"{TRANSFORM}.source_h5ad_file_name=other.h5ad"
    monkeypatch.delenv("BMFM_TARGETS_SCEVAL_DATA", raising=False)
    assert compose("fine_tune_train_config", ["dataset=sceval", word]).data_module.data_dir is None
    monkeypatch.setenv("BMFM_TARGETS_SCEVAL_DATA", "/atlases")
    assert compose("fine_tune_train_config", ["dataset=sceval", word]).data_module.data_dir == "/atlases"


class TestLogNormalisedInput:
    WORD = f"{TRANSFORM}.input_values=log_normalised"

    def steps(self, *words: str) -> list[str]:
        run = compose("fine_tune_train_config", list(words))
        return [step.transform_name for step in run.data_module.transform_kwargs.transforms]

    def test_the_default_chains_leave_out_what_was_done_already(self):
        own = ["dataset=null", f"{TRANSFORM}.source_h5ad_file_name=/d/cells.h5ad"]
        for words in (own, ["dataset=zheng68k"]):
            before, after = self.steps(*words), self.steps(*words, self.WORD)
            assert [name for name in before if name not in after] == ["NormalizeTotalTransform", "LogTransform"]

    @pytest.mark.parametrize("name", ["NormalizeTotalTransform", "LogTransform"])
    def test_a_step_that_would_do_it_again_is_refused(self, name):
        words = [self.WORD, f"{TRANSFORM}.transforms=[{{transform_name: {name}}}]"]
        with pytest.raises(ConfigError, match=f"transforms.0: {name} would normalise a second time"):
            compose("fine_tune_train_config", words)

    def test_reads_cannot_be_drawn_from_logarithms(self):
        with pytest.raises(ConfigError, match="draws reads, and log-normalised values"):
            compose("fine_tune_train_config", [self.WORD, "data_module.rda_transform=downsample"])


def test_an_entry_names_classes_of_its_label_columns_and_one_split():
    entry = load_entry("scp1884").model_dump()
    with pytest.raises(ValueError, match="classes are given for other, which is none of label_columns"):
        DatasetEntry.model_validate(entry | {"classes": {"other": 3}})
    with pytest.raises(ValueError, match="both say how cells are split"):
        DatasetEntry.model_validate(entry | {"split_column_name": "fold"})
    assert load_entry("scp1884").n_classes("Celltype") == 68 and load_entry("zheng68k").n_classes("celltype") == 11
