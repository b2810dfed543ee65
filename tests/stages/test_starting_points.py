"""What may be named as a checkpoint: which weights it is, by what content it is known, and with which vocabularies they come."""

from pathlib import Path

import pytest
import torch

from bmfm_pipeline.config import compose
from bmfm_pipeline.errors import CheckpointError, ConfigError
from bmfm_pipeline.stages.jobs import Job
from bmfm_pipeline.stages.models import CheckpointSource, find_checkpoint, with_policy, with_tokenizer_of
from bmfm_pipeline.stages.prediction_settings import left_to_defaults, merge_settings, read_settings
from bmfm_pipeline.storage import Workspace, publish
from bmfm_pipeline.vocabulary import build_vocabularies


@pytest.fixture
def place(tmp_path) -> Workspace:
    return Workspace(tmp_path / "workspace")


def artefact(place, key, name="blood", stage="pretrain", checkpoint=b"weights at the end", model=True):
    staging = Path(place.uri) / "runs" / key / "artefact"
    (staging / "checkpoints").mkdir(parents=True)
    if model:
        (staging / "config.json").write_text("{}")
        (staging / "bmfm.json").write_text("{}")
    if checkpoint:
        (staging / "checkpoints" / "last.ckpt").write_bytes(checkpoint)
    build_vocabularies(["CD3D", "LYZ"]).save(staging)
    inputs = {"data": {"id": f"data of {key}", "uri": "x"}}
    return publish(staging, place, stage, key, inputs=inputs, config={}, code_version="c", summary={"name": name})


def test_words_name_the_newest_artefact_of_the_dataset(place):
    mine = artefact(place, "a" * 32)
    artefact(place, "b" * 32, name="skin")
    artefact(place, "c" * 32, stage="finetune")
    assert find_checkpoint(None, place, "blood") is None
    for word in ("latest", "best"):
        found = find_checkpoint(word, place, "blood")
        assert (found.uri, found.id, found.stage) == (mine.uri, mine.key, "pretrain")
        assert found.data == "data of " + "a" * 32
    last = find_checkpoint("last", place, "blood")
    assert last.uri == mine.file("checkpoints/last.ckpt") and last.id != mine.key and last.stage == ""
    assert (last.artefact, last.origin, last.data) == (mine.uri, "pretrain", found.data)
    by_path = find_checkpoint(last.uri, place, "blood")
    assert (by_path.artefact, by_path.origin) == (mine.uri, "pretrain")
    assert last.tokenizers() == str(Path(mine.uri) / "tokenizers")
    assert find_checkpoint("latest", place, None, stage="finetune").id == "c" * 32
    with pytest.raises(CheckpointError, match="no pretrain artefact of lung"):
        find_checkpoint("latest", place, "lung")
    artefact(place, "d" * 32, name="liver", checkpoint=None)
    with pytest.raises(CheckpointError, match=r"holds no checkpoints/last\.ckpt"):
        find_checkpoint("last", place, "liver")
    artefact(place, "e" * 32, name="kidney", model=False)
    with pytest.raises(CheckpointError, match="is a pretrain artefact, not a model"):
        find_checkpoint("latest", place, "kidney")


def written(folder: Path, value: float) -> Path:
    folder.mkdir()
    build_vocabularies(["CD3D", "LYZ"]).save(folder)
    torch.save({"state_dict": {"model.a": torch.full((2,), value)}}, folder / "x.ckpt")
    return folder / "x.ckpt"


def test_a_file_is_known_by_its_content_and_that_of_its_tokenizers(tmp_path, place):
    one, copy, other = (written(tmp_path / name, value) for name, value in (("one", 1), ("copy", 1), ("other", 2)))
    found = find_checkpoint(str(one), place, "blood")
    assert found.uri == str(one) and found.stage == ""
    assert find_checkpoint(str(copy), place, "skin").id == found.id
    assert find_checkpoint(str(other), place, "blood").id != found.id
    build_vocabularies(["CD3D", "NKG7"]).save(tmp_path / "copy")
    assert find_checkpoint(str(copy), place, "skin").id != found.id
    assert found.tokenizers() == str(tmp_path / "one" / "tokenizers")
    with pytest.raises(CheckpointError, match="no such file"):
        find_checkpoint(str(tmp_path / "none.ckpt"), place, "blood")


