"""Configs with passwords or keys in them: refused without being repeated, by shape or because the environment has them."""

import pytest

from bmfm_pipeline import compose
from bmfm_pipeline.config.secrets import refuse_secrets
from bmfm_pipeline.errors import ConfigError


@pytest.mark.parametrize(
    "text",
    [
        "s3://me:planted@bucket/cells.h5ad",
        "https://host/cells?X-Amz-Signature=planted",
        "AKIAPLANTEDPLANTED01",
        "prefix-planted-secret-suffix",
    ],
)
def test_a_secret_is_refused_by_the_name_of_its_key_and_not_repeated(monkeypatch, text):
    monkeypatch.setenv("SOME_API_TOKEN", "planted-secret")
    with pytest.raises(ConfigError, match=r"^model\.checkpoint: holds a password") as found:
        refuse_secrets({"model": {"checkpoint": ["fine", text]}})
    assert "lanted" not in str(found.value) and "PLANTED" not in str(found.value)
    with pytest.raises(ConfigError, match=r"^model\.checkpoint: holds a password"):
        compose("fine_tune_train_config", ["dataset=zheng68k-mini", f"model.checkpoint='{text}'"])


def test_what_only_looks_like_one_is_left_alone(monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "celltype-of-cells")
    monkeypatch.setenv("SERVICE_TOKEN_FILE", "/run/secrets/token")
    monkeypatch.setenv("SHORT_TOKEN", "cells")
    refuse_secrets(["celltype-of-cells", "/run/secrets/token", "cells", "s3://bucket/cells@v2.h5ad", "org/name@main"])
