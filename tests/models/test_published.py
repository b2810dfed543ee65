"""Checkpoints of bmfm_targets without it: every layout becomes a model folder with the same numbers, or is refused with a reason."""

import json

import pytest
import torch
from checkpoint_files import write_foreign
from model_hub import Repository, files_of, own_hub

from bmfm_pipeline.errors import CheckpointError
from bmfm_pipeline.models import build_model, convert_checkpoint, load_model, model_folder
from bmfm_pipeline.stages.models import find_checkpoint
from bmfm_pipeline.storage import Workspace
from bmfm_pipeline.vocabulary import MultiFieldVocabulary, build_vocabularies

GENES = ("CD3D", "MS4A1", "NKG7", "LYZ")
SIZES = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "max_position_embeddings": 40,
    "pad_token_id": 2,
}  # fmt: skip
CLASSES = {"B cell": 0, "T cell": 1, "monocyte": 2}
# Attributes that every configuration of transformers has, and that say nothing about the model.
NOISE = {
    "return_dict": True,
    "torchscript": False,
    "id2label": {0: "LABEL_0"},
    "_attn_implementation_internal": "eager",
}


def vocabularies() -> MultiFieldVocabulary:
    return build_vocabularies(GENES, 10)


def fields(modes=("token_scores",), **more):
    own = vocabularies()
    return [
        {"field_name": name, "vocab_size": len(own[name]), "num_special_tokens": 5, "is_masked": name == "expressions",
         "decode_modes": {mode: {} for mode in modes}, "tokenization_strategy": "tokenize", "pretrained_embedding": None} | more
        for name in ("genes", "expressions")
    ]  # fmt: skip


LABEL = {"label_column_name": "celltype", "n_unique_values": 3}


def network(modes=("token_scores",), labels=(LABEL,), seed=3, **sizes):
    torch.manual_seed(seed)
    return build_model(
        {"model_type": "scbert", **SIZES, **sizes}, fields(modes), list(labels), label_dict={"celltype": CLASSES}
    ).eval()


def write(folder, state, *, modes=("token_scores",), labels=(LABEL,), label_dict=None, settings=(), **more):
    folder.mkdir(exist_ok=True)
    vocabularies().save(folder)
    known = {"celltype": CLASSES} if label_dict is None else label_dict
    options = SIZES | NOISE | dict(settings)
    return write_foreign(folder / "x.ckpt", options, fields(modes, **more), list(labels), state, known)


def batch():
    torch.manual_seed(1)
    return torch.stack([torch.randint(5, 9, (2, 6)), torch.randint(5, 15, (2, 6))], dim=1)


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def report(folder):
    return json.loads((folder / "loading_report.json").read_text())


def same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0)


def test_the_layout_of_today_becomes_a_model_folder(tmp_path):
    source = network()
    path = write(tmp_path / "there", source.state_dict())
    model = load_model(path)
    same(logits(source, batch()), logits(model, batch()))
    assert model.config.model_labels[0].class_names == tuple(CLASSES)
    assert model.config.fields[0]["vocab_sha256"] == vocabularies()["genes"].sha256
    folder = model_folder(path)
    assert {entry.name for entry in folder.iterdir()} >= {
        "config.json",
        "model.safetensors",
        "tokenizers",
        "label_dict.json",
        "bmfm.json",
    }
    assert (
        "data_module.max_length: 32 (the model's max_position_embeddings)"
        in json.loads((folder / "bmfm.json").read_text())["defaults"]
    )
    assert model_folder(path) == folder  # converted once
    assert len(report(folder)["loaded"]) == len(source.state_dict())


def test_other_content_is_another_folder(tmp_path):
    first = model_folder(write(tmp_path / "there", network().state_dict()))
    second = model_folder(write(tmp_path / "there", network(seed=4).state_dict()))
    assert first != second and first.exists()


def older(state, kind):
    """The names that weights had in earlier layouts."""
    renamed = {}
    for name, tensor in state.items():
        if kind == "masked language model":
            if "label_predictions" in name or ".pooler." in name:
                continue
            renamed[name.replace("cls.predictions.predictions.", "cls.predictions.")] = tensor
        elif not name.startswith("cls.predictions."):
            head = "cls.label_predictions.predictions.label_decoders.celltype.decoder."
            own = {"one": "classifier.", "several": "classifiers.celltype."}[kind]
            base = name if kind == "one" else name.replace("scbert.", "base_model.")
            renamed[name.replace(head, own) if name.startswith(head) else base] = tensor
    return renamed


@pytest.mark.parametrize("kind", ["one", "several"])
def test_layouts_of_classifiers_keep_their_logits(kind, tmp_path):
    source = network(modes=())
    path = write(tmp_path / "there", older(source.state_dict(), kind))
    same(logits(source, batch()), logits(load_model(path), batch()))
    notes = " ".join(report(model_folder(path))["notes"])
    assert "classifier" in notes and "heads token_scores" in notes


def test_the_layout_of_masked_language_models_keeps_its_scores_and_states(tmp_path):
    source = network(labels=())
    path = write(tmp_path / "there", older(source.state_dict(), "masked language model"))
    model = load_model(path)
    same(logits(source, batch()), logits(model, batch()))
    with torch.no_grad():
        output = model(batch())
    torch.testing.assert_close(output.embeddings, torch.tanh(output.last_hidden_state[:, 0]))
    notes = " ".join(report(model_folder(path))["notes"])
    assert "no pooler" in notes and "label column celltype: the checkpoint has no weights of its head" in notes


