"""Repositories of the hub, from a server on loopback: fetched by commit, told apart from folders, refused in words."""

import logging
from pathlib import Path

import pytest
from model_hub import Repository, own_hub

from bmfm_pipeline.errors import CheckpointError, StorageError
from bmfm_pipeline.storage.hub import fetch_repository, fetch_tokenizers, read_hub_name, resolve_commit

MODEL = {
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "a.ckpt": b"not wanted",
    "tokenizers/genes/tokenizer.json": b"{}",
    "README.md": b"# A model",
    "big.bin": b"not wanted",
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with own_hub(tmp_path, monkeypatch) as server:
        yield server


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def fetched(text: str) -> Path:
    return fetch_repository(resolve_commit(read_hub_name(text)))


def test_a_repository_is_fetched_at_its_commit_with_what_a_model_needs(hub):
    hub.repositories["org/model"] = Repository(MODEL, branches=("main", "v1"))
    sha = hub.repositories["org/model"].sha
    for text in ("org/model", "hf://org/model", "org/model@v1", f"org/model@{sha}"):
        assert str(resolve_commit(read_hub_name(text))) == f"hf://org/model@{sha}"
    folder = fetched("org/model")
    assert folder.name == sha
    assert files(folder) == {"config.json", "model.safetensors", "tokenizers/genes/tokenizer.json", "README.md"}
    before = len(hub.asked)
    assert fetch_repository(read_hub_name(f"org/model@{sha}")) == folder
    assert len(hub.asked) == before  # a commit that is here needs no connection


def test_a_new_commit_is_another_model(hub):
    hub.repositories["org/model"] = Repository(MODEL)
    first = resolve_commit(read_hub_name("org/model"))
    hub.repositories["org/model"] = Repository(MODEL | {"model.safetensors": b"other"})
    second = resolve_commit(read_hub_name("org/model"))
    assert first.repository == second.repository and first.revision != second.revision
    assert (fetch_repository(second) / "model.safetensors").read_bytes() == b"other"


def test_without_safetensors_the_first_checkpoint_is_fetched_with_its_tokenizers(hub, caplog):
    hub.repositories["org/old"] = Repository(
        {"b.ckpt": b"second", "a.ckpt": b"first", "tokenizers.v1/genes/vocab.txt": b"x", "README.md": b""}
    )
    tokenizers = fetch_tokenizers(read_hub_name("org/old"))
    assert tokenizers.name == "tokenizers.v1" and not list(tokenizers.parent.glob("*.ckpt"))
    assert files(fetched("org/old")) == {"a.ckpt", "tokenizers.v1/genes/vocab.txt", "README.md"}
    assert "2 checkpoints; a.ckpt is used" in caplog.text


def test_a_folder_of_the_same_name_wins_and_that_is_said(hub, tmp_path, caplog):
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert read_hub_name("org/model") is None
    assert "taken for the folder of that name here" in caplog.text
    assert str(read_hub_name("hf://org/model")) == "hf://org/model"
    for text in ("./org/other", "/org/other", "org/other/more", "org", "org/other.ckpt", "~/model", "s3://bucket/key"):
        assert read_hub_name(text) is None, text
    with pytest.raises(CheckpointError, match="write hf://org/name"):
        read_hub_name("hf://only-a-name")


def test_what_cannot_be_fetched_is_said_in_words(hub):
    hub.repositories["org/model"] = Repository(MODEL)
    hub.repositories["org/gated"] = Repository(MODEL, gated=True)
    hub.repositories["org/text"] = Repository({"README.md": b"nothing"})
    for text, error, words in (
        ("org/nothing", CheckpointError, "no such folder here and no such repository"),
        ("org/model@v9", CheckpointError, "no branch, tag or commit v9"),
        ("org/gated", CheckpointError, "accept their terms"),
        ("org/text", CheckpointError, "is no model of this family"),
    ):
        with pytest.raises(error, match=words):
            fetched(text)
    hub.status = 503
    with pytest.raises(StorageError, match="answered with status 503"):
        fetched("org/nothing")


def test_a_private_repository_needs_a_token_that_is_never_shown(hub, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    hub.repositories["org/private"] = Repository(MODEL, token="hf_very_secret")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong_one")
    with pytest.raises(CheckpointError, match="HF_TOKEN is not a token that may read it") as refused:
        fetched("org/private")
    assert "hf_wrong_one" not in str(refused.value)
    monkeypatch.setenv("HF_TOKEN", "hf_very_secret")
    assert (fetched("org/private") / "model.safetensors").exists()
    assert "hf_very_secret" not in caplog.text and "hf_wrong_one" not in caplog.text


def test_offline_what_was_fetched_before_is_used(hub, monkeypatch, caplog):
    from huggingface_hub import constants

    hub.repositories["org/model"] = Repository(MODEL)
    folder = fetched("org/model")
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        asked = len(hub.asked)
        assert fetched("org/model") == folder
        with pytest.raises(StorageError, match="HF_HUB_OFFLINE"):
            fetched("org/new")
        assert len(hub.asked) == asked
    hub.status = 500
    assert fetched("org/model") == folder
    assert f"its commit {folder.name[:12]} is used" in caplog.text
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match="cannot be reached"):
        fetched("org/new")
