"""The split section: what follows from what, the older spellings, and keys that contradict each other."""

import pytest
import yaml
from pydantic import ValidationError

from bmfm_pipeline.config import RunConfig
from bmfm_pipeline.config.splits import SplitConfig, resolve_split
from bmfm_pipeline.errors import ConfigError


def run(*words, label="celltype") -> RunConfig:
    """A run with these settings: keys of the split, or whole paths."""
    labels = [{"label_column_name": label, "is_stratification_label": True}] if label else []
    config = {"label_columns": labels, "data_module": {"transform_kwargs": {"split": {}}, "dataset_kwargs": {}}}
    for word in words:
        path, value = word.split("=", 1)
        if path in SplitConfig.model_fields or ("." not in path and path != "label_columns"):
            path = f"data_module.transform_kwargs.split.{path}"
        *parents, last = path.split(".")
        section = config
        for name in parents:
            section = section[name]
        section[last] = yaml.safe_load(value)
    return RunConfig.model_validate(config)


def plan(*words, label="celltype"):
    return resolve_split(run(*words, label=label))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], {"method": "stratified", "stratify": "celltype"}),
        (["method=random"], {"method": "random", "stratify": None}),
        (["group=donor"], {"method": "stratified_group", "group": "donor", "stratify": "celltype"}),
        (["group=donor", "method=group"], {"method": "group", "stratify": None}),
        (["n_folds=5"], {"method": "kfold", "fold": 0, "dev_fraction": 0.1, "weights": None}),
        (["n_folds=5", "fold=4", "dev_fraction=0"], {"fold": 4, "dev_fraction": 0}),
        (["column=set"], {"method": "column", "column": "set", "weights": None, "stratify": None}),
        (["column=set", "dev_fraction=.1"], {"dev_fraction": 0.1, "stratify": "celltype"}),
        (["column=set", "mapping={training: train, 1: test, validation: val}"], {"mapping": {"training": "train", "1": "test", "validation": "dev"}}),
        (["file=/my/split.csv"], {"method": "file", "file": "/my/split.csv"}),
        (["reuse=v1", "train_fraction=.1"], {"method": "reuse", "train_fraction": 0.1, "classes": "celltype"}),
        (["weights={train: .6, dev: .2, test: .2}"], {"weights": {"train": 0.6, "dev": 0.2, "test": 0.2}}),
        (["data_module.transform_kwargs.split_weights={train: .6, dev: .2, test: .2}"], {"weights": {"train": 0.6, "dev": 0.2, "test": 0.2}}),
        (["data_module.dataset_kwargs.split_column_name=set"], {"method": "column", "column": "set"}),
        (["data_module.transform_kwargs.stratifying_label=tissue"], {"method": "stratified", "stratify": "tissue"}),
        (["data_module.transform_kwargs.random_state=9"], {"seed": 9}),
    ],
)  # fmt: skip
def test_what_follows_from_what(words, expected):
    found = plan(*words)
    assert {name: getattr(found, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["column=a", "file=b.csv"], "file and column each name a split"),
        (["method=random", "column=a"], "method random makes a new split, but column names one"),
        (["method=group"], "method group needs group, a column of obs such as the donor"),
        (["method=kfold"], "needs n_folds"),
        (["method=column"], r"method column needs data_module\.transform_kwargs\.split\.column"),
        (["fold=1"], "fold needs n_folds"),
        (["n_folds=3", "fold=3"], r"fold 3 does not exist: folds are 0\.\.2"),
        (["n_folds=1"], "greater than or equal to 2"),
        (["n_folds=3", "weights={train: .8, dev: .1, test: .1}"], "method kfold does not read weights; it reads n_folds"),
        (["method=random", "rare_classes=train"], "method random does not read rare_classes"),
        (["reuse=v1", "group=donor", "rare_classes=train"], "a split that is used again does not read rare_classes"),
        (["train_fraction=.1", "cells_per_class=5"], "keep one"),
        (["column=a", "mapping={a: trian}"], "mapping"),
        (["name=a/b"], "a name has letters"),
        (["column=a", "data_module.transform_kwargs.split_column_name=b"], "column is 'a', split_column_name is 'b'"),
        (["stratify=a", "data_module.dataset_kwargs.stratifying_label=b"], "stratify is 'a', stratifying_label is 'b'"),
        (["weights={train: .6, dev: .2, test: .2}", "data_module.transform_kwargs.split_weights={train: .8, dev: .1, test: .1}"], "keep one"),
        (["weights={train: .6, dev: .2, test: .3}"], r"train \+ dev \+ test must be 1"),
        (["groups=donor"], "did you mean 'group'"),
        (["stratify=age", "label_columns=[{label_column_name: age, is_regression_label: true}]"], "'age' holds numbers"),
        (["label_columns=[{label_column_name: age, is_regression_label: true, is_stratification_label: true}]"], "cannot be balanced over it"),
        (["label_columns=[{label_column_name: tags, is_multilabel: true, is_regression_label: true}]"], "keep one"),
        (["label_columns=[{label_column_name: tags, is_multilabel: true, multilabel_str_sep: ''}]"], "multilabel_str_sep is empty"),
    ],
)  # fmt: skip
def test_contradictions_are_said_before_any_data_is_read(words, message):
    with pytest.raises((ConfigError, ValidationError), match=message):
        plan(*words)


def test_cells_per_class_need_classes():
    with pytest.raises(ConfigError, match="cells_per_class: needs classes"):
        plan("cells_per_class=5", label=None)
    assert plan("train_fraction=.5", label=None).classes is None


@pytest.mark.parametrize(
    "word",
    ["group=donor", "n_folds=5", "method=random", "column=set", "train_fraction=.1", "cells_per_class=9", "rare_classes=train", "name=v1"],
)  # fmt: skip
def test_every_setting_of_the_split_enters_the_key(word):
    assert run(word).key_view("preprocess") != run().key_view("preprocess")


def test_where_a_given_split_lies_does_not_enter_the_key():
    assert run("reuse=a").key_view("preprocess") == run("reuse=b").key_view("preprocess")
    assert run("file=/a.csv").key_view("preprocess") == run("file=/b.csv").key_view("preprocess")


def test_old_and_new_spelling_are_one_split():
    older = run("data_module.transform_kwargs.split_weights={train: .6, dev: .2, test: .2}")
    newer = run("weights={train: .6, dev: .2, test: .2}")
    assert older.key_view("preprocess") == newer.key_view("preprocess")
