"""Every key of every section is read, kept and shown."""

import pytest
import yaml

from bmfm_pipeline.config import compose
from bmfm_pipeline.config.strict import Section
from bmfm_pipeline.errors import ConfigError

# One value other than the default for each key of bmfm_targets' sections that this version offers.
SECTIONS = {
    "seed": {"seed_value": 99},
    "tokenizer": {"identifier": "/vocabularies/mine", "prepend_tokens": ["[CLS_0]", "[CLS_1]"]},
    "data_module": {
        "data_dir": "/data",
        "transform_datasets": False,
        "collation_strategy": "language_modeling",
        "mlm": True,
        "batch_size": 3,
        "num_workers": 2,
        "shuffle": False,
        "max_length": 64,
        "max_mfi_data_len": 40,
        "padding": "max_length",
        "truncation": False,
        "pad_to_multiple_of": 8,
        "sequence_order": "chromosomal",
        "gene_positions": "/positions.csv",
        "sequence_dropout_factor": 0.1,
        "selective_dropout": {
            "fraction": 0.2,
            "pattern_weights": [["^RP", 3.0]],
            "weights": "/weights.csv",
            "adaptive": True,
            "temperature": 2.0,
            "decreasing": True,
        },
        "pad_zero_expression_strategy": {
            "strategy": "batch_wise",
            "interleave_zero_ratio": 0.4,
            "expressed_sample_ratio": 0.1,
            "granularity": 5,
        },
        "log_normalize_transform": True,
        "median_normalization": "/medians.csv",
        "masking_strategy": {"kind": "pattern", "pattern_weights": [["^RP", 0.0]], "use_for_validation": True},
        "change_ratio": 0.3,
        "mask_ratio": 0.6,
        "switch_ratio": 0.2,
        "comask_across_fields": False,
        "prevent_attention_to_masked": True,
        "limit_dataset_samples": 50,
        "train_fraction": 0.25,
        "limit_genes": None,
        "map_orthologs": "mouse_to_human_orthologs",
        "batch_schedule": [{"max_length": 32, "batch_size": 5}, {"max_length": 48, "batch_size": 4}],
        "test_batch_size": 7,
        "test_max_length": 96,
        "dataset_kwargs": {
            "processed_data_source": "/p.h5ad",
            "expose_zeros": "all",
            "label_columns": ["a"],
            "regression_label_columns": ["b"],
            "label_dict_path": "/labels.json",
            "stratifying_label": "a",
            "split_column_name": "fold",
        },
        "transform_kwargs": {
            "source_h5ad_file_name": "/raw.h5ad",
            "processed_data_source": "/p.h5ad",
            "transforms": [{"transform_name": "LogTransform", "transform_args": {"base": 2}}],
            "split": {
                "mapping": {"training": "train", "held out": "test"},
                "dev_fraction": 0.2,
                "cells_per_class": 5,
                "name": "mine",
            },
            "split_column_name": "fold",
            "split_weights": {"train": 0.5, "dev": 0.25, "test": 0.25},
            "random_state": 5,
            "stratifying_label": "a",
            "fit_on": "all",
            "layer": "raw",
            "duplicate_genes": "sum",
            "input_values": "any",
            "cell_names": "prefix",
            "max_share_of_files_set_aside": 0.2,
            "gene_names": {
                "table": "/hgnc.txt",
                "duplicates": "highest",
                "min_share_of_counts": 0.3,
                "orthologs": "/orthologs.csv",
                "ortholog_columns": ["mouse", "human"],
                "one_to_many": "first",
            },
        },
    },
    "model": {
        "hidden_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 40,
        "hidden_act": "relu",
        "hidden_dropout_prob": 0.2,
        "attention_probs_dropout_prob": 0.3,
        "initializer_range": 0.05,
        "layer_norm_eps": 1e-6,
        "use_cache": False,
        "classifier_dropout": 0.4,
        "classifier_pooling": "mean",
        "load": "encoder",
        "position_embedding_type": "absolute",
        "max_position_embeddings": 600,
        "attention": "classic",
        "gradient_checkpointing": True,
        "cell_summary": False,
        "linear_path": False,
        "gene_vectors": "svd",
        "checkpoint": "/models/one",
    },
    "trainer": {
        "losses": [{"field_name": "expressions", "name": "cross_entropy", "weight": 0.5}],
        "learning_rate": 0.002,
        "betas": [0.8, 0.95],
        "epsilon": 1e-7,
        "weight_decay": 0.2,
        "warmup_steps": 7,
        "lr_decay_steps": 70,
        "lr_schedule": "cosine",
        "min_lr_ratio": 0.1,
        "layerwise_lr_decay": 0.8,
        "ema_decay": 0.99,
        "pooling_method": "mean_pooling",
        "lora_config": {
            "preset": None,
            "r": 4,
            "lora_alpha": 8.0,
            "lora_dropout": 0.2,
            "bias": "all",
            "use_dora": False,
            "layers_to_transform": [0, 2],
            "layers_pattern": ["layer"],
            "target_modules": ["query", "value"],
        },
    },
    "evaluation": {
        "controls": "full",
        "rare_class_floor": 3,
        "level": 0.9,
        "resamples": 20,
        "stratified": True,
        "group_column": "donor",
        "batch_column": "batch",
        "unknown_threshold": 0.5,
        "unknown_target_accuracy": 0.9,
        "masked_positions": 5000,
        "label_mapping": "map.csv",
        "label_ontology": {"file": "cl.owl", "relations": ["part_of"], "terms": {"B": "CL:1"}, "unmapped": "flat"},
        "label_from": {"celltype": "cell_type"},
        "only_cells": {"split": ["test"]},
        "seen_cells": "drop",
        "seen_cells_by": "names",
    },
}
TASKS = {
    "train": {
        "default_root_dir": "/training",
        "accelerator": "cpu",
        "strategy": "ddp",
        "devices": 2,
        "num_nodes": 2,
        "precision": "bf16-mixed",
        "tf32_mode": "high",
        "require_accelerator": True,
        "enable_progress_bar": False,
        "enable_model_summary": True,
        "log_every_n_steps": 5,
        "deterministic": True,
        "inference_mode": False,
        "max_epochs": 2,
        "min_epochs": 1,
        "max_steps": 30,
        "min_steps": 3,
        "max_time": "00:01:00:00",
        "val_check_interval": 0.25,
        "check_val_every_n_epoch": 2,
        "num_sanity_val_steps": 1,
        "accumulate_grad_batches": 4,
        "gradient_clip_val": 0.5,
        "gradient_clip_algorithm": "norm",
        "limit_train_batches": 9,
        "limit_val_batches": 0.5,
        "overfit_batches": 2,
        "fast_dev_run": True,
        "freeze_layers": True,
        "checkpoints_every_n_train_steps": 10,
        "early_stopping_patience": 3,
        "detect_anomaly": True,
        "compile": "default",
        "auto_batch_size": "max",
        "memory_limit": 6.0,
        "sync_batchnorm": True,
    },
    "test": {"checkpoint": "/models/two", "ci_method": "binomial", "num_bootstrap_runs": 0, "precision": "32-true"},
    "predict": {"checkpoint": "/models/two", "output_predictions": False, "output_embeddings": False},
    "interpret": {
        "checkpoint": "/models/two",
        "attribute_kwargs": {"n_steps": 20, "method": "riemann_middle", "internal_batch_size": 8},
        "attribute_filter": {"a": ["B"]},
        "baseline": "zero",
        "max_cells": 7,
        "cells": "/data/cells.h5ad",
        "layer": "counts",
        "seed": 3,
        "level": 0.9,
        "resamples": 50,
        "permutations": 60,
        "sanity_checks": True,
    },
}
TASK_CLASSES = {
    "train": "TrainingTaskConfig",
    "test": "TestTaskConfig",
    "predict": "PredictTaskConfig",
    "interpret": "InterpretTaskConfig",
}
FIELD_KEYS = {
    "field_name": "expressions",
    "vocab_size": 12,
    "pretrained_embedding": {
        "filename": "/vectors.txt",
        "embedding_indices_to_freeze": [6],
        "pre_trained_indices_to_use": [0, 1],
    },
    "vocab_update_strategy": "static",
    "is_masked": True,
    "is_input": True,
    "decode_modes": {"regression": {}, "is_zero": {}},
    "tokenization_strategy": "continuous_value_encoder",
    "num_special_tokens": 5,
    "encoder_kwargs": {"kind": "mlp"},
}
LABEL_KEYS = {
    "label_column_name": "celltype",
    "task_group": "cells",
    "is_stratification_label": True,
    "is_regression_label": False,
    "is_multilabel": False,
    "multilabel_str_sep": ";",
    "classifier_depth": 2,
    "gradient_reversal_coefficient": 0.5,
    "n_unique_values": 4,
    "silent_label_values": ["unknown"],
    "label_ontology": {
        "file": "/data/cl.obo",
        "relations": ["part_of"],
        "terms": {"T": "CL:0000084"},
        "unmapped": "flat",
    },
    "decode_from": 1,
}


