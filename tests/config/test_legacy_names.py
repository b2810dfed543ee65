"""Configs of bmfm_targets: which of their names are accepted, and that nothing named in a config is ever run."""

import pytest
import yaml

from bmfm_pipeline.config import compose
from bmfm_pipeline.config.strict import Section
from bmfm_pipeline.config.targets import (
    BUILDABLE_MODELS,
    DATA_MODULE_TARGETS,
    MODEL_TARGETS,
    SECTION_TARGETS,
    TASK_TARGETS,
    check_targets,
)
from bmfm_pipeline.errors import ConfigError

LISTS = ("fields", "label_columns")


def placed(section: str, target: str) -> dict:
    """A tree with `target` in the section it belongs to."""
    if section == "pretrained_embedding":
        return {"fields": [{"field_name": "genes", "pretrained_embedding": {"_target_": target, "filename": "/v.txt"}}]}
    if section == "lora_config":
        return {"trainer": {"lora_config": {"_target_": target, "r": 8}}}
    names = {"fields": {"field_name": "genes"}, "label_columns": {"label_column_name": "a"}}.get(section, {})
    entry = {"_target_": target, "_partial_": True, **names}
    return {section: [entry] if section in LISTS else entry}


@pytest.mark.parametrize(
    ("section", "target"), [(name, target) for name, all_ in SECTION_TARGETS.items() for target in all_]
)
def test_every_known_target_is_accepted_in_its_section(section, target):
    check_targets(placed(section, target))


@pytest.mark.parametrize(
    ("section", "target"), [(name, target) for name, all_ in SECTION_TARGETS.items() for target in all_]
)
def test_a_known_target_composes_or_says_what_this_version_lacks(tmp_path, write, section, target):
    write(tmp_path, "mine", yaml.safe_dump(placed(section, target)))
    run = compose("mine", config_dir=tmp_path)
    assert run.task_kind == TASK_TARGETS.get(target, "train")
    assert run.dataset == DATA_MODULE_TARGETS.get(target)
    assert run.model.model_type == MODEL_TARGETS.get(target, "scbert")


@pytest.mark.parametrize("section", [name for name in SECTION_TARGETS if name != "data_module"])
def test_a_target_of_another_section_is_refused(section):
    with pytest.raises(ConfigError, match="is refused"):
        check_targets(placed(section, "bmfm_targets.training.data_module.DataModule"))


def test_the_models_called_buildable_are_those_that_the_models_room_can_build():
    from bmfm_pipeline.config.models import MODELS
    from bmfm_pipeline.models.registry import BACKBONES

    assert set(BUILDABLE_MODELS) == set(BACKBONES) == set(MODELS)


def _everywhere(victim: str) -> dict[str, dict]:
    call = {"_target_": "os.system", "_args_": [f"touch {victim}"], "command": f"touch {victim}"}
    return {
        "top": call,
        "data_module": {"data_module": call},
        "model": {"model": call},
        "trainer": {"trainer": call},
        "task": {"task": call},
        "task.0": {"task": [call]},
        "seed": {"seed": call},
        "fields.0": {"fields": [call]},
        "label_columns.0": {"label_columns": [call]},
        "data_module.transform_kwargs": {"data_module": {"transform_kwargs": call}},
        "data_module.transform_kwargs.transforms.0.transform_args.x": {
            "data_module": {
                "transform_kwargs": {"transforms": [{"transform_name": "a", "transform_args": {"x": call}}]}
            }
        },
        "trainer.losses.0": {"trainer": {"losses": [call]}},
        "task.callbacks.0": {"task": {"callbacks": [call]}},
        "fields.0.encoder_kwargs.deep.0.er": {
            "fields": [{"field_name": "genes", "encoder_kwargs": {"deep": [{"er": call}]}}]
        },
        "anything": {"anything": call},
        "mine": {"mine": call, "seed": {"seed_value": "${mine.command}"}},
        "track_clearml": {"track_clearml": call},
    }


