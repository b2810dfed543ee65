"""The promotion section: a dataset's own values, what a person writes over them, and keys that enter no artefact."""

import pytest
import yaml

from bmfm_pipeline.config import catalogue, compose
from bmfm_pipeline.config.promotion import PromotionConfig
from bmfm_pipeline.errors import ConfigError

CONFIG = "fine_tune_train_config"


@pytest.fixture
def lab(tmp_path, monkeypatch):
    monkeypatch.setenv("BMFM_DATASETS", str(tmp_path))
    entry = {
        "name": "lab", "title": "cells of our own", "source": {"builder": "zheng68k_mini"}, "transforms": [],
        "promotion": {"margin": 0.02, "drift": {"label_mix": 0.3}},
    }  # fmt: skip
    (tmp_path / "lab.yaml").write_text(yaml.safe_dump(entry))
    yield
    catalogue._read.cache_clear()


def test_values_of_the_dataset_hold_where_a_person_writes_none(lab):
    found = compose(CONFIG, ["dataset=lab", "promotion.drift.embedding=0.2"]).promotion
    assert (found.margin, found.drift.label_mix, found.drift.embedding) == (0.02, 0.3, 0.2)
    assert compose(CONFIG, ["dataset=lab", "promotion.margin=0"]).promotion.margin == 0
    assert compose(CONFIG, ["dataset=lab", "promotion.drift.label_mix=0.1"]).promotion.drift.label_mix == 0.1


def test_packaged_values_are_the_defaults_and_enter_no_key():
    assert compose(CONFIG).promotion == compose("test_config").promotion == PromotionConfig()
    changed = compose(CONFIG, ["promotion.margin=0.5", "promotion.after_finetune=challenger"])
    for stage in ("preprocess", "finetune"):
        assert changed.key_view(stage) == compose(CONFIG).key_view(stage)


def test_an_unknown_key_is_refused():
    with pytest.raises(ConfigError, match=r"did you mean 'promotion\.margin'"):
        compose(CONFIG, ["promotion.margine=1"])