def plain(run):
    return run.model_dump(mode="json")


def kept(found, written):
    """What was written, as the run has it: keys that nobody wrote are left out."""
    if isinstance(written, dict) and isinstance(found, dict):
        return {name: kept(found[name], value) for name, value in written.items()}
    if isinstance(written, list) and isinstance(found, list):
        return [kept(*pair) for pair in zip(found, written, strict=True)]
    return found


@pytest.mark.parametrize("section", SECTIONS)
def test_every_key_of_a_section_reaches_the_run(tmp_path, write, section):
    write(tmp_path, "mine", yaml.safe_dump({"defaults": ["pre_train_config", "_self_"], section: SECTIONS[section]}))
    assert kept(plain(compose("mine", config_dir=tmp_path))[section], SECTIONS[section]) == SECTIONS[section]


@pytest.mark.parametrize("kind", TASKS)
def test_every_key_of_a_task_reaches_the_run(tmp_path, write, kind):
    task = {"_target_": f"bmfm_targets.config.{TASK_CLASSES[kind]}", **TASKS[kind]}
    write(tmp_path, "mine", yaml.safe_dump({"task": task}))
    run = compose("mine", config_dir=tmp_path)
    assert run.task_kind == kind
    assert kept(plain(run)["task"], TASKS[kind]) == TASKS[kind]