def test_folders_and_files_that_are_no_model_are_refused(tmp_path, place):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.bin").write_bytes(b"x")
    for name, words in (
        ("empty", "holds no config.json"),
        ("none/at/all", "does not exist"),
        ("file.bin", "is a single file"),
    ):
        with pytest.raises(CheckpointError, match=words):
            find_checkpoint(str(tmp_path / name), place, "blood")


def run_of(*overrides):
    return compose("fine_tune_train_config", ["dataset=zheng68k-mini", "preset=none", *overrides])


def test_vocabularies_come_with_the_weights_unless_a_person_names_others(tmp_path, place):
    mine = artefact(place, "a" * 32)
    source = find_checkpoint(mine.uri, place, "blood")
    changed = with_tokenizer_of(run_of(), source)
    assert changed.tokenizer.identifier == str(Path(mine.uri) / "tokenizers")
    assert any("the vocabularies stored with" in note for note in changed.notes)
    named = run_of("tokenizer.identifier=/some/folder")
    assert with_tokenizer_of(named, source).tokenizer.identifier == "/some/folder"
    assert with_tokenizer_of(run_of(), None).tokenizer.identifier == "data"
    (tmp_path / "bare").mkdir()
    bare = CheckpointSource(str(tmp_path / "bare"), "id")
    assert with_tokenizer_of(run_of(), bare).tokenizer.identifier == "data"


def test_only_between_our_own_stages_may_heads_change_without_a_word():
    pretrained, elsewhere = CheckpointSource("u", "i", "pretrain", "u", "pretrain"), CheckpointSource("u", "i")
    finetuned, its_last = CheckpointSource("u", "i", "finetune"), CheckpointSource("u", "i", "", "u", "pretrain")
    planned = Job("pretrain", "x", "k", "/w", {}, {}, {}, "c")
    settled = [
        ("finetune", pretrained, "backbone"), ("finetune", planned, "backbone"), ("finetune", its_last, "backbone"), ("finetune", elsewhere, "strict"),
        ("finetune", finetuned, "strict"), ("pretrain", pretrained, "strict"), ("finetune", None, None),
    ]  # fmt: skip
    for stage, source, policy in settled:
        assert with_policy(run_of(), stage, source).model.load == policy
    assert any("model.load: backbone" in note for note in with_policy(run_of(), "finetune", pretrained).notes)
    asked = run_of("model.load=encoder")
    assert with_policy(asked, "finetune", pretrained).model.load == "encoder"
    idle = with_policy(asked, "finetune", None)
    assert idle.model.load is None and any("no effect" in note for note in idle.notes)
    with pytest.raises(ConfigError, match="load"):
        run_of("model.load=half")


def test_the_policy_is_in_the_key_of_what_is_trained():
    view = run_of("model.load=encoder").key_view("finetune")["model"]
    assert view["load"] == "encoder" and "checkpoint" not in view


def test_settings_of_cells_for_a_model_that_has_none():
    settings = read_settings(["data_module.max_length=64", "++data_module.transform_kwargs.transforms=[]"])
    assert settings == {"max_length": 64, "transform_kwargs": {"transforms": []}}
    module = {"max_length": 128, "sequence_order": "sorted", "transform_kwargs": {"transforms": [1], "layer": None}}
    assert merge_settings(module, settings) == {
        "max_length": 64, "sequence_order": "sorted", "transform_kwargs": {"transforms": [], "layer": None},
    }  # fmt: skip
    lines = [
        "data_module.max_length: 128",
        "data_module.sequence_order: sorted",
        "data_module.transform_kwargs.transforms: Log",
    ]
    assert left_to_defaults(lines, settings) == ["data_module.sequence_order: sorted"]
    for word in ("model.hidden_size=3", "~data_module.max_length", "data_module.max_length=[1"):
        with pytest.raises(ConfigError):
            read_settings([word])