@pytest.mark.parametrize("place", _everywhere(""))
def test_os_system_is_refused_by_name_and_not_run(tmp_path, write, place):
    victim = tmp_path / "was-run"
    write(tmp_path, "mine", yaml.safe_dump(_everywhere(str(victim))[place]))
    with pytest.raises(ConfigError, match=r"_target_: 'os\.system' is refused.*nothing was run") as error:
        compose("mine", config_dir=tmp_path)
    assert str(error.value).startswith("config." if place == "top" else f"{place}.")
    assert not victim.exists()


@pytest.mark.parametrize(
    "override", ["model._target_=os.system", "++data_module._target_=os.system", "+x={_target_: os.system}"]
)
def test_a_target_in_an_override_is_refused_too(override):
    with pytest.raises(ConfigError, match=r"'os\.system' is refused"):
        compose("pre_train_config", [override])


def test_a_target_put_together_from_pieces_is_refused_too(tmp_path, write):
    write(tmp_path, "mine", "a: os\nb: system\nmodel: {_target_: '${a}.${b}'}\n")
    with pytest.raises(ConfigError, match=r"model\._target_: 'os\.system' is refused"):
        compose("mine", config_dir=tmp_path)


@pytest.mark.parametrize(
    ("place", "target", "hint"),
    [
        ("model", "bmfm_targets.config.ScBertConfig", r"did you mean 'bmfm_targets\.config\.SCBertConfig'\?"),
        ("task", "bmfm_targets.config.TrainTaskConfig", r"did you mean 'bmfm_targets\.config\.TrainingTaskConfig'\?"),
        ("trainer", "bmfm_target.config.TrainerConfig", r"did you mean 'bmfm_targets\.config\.TrainerConfig'\?"),
        (
            "data_module",
            "bmfm_targets.training.data_module.PerturbationDataModule",
            r"allowed here: bmfm_targets\.training\.data_module\.DataModule, .*Zheng68kDataModule",
        ),
        ("evaluation", "bmfm_targets.config.TrainerConfig", "no _target_ may stand here"),
    ],
)
def test_a_refused_target_says_what_would_be_right(place, target, hint):
    with pytest.raises(ConfigError, match=hint):
        check_targets({place: {"_target_": target}})