def test_every_key_of_a_field_reaches_the_run(tmp_path, write):
    write(tmp_path, "mine", yaml.safe_dump({"fields": [{"field_name": "genes"}, FIELD_KEYS]}))
    assert kept(plain(compose("mine", config_dir=tmp_path))["fields"][1], FIELD_KEYS) == FIELD_KEYS


def test_every_key_of_a_label_column_reaches_the_run(tmp_path, write):
    write(tmp_path, "mine", yaml.safe_dump({"label_columns": [LABEL_KEYS]}))
    assert kept(plain(compose("mine", config_dir=tmp_path))["label_columns"][0], LABEL_KEYS) == LABEL_KEYS


def test_these_examples_name_every_key_there_is():
    from bmfm_pipeline.config import FieldInfo, LabelColumnInfo
    from bmfm_pipeline.config.models import SCBertModel
    from bmfm_pipeline.config.run_config import TASKS as KINDS
    from bmfm_pipeline.config.run_config import RunConfig
    from bmfm_pipeline.config.tasks import TaskConfig

    def names(model: type[Section]) -> set[str]:
        return set(model.model_fields)

    # Given elsewhere: by `_target_`, by the tokenizer, or only where a label of classes exists.
    elsewhere = {"model_type", "pad_token_id", "attention_kwargs", "balancing_label_column", "rda_transform"}
    elsewhere |= {"sqrt_normalize_transform"}  # in place of log_normalize_transform
    elsewhere |= {"perturbation", "perturbation_vectors", "sequences"}  # of data that are no single cells
    elsewhere |= {"convolution_layers", "convolution_width", "position_dropout", "path_shares"}  # of sequences
    elsewhere |= {"label_sets", "normalize"}  # of whole-cell targets, which mask nothing
    of_files = {"reading", "files", "num_workers"}  # of other formats, and of datasets of many files
    for section, keys in SECTIONS.items():
        model = SCBertModel if section == "model" else RunConfig.model_fields[section].annotation
        assert names(model) - set(keys) <= elsewhere, section
        for name, value in keys.items():
            inner = model.model_fields[name].annotation
            if isinstance(value, dict) and hasattr(inner, "model_fields"):
                assert names(inner) - of_files == set(value) - of_files, name
    assert names(KINDS["train"]) - set(TASKS["train"]) == {"checkpoint"}
    for kind in ("test", "predict", "interpret"):
        assert names(KINDS[kind]) - names(TaskConfig) <= set(TASKS[kind]), kind
    assert names(FieldInfo) == set(FIELD_KEYS)
    assert names(LabelColumnInfo) == {
        *LABEL_KEYS,
        "from_columns",
    }  # the columns it is gathered from, where it is not one


