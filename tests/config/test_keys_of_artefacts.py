"""Which parts of a config enter the key of an artefact, and which only say where and how it is made."""

import json

import pytest

from bmfm_pipeline.config import RunConfig, compose
from bmfm_pipeline.config.run_config import EXECUTION_ONLY

# Execution only: the numbers do not depend on them. One value other than the default for each.
DATA_MODULE = {"num_workers": 3, "data_dir": "/elsewhere"}
MODEL = {
    "checkpoint": "/m",
    "use_cache": False,
    "gradient_checkpointing": True,
}  # the weights themselves enter as an input, by content
TASK = {
    "default_root_dir": "/elsewhere",
    "accelerator": "cpu",
    "strategy": "ddp",
    "devices": 2,
    "num_nodes": 2,
    "require_accelerator": True,
    "enable_progress_bar": False,
    "enable_model_summary": True,
    "log_every_n_steps": 77,
    "memory_limit": 8,
    "checkpoint": "/m",
}
# Read when cells are preprocessed: they enter the key of the data, and so of all that is made from it.
OF_THE_DATA = {"dataset_kwargs", "transform_kwargs", "transform_datasets"}

STAGES = ("preprocess", "pretrain", "finetune", "evaluate")
FINE_TUNING = "fine_tune_train_config"


def override(section: str, key: str, value) -> str:
    return f"++{section}.{key}={str(value).lower() if isinstance(value, bool) else value}"


class TestExecutionOnly:
    def test_the_list_of_execution_only_keys(self):
        assert set(EXECUTION_ONLY) == {"data_module", "model", "task"}
        assert set(EXECUTION_ONLY["data_module"]) == set(DATA_MODULE) | OF_THE_DATA
        assert set(EXECUTION_ONLY["model"]) == set(MODEL)
        assert set(EXECUTION_ONLY["task"]) == set(TASK)

    def test_they_are_keys_that_exist(self):
        run = compose("pre_train_config").model_dump(mode="json")
        for section, names in EXECUTION_ONLY.items():
            assert set(names) <= set(run[section])

    @pytest.mark.parametrize(
        ("section", "key"),
        [("data_module", key) for key in DATA_MODULE]
        + [("model", key) for key in MODEL if key != "checkpoint"]
        + [("task", key) for key in TASK if key != "checkpoint"],
    )
    def test_they_do_not_enter_a_key(self, section, key):
        values = {"data_module": DATA_MODULE, "model": MODEL, "task": TASK}[section]
        plain, changed = compose(FINE_TUNING), compose(FINE_TUNING, [override(section, key, values[key])])
        assert changed != plain, "the override must reach the run"
        for stage in STAGES:
            assert changed.key_view(stage) == plain.key_view(stage), stage

    def test_the_address_of_a_checkpoint_does_not_enter_a_key(self):
        views = [compose(FINE_TUNING, [f"model.checkpoint={uri}"]).key_view("finetune") for uri in ("/a", "s3://b/c")]
        assert views[0] == views[1]

    def test_notes_and_the_name_of_a_preset_do_not_enter_a_key(self):
        run = compose("pre_train_config")
        other = run.model_copy(update={"notes": ["something"], "preset_used": "other", "dataset": "other"})
        assert other.key_view("pretrain") == run.key_view("pretrain")

    def test_no_path_enters_a_key_as_text(self):
        paths = [
            "data_module.data_dir=/secret/place",
            "data_module.transform_kwargs.source_h5ad_file_name=/secret/place/a.h5ad",
            "data_module.transform_kwargs.processed_data_source=/secret/place/b.h5ad",
            "data_module.dataset_kwargs.processed_data_source=/secret/place/b.h5ad",
            "data_module.dataset_kwargs.label_dict_path=/secret/place/labels.json",
            "tokenizer.identifier=/secret/place/vocabulary",
            "model.checkpoint=/secret/place/model",
            "task.default_root_dir=/secret/place/training",
            "label_columns=[{label_column_name: celltype}]",
        ]
        run = compose(FINE_TUNING, paths)
        for stage in STAGES:
            assert "/secret" not in str(run.key_view(stage)), stage