class TestDatasets:
    GENERIC = "bmfm_targets.training.data_module.DataModule"
    ZHENG = "bmfm_targets.datasets.zheng68k.Zheng68kDataModule"
    ON_FINE_TUNING = "defaults: [fine_tune_train_config, _self_]\n"

    def module(self, target: str, more: str = "") -> str:
        return f"{self.ON_FINE_TUNING}data_module:\n  _target_: {target}\n{more}"

    def test_a_dataset_module_names_its_dataset(self, tmp_path, write):
        run = compose("mine", config_dir=write(tmp_path, "mine", self.module(self.ZHENG)))
        assert run.dataset == "zheng68k"
        assert [label.label_column_name for label in run.label_columns] == ["celltype"]
        assert run.data_module.data_dir == "${oc.env:BMFM_TARGETS_ZHENG68K_DATA}"

    def test_the_generic_module_is_about_no_dataset_of_the_catalogue(self, tmp_path, write):
        more = "  transform_kwargs: {source_h5ad_file_name: /a.h5ad}\n  dataset_kwargs: {label_columns: [kind]}\n"
        run = compose("mine", config_dir=write(tmp_path, "mine", self.module(self.GENERIC, more)))
        assert run.dataset is None
        assert [label.label_column_name for label in run.label_columns] == ["kind"]
        names = [step.transform_name for step in run.data_module.transform_kwargs.transforms]
        assert "QcMetricsTransform" not in names and "BinTransform" in names

    def test_the_generic_module_can_take_the_place_of_another_by_an_override(self, tmp_path, write):
        write(tmp_path, "mine", self.module(self.ZHENG, "  data_dir: ${oc.env:BMFM_TARGETS_ZHENG68K_DATA}\n"))
        run = compose(
            "mine",
            [
                f"data_module._target_={self.GENERIC}",
                "data_module.transform_kwargs.source_h5ad_file_name=/a.h5ad",
                "label_columns=[{label_column_name: kind}]",
            ],
            tmp_path,
        )
        assert run.dataset is None

    def test_a_file_that_is_named_takes_the_place_of_a_packaged_dataset(self):
        run = compose("fine_tune_train_config", ["data_module.transform_kwargs.source_h5ad_file_name=/a.h5ad"])
        assert (run.dataset, run.label_columns) == (None, [])

    def test_a_processed_file_that_is_named_takes_the_place_of_a_packaged_dataset_when_it_is_the_input(self):
        named = "data_module.dataset_kwargs.processed_data_source=/p.h5ad"
        assert (
            compose("fine_tune_train_config", [named]).dataset == "zheng68k"
        )  # a copy of its processed cells is asked for
        assert compose("fine_tune_train_config", [named, "data_module.transform_datasets=false"]).dataset is None

    def test_a_file_and_a_dataset_that_are_both_written_are_that_dataset_in_that_file(self):
        run = compose(
            "fine_tune_train_config",
            ["dataset=zheng68k", "data_module.transform_kwargs.source_h5ad_file_name=/a.h5ad"],
        )
        assert run.dataset == "zheng68k"
        assert run.data_module.transform_kwargs.source_h5ad_file_name == "/a.h5ad"

    def test_an_override_of_the_dataset_wins_over_the_module_of_another(self, tmp_path, write):
        folder = write(tmp_path, "mine", self.module(self.ZHENG))
        assert compose("mine", ["dataset=zheng68k-mini"], folder).dataset == "zheng68k-mini"
        assert compose("mine", ["dataset=null", "label_columns=[{label_column_name: a}]"], folder).dataset is None

    def test_two_datasets_in_one_config_are_a_contradiction(self, tmp_path, write):
        write(tmp_path, "mine", self.module(self.ZHENG) + "dataset: zheng68k-mini\n")
        with pytest.raises(
            ConfigError, match=r"dataset is zheng68k-mini, but data_module\._target_ stands for zheng68k"
        ):
            compose("mine", config_dir=tmp_path)

    def test_a_dataset_that_is_not_in_the_catalogue_says_what_to_do(self, tmp_path, write, monkeypatch):
        target = "bmfm_targets.datasets.panglaodb.PanglaoDBDataModule"
        monkeypatch.setitem(DATA_MODULE_TARGETS, target, "elsewhere")
        write(tmp_path, "mine", self.module(target))
        with pytest.raises(ConfigError) as error:
            compose("mine", config_dir=tmp_path)
        for part in ("'elsewhere'", "zheng68k-mini", "one h5ad file", self.GENERIC, "source_h5ad_file_name"):
            assert part in str(error.value)

    def test_labels_named_under_dataset_kwargs_are_label_columns(self, tmp_path, write):
        more = "  dataset_kwargs: {label_columns: [kind], regression_label_columns: [age]}\n"
        run = compose("mine", config_dir=write(tmp_path, "mine", self.module(self.GENERIC, more)))
        assert [(label.label_column_name, label.is_regression_label) for label in run.label_columns] == [
            ("kind", False),
            ("age", True),
        ]

    def test_label_columns_that_are_written_win(self, tmp_path, write):
        more = "  dataset_kwargs: {label_columns: [kind]}\nlabel_columns: [{label_column_name: other}]\n"
        run = compose("mine", config_dir=write(tmp_path, "mine", self.module(self.GENERIC, more)))
        assert [label.label_column_name for label in run.label_columns] == ["other"]