def test_a_classifier_of_nobody_knows_what_is_refused(tmp_path):
    state = older(network(modes=()).state_dict(), "one")
    two = [LABEL, {"label_column_name": "donor", "n_unique_values": 3}]
    with pytest.raises(CheckpointError, match="one classifier, and its configuration names 2 label columns"):
        load_model(write(tmp_path / "there", state, labels=two))


def test_settings_that_older_versions_spelled_otherwise_are_understood(tmp_path):
    older_label = {"label_column_name": "celltype", "n_unique_values": None, "output_size": 3}
    model = load_model(write(tmp_path / "there", network().state_dict(), labels=[older_label], label_dict={}))
    assert model.config.model_labels[0].output_size == 3
    assert "numbers" in " ".join(report(model_folder(tmp_path / "there" / "x.ckpt"))["notes"])


def test_numbers_of_the_encoder_are_those_it_was_trained_with(tmp_path):
    torch.manual_seed(0)
    sizes = SIZES | {"num_landmarks": 8, "conv_kernel_size": 5}
    source = build_model({"model_type": "scnystromformer", **sizes, "legacy_attention": True}, fields(), [LABEL]).eval()
    folder = tmp_path / "there"
    folder.mkdir()
    vocabularies().save(folder)
    path = write_foreign(folder / "x.ckpt", sizes, fields(), [LABEL], source.state_dict(), {}, "SCNystromformerConfig")
    model = load_model(path)
    assert model.config.legacy_attention is True
    ids = torch.cat([batch(), batch()[:, :, :2]], dim=2)
    same(logits(source, ids), logits(model, ids))


def refused(match, path):
    with pytest.raises(CheckpointError, match=match):
        load_model(path)


def test_what_does_not_fit_is_refused_by_name(tmp_path):
    state = dict(network().state_dict())
    refused("scbert.extra", write(tmp_path / "a", state | {"scbert.extra": torch.ones(2)}))
    refused(
        "pooler.dense.bias", write(tmp_path / "b", {k: v for k, v in state.items() if k != "scbert.pooler.dense.bias"})
    )
    refused(
        "adapters that are not merged", write(tmp_path / "c", state | {"scbert.x.lora_A.default.weight": torch.ones(2)})
    )
    refused("no layout that is known", write(tmp_path / "d", {"other.weight": torch.ones(2)}))
    refused(
        r"\(16,\) in the checkpoint, \(4000000,\)", write(tmp_path / "e", state, settings={"hidden_size": 4_000_000})
    )
    refused("has 900 tokens, and the tokenizer beside the checkpoint", write(tmp_path / "f", state, vocab_size=900))
    path = write(tmp_path / "g", state)
    for entry in sorted((tmp_path / "g" / "tokenizers").rglob("*"), reverse=True):
        entry.unlink() if entry.is_file() else entry.rmdir()
    (tmp_path / "g" / "tokenizers").rmdir()
    refused("needs the folder tokenizers", path)
    torch.save({"state_dict": {f"model.{name}": tensor for name, tensor in state.items()}}, tmp_path / "plain.ckpt")
    refused("weights without their configuration", tmp_path / "plain.ckpt")
    refused("no such file", tmp_path / "none.ckpt")
    folder = tmp_path / "h"
    folder.mkdir()
    refused(
        "FooConfig, which is not on the list",
        write_foreign(folder / "x.ckpt", SIZES, fields(), [], state, {}, "FooConfig"),
    )


def test_half_a_conversion_is_never_left(tmp_path, monkeypatch):
    path = write(tmp_path / "there", network().state_dict() | {"scbert.extra": torch.ones(2)})
    refused("scbert.extra", path)
    assert not [
        entry
        for entry in (tmp_path / "cache" / "converted").rglob("*")
        if entry.is_dir() and entry.parent.parent.name == "converted"
    ]
    convert_checkpoint(write(tmp_path / "good", network().state_dict()), tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_both_layouts_load_from_the_hub_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = network()
    write(tmp_path / "there", source.state_dict())
    ours = model_folder(tmp_path / "there" / "x.ckpt")
    with own_hub(tmp_path, monkeypatch) as hub:
        hub.repositories["org/published"] = Repository(files_of(tmp_path / "there"))
        hub.repositories["org/ours"] = Repository(files_of(ours), branches=("main", "v2"))
        for name in ("org/published", "org/ours", "hf://org/ours@v2"):
            same(logits(source, batch()), logits(load_model(name), batch()))
        assert (model_folder("org/ours") / "tokenizers" / "genes" / "tokenizer.json").exists()
        place = Workspace(tmp_path / "workspace")
        found = find_checkpoint("org/published", place, "blood")
        sha = hub.repositories["org/published"].sha
        assert (found.id, found.uri, found.stage) == (sha, f"hf://org/published@{sha}", "")
        own = MultiFieldVocabulary.load(found.tokenizers())
        assert own["genes"].sha256 == vocabularies()["genes"].sha256
        hub.repositories["org/published"].files["x.ckpt"] = b"damaged"
        with pytest.raises(CheckpointError, match="cut short"):
            load_model("org/published")
        same(logits(source, batch()), logits(load_model(found.uri), batch()))  # by its commit it is what it was