class TestFields:
    def test_decode_modes_may_be_a_list(self):
        run = compose("pre_train_config", ["+fields.1.decode_modes=[token_scores, regression]"])
        assert run.fields[1].decode_modes == {"token_scores": {}, "regression": {}}

    def test_a_masked_field_must_be_an_input(self):
        with pytest.raises(ConfigError, match=r"fields\.1: field 'expressions' is_masked=true needs is_input=true"):
            compose("pre_train_config", ["+fields.1.is_input=false"])

    def test_a_field_or_label_named_twice_is_refused(self):
        with pytest.raises(ConfigError, match="fields: genes named more than once"):
            compose("pre_train_config", ["fields.1.field_name=genes"])
        with pytest.raises(ConfigError, match="label_columns: a named more than once"):
            compose("pre_train_config", ["label_columns=[{label_column_name: a}, {label_column_name: a}]"])

    def test_some_field_must_be_an_input(self):
        with pytest.raises(ConfigError, match="at least one field must be an input"):
            compose("fine_tune_train_config", ["+fields.0.is_input=false", "+fields.1.is_input=false"])

    def test_without_fields_there_are_genes_and_masked_expressions(self, tmp_path, write):
        fields = compose("mine", config_dir=write(tmp_path, "mine", "seed: {seed_value: 1}\n")).fields
        assert [(field.field_name, field.is_masked) for field in fields] == [("genes", False), ("expressions", True)]


class TestDataModule:
    def test_what_is_masked_follows_the_strategy_where_mlm_is_not_given(self, tmp_path, write):
        for strategy, masks in (("language_modeling", True), ("multitask", True), ("sequence_classification", False)):
            text = f"data_module: {{collation_strategy: {strategy}, mlm: null}}\nlabel_columns: [{{label_column_name: a}}]\n"
            assert compose("mine", config_dir=write(tmp_path, "mine", text)).data_module.masks is masks

    def test_a_strategy_and_mlm_that_contradict_each_other_are_refused(self):
        with pytest.raises(ConfigError, match=r"language_modeling with mlm=false has nothing to predict; set mlm=true"):
            compose("pre_train_config", ["data_module.mlm=false"])
        with pytest.raises(ConfigError, match=r"sequence_classification does not mask, but mlm is true"):
            compose("fine_tune_train_config", ["data_module.mlm=true"])

    def test_sequence_labeling_says_what_it_needs(self):
        with pytest.raises(ConfigError, match="paired control and perturbed cells"):
            compose("pre_train_config", ["data_module.collation_strategy=sequence_labeling"])

    def test_two_places_for_the_processed_file_must_agree(self):
        keys = ("transform_kwargs", "dataset_kwargs")
        with pytest.raises(ConfigError, match="must be the same file"):
            compose(
                "fine_tune_train_config",
                [f"data_module.{key}.processed_data_source=/{number}.h5ad" for number, key in enumerate(keys)],
            )

    def test_balancing_needs_a_label_column_with_classes(self):
        with pytest.raises(
            ConfigError, match=r"balancing_label_column: 'donor' is no label column with classes \(celltype\)"
        ):
            compose("fine_tune_train_config", ["data_module.balancing_label_column=donor"])
        assert compose("fine_tune_train_config", ["data_module.balancing_label_column=celltype"])

    def test_switching_does_not_go_with_masking_all_fields_together(self):
        with pytest.raises(ConfigError, match="comask_across_fields"):
            compose(
                "pre_train_config",
                ["data_module.switch_ratio=.5", "data_module.mask_ratio=.5", "data_module.comask_across_fields=true"],
            )