class TestOlderSpellings:
    def test_the_processed_file_and_the_random_state_have_two_names(self, tmp_path, write):
        text = "data_module: {transform_kwargs: {processed_h5ad_file_name: /p.h5ad, split_random_state: 4}}\n"
        transform = compose("mine", config_dir=write(tmp_path, "mine", text)).data_module.transform_kwargs
        assert (transform.processed_data_source, transform.random_state) == ("/p.h5ad", 4)

    def test_options_of_a_value_encoder_have_two_names(self, tmp_path, write):
        text = "fields: [{field_name: genes}, {field_name: expressions, is_masked: true, continuous_value_encoder_kwargs: {kind: mlp}}]"
        assert compose("mine", config_dir=write(tmp_path, "mine", text)).fields[1].encoder_kwargs == {"kind": "mlp"}

    def test_both_names_with_different_values_are_a_contradiction(self, tmp_path, write):
        text = "data_module: {transform_kwargs: {processed_h5ad_file_name: /p, processed_data_source: /q}}\n"
        with pytest.raises(ConfigError, match=r"older spelling of 'processed_data_source'.*keep one"):
            compose("mine", config_dir=write(tmp_path, "mine", text))

    def test_losses_have_older_names(self):
        run = compose(
            "fine_tune_train_config",
            ["trainer.losses=[{label_column_name: celltype, name: cross_entropy, smoothing: 0.1}]"],
        )
        assert run.trainer.losses == [
            {"label_column_name": "celltype", "name": "cross_entropy", "label_smoothing": 0.1}
        ]

    def test_tracking_of_another_service_is_accepted_and_said_to_be_unused(self):
        run = compose("pre_train_config", ["+track_clearml={project_name: p}"])
        assert any("MLflow" in note for note in run.notes)


def _absent() -> list[tuple[str, str]]:
    from bmfm_pipeline.config.run_config import RunConfig, TrainingTaskConfig

    found = []
    for name, field in RunConfig.model_fields.items():
        model = TrainingTaskConfig if name == "task" else field.annotation
        for inner in [model, *(entry.annotation for entry in getattr(model, "model_fields", {}).values())]:
            if isinstance(inner, type) and issubclass(inner, Section):
                prefix = name if inner is model else f"{name}.{_name_of(model, inner)}"
                found += [(prefix, key) for key in inner.absent]
    return found


def _name_of(model: type[Section], inner: type[Section]) -> str:
    return next(name for name, field in model.model_fields.items() if field.annotation is inner)


class TestKeysThatThisVersionDoesNotOffer:
    """They would otherwise be read and have no effect."""

    @pytest.mark.parametrize(("section", "key"), _absent())
    def test_one_that_asks_for_something_is_refused(self, section, key):
        with pytest.raises(
            ConfigError, match=f"{section}: '{key}' is a key of bmfm_targets that this version does not offer"
        ):
            compose("pre_train_config", [f"++{section}.{key}=something"])

    @pytest.mark.parametrize(("section", "key"), _absent())
    def test_one_that_is_off_is_accepted(self, section, key):
        assert compose("pre_train_config", [f"++{section}.{key}=null"]) == compose("pre_train_config")

    @pytest.mark.parametrize(
        ("override", "hint"),
        [
            ("+data_module.dataset_kwargs.filter_query='a == 1'", "select the cells in the h5ad file"),
            ("+data_module.dataset_kwargs.limit_samples=10", r"set data_module\.limit_dataset_samples"),
            ("+trainer.batch_size=64", r"set data_module\.batch_size"),
            ("+task.resume_training_from_ckpt=true", "resumes by itself"),
            ("+data_module.tokenize_kwargs={stride: 2}", "remove it"),
            ("+fields.0.datastore_config={path: /x}", "does not offer"),
            ("++task.callbacks=[{_target_: x}]", r"data_module\.batch_schedule|is refused"),
            (
                "label_columns=[{label_column_name: a, label_ontology: celltypeont}]",
                "is no path of a file.*name an OBO or OWL",
            ),
        ],
    )
    def test_a_refusal_says_what_to_do_instead(self, override, hint):
        with pytest.raises(ConfigError, match=hint):
            compose("pre_train_config", [override])

    @pytest.mark.parametrize(
        "override",
        [
            "data_module.log_normalize_transform=false",
            "+data_module.processed_name=processed",
            "+fields.0.vocab_update_strategy=static",
            "+trainer.batch_prediction_behavior=track",
            "+task.callbacks=[]",
            "+task.enable_checkpointing=true",
        ],
    )
    def test_the_value_that_published_configs_carry_is_accepted(self, override):
        assert compose("pre_train_config", [override, "preset=none"]) == compose("pre_train_config", ["preset=none"])
