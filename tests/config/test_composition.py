"""How a config is found, overridden and put together."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from bmfm_pipeline.config import RunConfig, compose, compose_raw
from bmfm_pipeline.config.run_config import TASKS
from bmfm_pipeline.config.tree import PACKAGED
from bmfm_pipeline.errors import ConfigError

TOP_CONFIGS = sorted(path.stem for path in PACKAGED.glob("*.yaml"))
ON_PRETRAINING = "defaults: [pre_train_config, _self_]\n"


@pytest.mark.parametrize("name", TOP_CONFIGS)
def test_every_packaged_config_composes(name):
    run = compose(name)
    assert isinstance(run, RunConfig)
    others = {"test_config": "test", "predict_config": "predict", "interpret_config": "interpret"}
    assert run.task_kind == others.get(name, "train")


@pytest.mark.parametrize("name", TOP_CONFIGS)
def test_a_run_survives_being_written_as_json(name):
    run = compose(name)
    plain = run.model_dump(mode="json")
    again = RunConfig.model_validate(plain)
    assert again == run
    assert again.model_dump(mode="json") == plain
    assert type(again.task) is type(run.task)


def test_the_names_of_the_commands_are_packaged():
    assert {"pre_train_config", "fine_tune_train_config", "test_config", "predict_config"} <= set(TOP_CONFIGS)


def test_every_key_stands_in_the_packaged_configs_so_that_a_plain_override_reaches_it():
    def missing(model, values, prefix):
        found = []
        for name, field in model.model_fields.items():
            if name not in values:
                found.append(prefix + name)
            elif isinstance(values[name], dict) and hasattr(field.annotation, "model_fields"):
                found += missing(field.annotation, values[name], f"{prefix}{name}.")
        return found

    # Set by composing, not by people; fields that a chosen backbone or the tokenizer fills; tracking of another package.
    unset = {"notes", "preset_used", "sizes_from_checkpoint", "track_clearml", "task"}
    unset |= {"model.model_type", "model.pad_token_id", "model.use_cache", "model.attention_kwargs"}
    raw = compose_raw("pre_train_config")
    assert set(missing(RunConfig, raw, "")) <= unset
    for name in TOP_CONFIGS:
        task = compose_raw(name)["task"]
        kind = compose(name).task_kind
        assert not set(TASKS[kind].model_fields) - set(task), name


class TestFolders:
    def test_a_name_in_the_folder_wins_over_the_packaged_one(self, tmp_path, write):
        write(tmp_path, "pre_train_config", "data_module: {batch_size: 3}\n")
        assert compose("pre_train_config", config_dir=tmp_path).data_module.batch_size == 3

    def test_a_name_that_the_folder_lacks_is_found_in_the_packaged_tree(self, tmp_path):
        assert compose("pre_train_config", config_dir=tmp_path) == compose("pre_train_config")

    def test_a_folder_that_does_not_exist_is_passed_over(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert compose("pre_train_config", config_dir="run") == compose("pre_train_config")

    def test_a_relative_folder_is_meant_from_where_one_stands(self, tmp_path, monkeypatch, write):
        write(tmp_path / "run", "mine", ON_PRETRAINING + "seed: {seed_value: 7}\n")
        monkeypatch.chdir(tmp_path)
        assert compose("mine", config_dir="run").seed.seed_value == 7

    def test_the_extension_may_be_written(self):
        assert compose("pre_train_config.yaml") == compose("pre_train_config")

    def test_groups_of_the_folder_and_of_the_package_mix(self, tmp_path, write):
        write(tmp_path, "model/tiny", "hidden_size: 16\nnum_attention_heads: 2\n")
        write(
            tmp_path, "mine", "defaults: [{model: tiny}, {task: train}, {fields: genes_expressions_masked}, _self_]\n"
        )
        run = compose("mine", config_dir=tmp_path)
        assert (run.model.hidden_size, run.task.max_epochs) == (16, 20)

    def test_a_group_of_the_folder_can_be_chosen_for_a_packaged_config(self, tmp_path, write):
        write(tmp_path, "model/tiny", "hidden_size: 16\nnum_attention_heads: 2\n")
        assert compose("pre_train_config", ["model=tiny"], tmp_path).model.hidden_size == 16

    def test_a_group_of_the_folder_wins_over_a_packaged_one_of_the_same_name(self, tmp_path, write):
        write(tmp_path, "model/scbert", "hidden_size: 16\nnum_attention_heads: 2\n")
        assert compose("pre_train_config", config_dir=tmp_path).model.hidden_size == 16

    def test_a_folder_with_spaces_commas_and_brackets_in_its_name_works(self, tmp_path, write):
        folder = write(tmp_path / "my runs, [old] 'x'", "mine", ON_PRETRAINING + "seed: {seed_value: 7}\n")
        assert compose("mine", config_dir=folder).seed.seed_value == 7

    def test_other_files_in_the_folder_do_not_matter(self, tmp_path, write):
        write(tmp_path, "mine", ON_PRETRAINING)
        write(tmp_path, "k8s/several", "a: 1\n---\nb: 2\n")
        write(tmp_path, "broken", "a: [1\n")
        write(tmp_path, "tagged", "a: !vault x\n")
        assert compose("mine", config_dir=tmp_path).dataset == "zheng68k"

    def test_an_unknown_name_says_where_it_looked_and_what_is_there(self, tmp_path, write):
        write(tmp_path, "mine", ON_PRETRAINING)
        with pytest.raises(ConfigError) as error:
            compose("min", config_dir=tmp_path)
        for part in ("'min'", str(tmp_path), str(PACKAGED), "did you mean 'mine'?", "pre_train_config"):
            assert part in str(error.value)

    def test_an_unknown_name_tells_that_the_folder_is_not_there(self, tmp_path):
        with pytest.raises(ConfigError, match="runs is not a folder"):
            compose("mine", config_dir=tmp_path / "runs")

    def test_an_unknown_group_lists_the_choices(self):
        with pytest.raises(ConfigError, match=r"model/huge.*scbert"):
            compose("pre_train_config", ["model=huge"])


class TestOverrides:
    def test_a_plain_override_changes_a_key(self):
        assert compose("pre_train_config", ["data_module.batch_size=4"]).data_module.batch_size == 4

    def test_a_plus_adds_a_key_that_the_config_leaves_out(self, tmp_path, write):
        write(
            tmp_path, "short", "fields: [{field_name: genes}, {field_name: expressions, is_masked: true}]\nmodel: {}\n"
        )
        assert compose("short", ["+model.hidden_size=24"], tmp_path).model.hidden_size == 24

    def test_a_plain_override_of_a_key_that_the_config_leaves_out_says_how_to_add_it(self, tmp_path, write):
        write(tmp_path, "short", "model: {}\n")
        with pytest.raises(ConfigError, match=r"leaves that key out.*\+model\.hidden_size="):
            compose("short", ["model.hidden_size=24"], tmp_path)

    def test_a_plus_on_a_key_that_is_there_says_what_to_write(self):
        with pytest.raises(ConfigError, match=r"already at 'task\.max_steps'"):
            compose("pre_train_config", ["+task.max_steps=4"])

    @pytest.mark.parametrize("base", ["{}", "{hidden_size: 48}"])
    def test_two_pluses_add_or_change(self, tmp_path, base, write):
        write(tmp_path, "short", f"model: {base}\n")
        assert compose("short", ["++model.hidden_size=24"], tmp_path).model.hidden_size == 24

    def test_a_tilde_removes_a_key_and_its_default_takes_its_place(self):
        assert compose("pre_train_config").data_module.sequence_order == "random"
        assert compose("pre_train_config", ["~data_module.sequence_order"]).data_module.sequence_order is None

    def test_a_tilde_removes_a_section(self):
        assert compose("pre_train_config", ["~trainer"]).trainer.warmup_steps in (0, 20)

    def test_a_tilde_on_a_key_that_is_not_there_is_an_error(self):
        with pytest.raises(ConfigError, match=r"task\.nothing"):
            compose("pre_train_config", ["~task.nothing"])

    def test_later_overrides_win(self):
        assert compose("pre_train_config", ["seed.seed_value=1", "seed.seed_value=2"]).seed.seed_value == 2

    def test_an_entry_of_a_list_can_be_overridden(self):
        assert compose("pre_train_config", ["fields.0.is_masked=true"]).fields[0].is_masked

    def test_lists_and_mappings_can_be_given_whole(self):
        run = compose(
            "fine_tune_train_config",
            [
                'label_columns=[{label_column_name: "cell type"}]',
                "++data_module.limit_dataset_samples={train: 10, val: 5}",
            ],
        )
        assert run.label_columns[0].label_column_name == "cell type"
        assert run.data_module.limit_dataset_samples == {"train": 10, "dev": 5}

    @pytest.mark.parametrize("value", ["/a b/c.h5ad", "/x,y=z/[1].h5ad", "it's.h5ad"])
    def test_a_quoted_value_may_hold_any_character(self, value):
        run = compose("pre_train_config", [f'data_module.transform_kwargs.source_h5ad_file_name="{value}"'])
        assert run.data_module.transform_kwargs.source_h5ad_file_name == value

    def test_a_word_that_is_no_override_says_what_one_looks_like(self):
        with pytest.raises(ConfigError, match=r"'task\.max_epochs:3' is not an override; write key=value"):
            compose("pre_train_config", ["task.max_epochs:3"])


class TestUnknownKeys:
    @pytest.mark.parametrize(
        ("override", "message"),
        [
            (
                "data_module.batchsize=3",
                r"data_module\.batchsize: no such key; did you mean 'data_module\.batch_size'\?",
            ),
            ("+data_module.batchsize=3", r"data_module: unknown key 'batchsize'; did you mean 'batch_size'\?"),
            ("task.max_epoch=3", r"did you mean 'task\.max_epochs'\?"),
            ("+task.max_epoch=3", r"task: unknown key 'max_epoch'; did you mean 'max_epochs'\?"),
            ("+trainer.learning_rat=1", r"did you mean 'learning_rate'\?"),
            ("+model.hiden_size=1", r"did you mean 'hidden_size'\?"),
            ("+fields.0.is_maskd=true", r"fields\.0: unknown key 'is_maskd'; did you mean 'is_masked'\?"),
            (
                "+data_module.transform_kwargs.split_weight=1",
                r"data_module\.transform_kwargs.*did you mean 'split_weights'\?",
            ),
            ("+datset=zheng68k", r"unknown key 'datset'; did you mean 'dataset'\?"),
            ("+tokenizer.identifer=data", r"did you mean 'identifier'\?"),
            ("+seed.seed=1", r"seed: unknown key 'seed'"),
            ("+trainer.zzz=1", r"trainer: unknown key 'zzz'; known keys: betas,.*learning_rate"),
        ],
    )
    def test_an_unknown_key_names_the_one_that_was_probably_meant(self, override, message):
        with pytest.raises(ConfigError, match=message):
            compose("pre_train_config", [override])

    def test_a_test_task_suggests_its_own_keys(self):
        with pytest.raises(ConfigError, match=r"did you mean 'task\.ci_method'\?"):
            compose("test_config", ["task.ci_metod=binomial"])

    def test_an_unknown_section_is_an_error_even_when_it_is_empty(self, tmp_path, write):
        write(tmp_path, "mine", ON_PRETRAINING + "trainr: null\n")
        with pytest.raises(ConfigError, match="unknown key 'trainr'; did you mean 'trainer'"):
            compose("mine", config_dir=tmp_path)

    def test_a_test_task_written_over_a_training_config_says_how_to_replace_the_section(self, tmp_path, write):
        write(tmp_path, "mine", ON_PRETRAINING + "task: {_target_: bmfm_targets.config.TestTaskConfig}\n")
        with pytest.raises(ConfigError, match=r"a test task has no key 'max_epochs'.*override /task: test"):
            compose("mine", config_dir=tmp_path)


class TestValues:
    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("task.max_epochs=many", r"task\.max_epochs: .*integer.*\(found 'many'\)"),
            (
                "data_module.padding=sometimes",
                r"data_module\.padding: .*'max_length' or 'longest', or: .*\(found 'sometimes'\)",
            ),
            ("data_module.limit_dataset_samples=some", r"^data_module\.limit_dataset_samples: [^\n]*\(found 'some'\)$"),
            (
                "data_module.limit_dataset_samples={traim: 3}",
                r"unknown split \['traim'\]; splits are train, dev, test, predict",
            ),
            ("data_module.max_length=500", r"500 is not a multiple of pad_to_multiple_of 16; use 496 or 512"),
            ("data_module.switch_ratio=0.5", r"mask_ratio 1 \+ switch_ratio 0\.5 must not exceed 1"),
            ("data_module.sequence_order=by_name", r"sequence_order: .*'random', 'sorted' or 'chromosomal'"),
            (
                "data_module.transform_kwargs.split_weights.train=0.9",
                r"split_weights: train \+ dev \+ test must be 1, found 1\.18",
            ),
            ("model.num_attention_heads=7", r"hidden_size \d+ is not a multiple of num_attention_heads 7"),
            ("trainer.learning_rate=0", r"trainer\.learning_rate: .*greater than 0"),
            ("task.accelerator=gpuu", r"task\.accelerator: .*'gpu'"),
            ("task.precision=8", r"task\.precision: must be one of auto, 16-mixed"),
            ("label_columns=[celltype]", r"label_columns\.0: a mapping of keys is needed \(found 'celltype'\)"),
            ("label_columns=[{is_regression_label: true}]", r"label_columns\.0\.label_column_name: is required"),
        ],
    )
    def test_a_wrong_value_is_named_with_its_place(self, override, message):
        with pytest.raises(ConfigError, match=message):
            compose("pre_train_config", [override])

    def test_several_problems_are_reported_together(self):
        with pytest.raises(ConfigError) as error:
            compose("pre_train_config", ["data_module.batch_size=0", "trainer.learning_rate=-1"])
        assert "data_module.batch_size" in str(error.value) and "trainer.learning_rate" in str(error.value)

    @pytest.mark.parametrize("section", ["model", "data_module", "trainer", "task", "seed", "tokenizer"])
    def test_a_section_that_is_no_mapping_is_named(self, tmp_path, section, write):
        write(tmp_path, "mine", f"{ON_PRETRAINING}{section}: scbert\n")
        with pytest.raises(ConfigError, match=f"{section}: a mapping of keys is needed here, found 'scbert'"):
            compose("mine", config_dir=tmp_path)

    def test_an_empty_section_means_its_defaults(self, tmp_path, write):
        write(tmp_path, "mine", "seed:\nmodel:\nfields:\ntrainer:\ntask:\ndata_module:\n")
        run = compose("mine", config_dir=tmp_path)
        assert [field.field_name for field in run.fields] == ["genes", "expressions"]

    def test_a_value_that_is_required_is_named(self, tmp_path, write):
        write(tmp_path, "mine", "seed:\n  seed_value: ???\n")
        with pytest.raises(ConfigError, match=r"seed\.seed_value: a value is required"):
            compose("mine", config_dir=tmp_path)
        assert compose("mine", ["seed.seed_value=3"], tmp_path).seed.seed_value == 3


class TestVariablesOfOnesOwn:
    CONFIG = ON_PRETRAINING + (
        "cells: ???\nplaces: {out: /results}\n"
        "data_module:\n  transform_kwargs:\n    source_h5ad_file_name: ${cells}\n    processed_data_source: ${places.out}/p.h5ad\n"
    )

    def test_a_key_at_the_top_that_others_refer_to_is_no_unknown_key(self, tmp_path, write):
        run = compose("mine", ["cells=/data/a.h5ad"], write(tmp_path, "mine", self.CONFIG))
        transform = run.data_module.transform_kwargs
        assert (transform.source_h5ad_file_name, transform.processed_data_source) == ("/data/a.h5ad", "/results/p.h5ad")

    def test_one_that_must_be_given_is_named(self, tmp_path, write):
        with pytest.raises(ConfigError, match="cells: a value is required"):
            compose("mine", config_dir=write(tmp_path, "mine", self.CONFIG))

    def test_a_reference_to_nothing_is_named_with_its_place(self):
        with pytest.raises(ConfigError, match=r"task\.max_steps: Interpolation key 'nothing' not found"):
            compose("pre_train_config", ["task.max_steps=${nothing}"])

    def test_the_number_of_cores_can_be_asked_for(self):
        run = compose("pre_train_config", ["data_module.num_workers='${num_cores_auto:}'"])
        assert run.data_module.num_workers >= 1


class TestYaml:
    def test_a_key_written_twice_with_one_value_is_read_once(self, tmp_path, write):
        text = ON_PRETRAINING + (
            "data_module:\n  num_workers: 3  # here\n  batch_size: 4\n  num_workers: 3 # and here\n"
            "  transform_kwargs: {layer: raw, layer: raw}\n"
            "model:\n  layer_norm_eps: 1e-7\n"
            "evaluation:\n  level: 0.9\nevaluation:\n  level: 0.9\nseed: {seed_value: 5}\n"
        )
        run = compose("mine", config_dir=write(tmp_path, "mine", text))
        assert (run.data_module.num_workers, run.data_module.batch_size) == (3, 4)
        assert run.data_module.transform_kwargs.layer == "raw"
        assert (run.model.layer_norm_eps, run.evaluation.level, run.seed.seed_value) == (1e-7, 0.9, 5)

    def test_a_file_with_repeated_keys_is_left_as_it_is(self, tmp_path, write):
        text = ON_PRETRAINING + "seed:\n  seed_value: 5\n  seed_value: 5\n"
        compose("mine", config_dir=write(tmp_path, "mine", text))
        assert (tmp_path / "mine.yaml").read_text() == text
        assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]

    def test_repeated_keys_in_a_group_are_mended_and_its_package_line_kept(self, tmp_path, write):
        text = "# @package _global_\nseed:\n  seed_value: 6\n  seed_value: 6\n"
        write(tmp_path, "extra/six", text)
        write(tmp_path, "mine", "defaults: [pre_train_config, {extra: six}, _self_]\n")
        assert compose("mine", config_dir=tmp_path).seed.seed_value == 6

    def test_a_key_written_twice_with_two_values_is_an_error(self, tmp_path, write):
        write(tmp_path, "mine", ON_PRETRAINING + "seed:\n  seed_value: 5\n  seed_value: 6\n")
        with pytest.raises(
            ConfigError, match=r"mine\.yaml, line 4: 'seed_value' is given twice, first as 5 and then as 6"
        ):
            compose("mine", config_dir=tmp_path)

    def test_what_is_no_yaml_is_named_with_its_line(self, tmp_path, write):
        write(tmp_path, "mine", ON_PRETRAINING + "seed: {seed_value: [1\n")
        with pytest.raises(ConfigError, match=r"mine\.yaml, line \d: not valid YAML"):
            compose("mine", config_dir=tmp_path)

    @pytest.mark.parametrize(
        "content", ["- a\n- b\n", "a: 1\n---\nb: 2\n", "a: !python/object/apply:os.system [true]\n"]
    )
    def test_a_file_of_another_shape_is_an_error_and_not_a_crash(self, tmp_path, content, write):
        with pytest.raises(ConfigError):
            compose("mine", config_dir=write(tmp_path, "mine", content))

    def test_a_file_in_another_encoding_is_an_error_and_not_a_crash(self, tmp_path):
        (tmp_path / "mine.yaml").write_bytes("seed: {seed_value: 1} # \xe4\n".encode("latin-1"))
        with pytest.raises(ConfigError, match="mine"):
            compose("mine", config_dir=tmp_path)


def test_composing_from_several_threads_gives_each_its_own_config(tmp_path, write):
    for number in range(8):
        write(tmp_path / str(number), "mine", f"{ON_PRETRAINING}seed: {{seed_value: {number}}}\n")

    def one(number: int) -> tuple[int, int]:
        run = compose("mine", [f"data_module.batch_size={number + 1}"], tmp_path / str(number))
        return run.seed.seed_value, run.data_module.batch_size

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(one, range(8))) == [(number, number + 1) for number in range(8)]


def test_composing_inside_a_hydra_application_leaves_its_hydra_alone(tmp_path, write):
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    write(tmp_path, "theirs", "a: 1\n")
    with initialize_config_dir(config_dir=str(tmp_path), version_base="1.2"):
        compose("pre_train_config")
        assert hydra_compose("theirs").a == 1


def test_composing_imports_no_torch():
    code = (
        "import sys, bmfm_pipeline.config as config; config.compose('pre_train_config'); config.list_entries();"
        "heavy = {'torch', 'scanpy', 'anndata', 'mlflow', 'transformers', 'pytorch_lightning', 'prefect', 'numpy'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_importing_the_room_imports_nothing_heavy():
    code = "import sys, bmfm_pipeline.config; print(sorted({'torch', 'hydra', 'pydantic'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_packaged_files_are_part_of_the_wheel():
    settings = Path(__file__).parents[2] / "pyproject.toml"
    if not settings.exists():
        pytest.skip("not run from a checkout")
    import tomllib

    patterns = tomllib.loads(settings.read_text())["tool"]["setuptools"]["package-data"]["bmfm_pipeline"]
    assert {"run/**/*.yaml", "datasets/*.yaml"} <= set(patterns)


def test_packaged_files_hold_no_repeated_keys():
    from bmfm_pipeline.config.yaml_files import without_repeats

    for path in PACKAGED.rglob("*.yaml"):
        assert without_repeats(path) is None, path
        assert yaml.safe_load(path.read_text()) is not None, path