class TestModel:
    def test_the_padding_token_follows_the_tokenizer_and_says_so(self):
        run = compose("pre_train_config", ["++model.pad_token_id=0"])
        assert run.model.pad_token_id == 2
        assert any("model.pad_token_id 0: follows the tokenizer" in note for note in run.notes)

    def test_flex_attention_is_kept_and_says_what_it_needs(self, monkeypatch):
        for found, notes in ((None, 1), ("gpu", 0)):
            monkeypatch.setattr("bmfm_pipeline.config.run_config.find_accelerator", lambda found=found: found)
            run = compose("pre_train_config", ["model.attention=flex", "preset=none"])
            assert run.model.attention == "flex"
            assert sum("flex: needs a GPU" in note for note in run.notes) == notes

    def test_sequences_longer_than_the_positions_are_refused(self):
        overrides = ["model.position_embedding_type=absolute", "data_module.max_length=1024"]
        with pytest.raises(ConfigError, match=r"max_length 1024 is longer than model\.max_position_embeddings 512"):
            compose("pre_train_config", overrides)
        assert compose("pre_train_config", [*overrides, "model.max_position_embeddings=1024"])

    def test_a_checkpoint_of_the_training_task_is_where_training_starts(self):
        run = compose("fine_tune_train_config", ["task.checkpoint=/m/2", "model.checkpoint=/m/1"])
        assert (run.model.checkpoint, run.task.checkpoint) == ("/m/2", None)
        assert any("task.checkpoint /m/2 is used instead" in note for note in run.notes)


class TestTask:
    @pytest.mark.parametrize(
        ("written", "meant"), [("16", "16-mixed"), ("bf16", "bf16-mixed"), ("32", "32-true"), ("64-true", "64-true")]
    )
    def test_precision_may_be_written_short(self, written, meant):
        assert compose("pre_train_config", [f"task.precision={written}"]).task.precision == meant

    def test_the_kind_of_a_task_without_target_is_told_by_its_keys(self, tmp_path, write):
        for keys, kind in (
            ("ci_method: binomial", "test"),
            ("output_embeddings: true", "predict"),
            ("max_steps: 3", "train"),
        ):
            run = compose("mine", config_dir=write(tmp_path, "mine", f"task: {{{keys}}}\n"))
            assert run.task_kind == kind

    def test_a_list_of_one_task_is_that_task_and_a_longer_one_is_refused(self, tmp_path, write):
        one = "_target_: bmfm_targets.config.TestTaskConfig"
        assert compose("mine", config_dir=write(tmp_path, "mine", f"task:\n  - {one}\n")).task_kind == "test"
        with pytest.raises(ConfigError, match="run them one by one"):
            compose("mine", config_dir=write(tmp_path, "mine", f"task:\n  - {one}\n  - {one}\n"))

    def test_a_root_folder_that_is_given_is_not_taken_for_the_place_of_results_in_silence(self):
        run = compose("pre_train_config", ["task.default_root_dir=/somewhere"])
        assert any("/somewhere: models and checkpoints go to the workspace" in note for note in run.notes)