class TestWhatEnters:
    @pytest.mark.parametrize(
        "changed",
        [
            "seed.seed_value=2",
            "data_module.batch_size=7",
            "data_module.max_length=256",
            "data_module.mask_ratio=0.5",
            "data_module.limit_dataset_samples=10",
            "data_module.sequence_order=sorted",
            "task.precision=bf16-mixed",
            "task.max_epochs=3",
            "task.accumulate_grad_batches=2",
            "trainer.learning_rate=0.3",
            "trainer.losses=[{field_name: expressions, name: mse}]",
            "model.num_hidden_layers=3",
            "fields.0.is_masked=true",
            "++task.tf32_mode=high",
        ],
    )
    def test_what_changes_the_numbers_enters_the_key_of_a_model(self, changed):
        both = ["model.hidden_size=24"]
        assert compose("pre_train_config", [*both, changed]).key_view("pretrain") != compose(
            "pre_train_config", both
        ).key_view("pretrain")

    @pytest.mark.parametrize("key", ["task.precision=32-true", "data_module.batch_size=7"])
    def test_precision_and_batch_size_enter_the_key_of_a_model(self, key):
        section, name = key.split("=")[0].split(".")
        view = compose("pre_train_config", [key]).key_view("pretrain")
        assert str(view[section][name]) == key.split("=")[1]

    @pytest.mark.parametrize(
        "changed",
        [
            "seed.seed_value=2",
            "data_module.transform_kwargs.random_state=2",
            "data_module.transform_kwargs.transforms=[{transform_name: LogTransform}]",
            "data_module.transform_kwargs.split_weights={train: 0.5, dev: 0.25, test: 0.25}",
            "data_module.transform_kwargs.stratifying_label=donor",
            "data_module.dataset_kwargs.stratifying_label=donor",
            "data_module.transform_kwargs.split_column_name=fold",
            "data_module.dataset_kwargs.split_column_name=fold",
            "data_module.transform_kwargs.fit_on=all",
            "data_module.transform_kwargs.layer=raw",
            "data_module.transform_kwargs.duplicate_genes=sum",
            "data_module.transform_kwargs.input_values=any",
            "data_module.transform_datasets=false",
            "label_columns=[{label_column_name: donor}]",
            "label_columns=[{label_column_name: celltype, is_stratification_label: true, silent_label_values: [x]}]",
            "tokenizer.identifier=/vocabulary",
        ],
    )
    def test_what_changes_the_cells_enters_the_key_of_the_data(self, changed):
        plain = compose(FINE_TUNING).key_view("preprocess")
        assert compose(FINE_TUNING, [changed]).key_view("preprocess") != plain

    @pytest.mark.parametrize(
        "same",
        [
            "data_module.batch_size=7",
            "data_module.max_length=256",
            "trainer.learning_rate=0.3",
            "model.num_hidden_layers=3",
            "task.precision=bf16-mixed",
            "evaluation.controls=full",
        ],
    )
    def test_what_only_concerns_training_leaves_the_data_as_it_is(self, same):
        plain = compose(FINE_TUNING).key_view("preprocess")
        assert compose(FINE_TUNING, [same]).key_view("preprocess") == plain

    def test_an_ontology_enters_as_it_is_read_and_not_by_its_path(self):
        def views(**settings):
            settings = {"file": "/data/cl.obo", **settings}
            column = json.dumps([{"label_column_name": "celltype", "label_ontology": settings}]).replace('"', "")
            run = compose(FINE_TUNING, [f"label_columns={column}"])
            return run.key_view("preprocess"), run.key_view("finetune")

        assert views() == views(file="s3://place/cl.owl")
        for changed in ({"relations": ["is_a", "part_of"]}, {"unmapped": "flat"}, {"terms": {"a": "b"}}):
            assert all(one != other for one, other in zip(views(), views(**changed), strict=True))

    def test_pretraining_and_fine_tuning_share_their_data(self):
        views = [compose(name).key_view("preprocess") for name in ("pre_train_config", FINE_TUNING)]
        assert views[0] == views[1]

    def test_a_seed_and_the_same_random_state_are_one_split(self):
        state = compose(FINE_TUNING, ["data_module.transform_kwargs.random_state=1234"])
        assert state.key_view("preprocess") == compose(FINE_TUNING).key_view("preprocess")

    def test_a_split_column_is_one_whichever_section_names_it(self):
        views = [
            compose(FINE_TUNING, [f"data_module.{section}.split_column_name=fold"]).key_view("preprocess")
            for section in ("transform_kwargs", "dataset_kwargs")
        ]
        assert views[0] == views[1]

    def test_taking_sizes_from_a_checkpoint_is_not_the_same_as_writing_them(self):
        small = ["hidden_size=128", "num_hidden_layers=2", "num_attention_heads=4", "intermediate_size=256"]
        written = compose(FINE_TUNING, [f"model.{size}" for size in small] + ["task.max_steps=3"])
        taken = written.model_copy(update={"sizes_from_checkpoint": True})
        assert taken.key_view("finetune") != written.key_view("finetune")
        assert taken.key_view("pretrain") == written.key_view(
            "pretrain"
        )  # from scratch there is no checkpoint to follow

    @pytest.mark.parametrize("changed", ["evaluation.controls=full", "evaluation.level=0.9", "task.ci_method=binomial"])
    def test_what_changes_an_evaluation_enters_its_key(self, changed):
        assert compose("test_config", [changed]).key_view("evaluate") != compose("test_config").key_view("evaluate")

    def test_evaluation_settings_leave_the_model_as_it_is(self):
        changed = compose(FINE_TUNING, ["evaluation.level=0.9"])
        assert changed.key_view("finetune") == compose(FINE_TUNING).key_view("finetune")


@pytest.mark.parametrize("stage", STAGES)
def test_a_key_is_the_same_for_a_run_read_back_from_its_file(stage):
    name = {"pretrain": "pre_train_config", "evaluate": "test_config"}.get(stage, FINE_TUNING)
    run = compose(name, ["label_columns=[{label_column_name: celltype}]"])
    again = RunConfig.model_validate(run.model_dump(mode="json"))
    assert again.key_view(stage) == run.key_view(stage)
