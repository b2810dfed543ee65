"""Saving, strict loading, starting a fine-tune from a pretrained model, and everything that must be refused."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from bmfm_pipeline.errors import CheckpointError, ConfigError
from bmfm_pipeline.models import build_model, initialise_from, load_model, load_weights

SIZES = {
    "model_type": "scbert",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
GENES = {"field_name": "genes", "vocab_size": 30, "num_special_tokens": 5}
EXPRESSIONS = {"field_name": "expressions", "vocab_size": 12, "num_special_tokens": 5, "is_masked": True}
CLASSES = {"B cell": 0, "T cell": 1, "monocyte": 2}


def make(seed=0, genes=None, expressions=None, labels=(), label_dict=None, **sizes):
    torch.manual_seed(seed)
    field_list = [GENES | (genes or {}), EXPRESSIONS | (expressions or {})]
    return build_model(SIZES | sizes, field_list, list(labels), label_dict=label_dict)


def pretrained(tmp_path, **kwargs):
    options = {"genes": {"decode_modes": ["token_scores"]}, "expressions": {"decode_modes": ["token_scores"]}} | kwargs
    model = make(**options)
    model.save_pretrained(tmp_path / "pretrained")
    return model, tmp_path / "pretrained"


CELLTYPE = [{"label_column_name": "celltype"}]


def test_saved_and_loaded_models_agree(tmp_path):
    labels = [
        {"label_column_name": name, "n_unique_values": 3} for name in ("cell.type", "type", "keys", "100%", "training")
    ]
    model = make(labels=labels, expressions={"decode_modes": ["regression"]}).eval()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    ids = torch.randint(5, 12, (2, 2, 6))
    again = load_model(tmp_path)
    assert not again.training
    expected, got = model(ids).logits, again(ids).logits
    assert list(got) == ["expressions_regression", "cell.type", "type", "keys", "100%", "training"]
    assert all(torch.equal(expected[key], got[key]) for key in expected)


def test_auto_classes_load_it_in_a_fresh_process(tmp_path):
    make(labels=CELLTYPE, label_dict={"celltype": CLASSES}, expressions={"decode_modes": ["is_zero"]}).save_pretrained(
        tmp_path
    )
    code = (
        "import sys, bmfm_pipeline.models\n"
        "from transformers import AutoModel\n"
        f"model = AutoModel.from_pretrained({str(tmp_path)!r})\n"
        "print(type(model).__name__, model.config.model_labels[0].class_names)\n"
        "print([name for name in ('pydantic', 'anndata', 'pytorch_lightning', 'mlflow', 'prefect', 'scanpy', 'hydra') if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert out[-2] == "SCBertForMultitask ('B cell', 'T cell', 'monocyte')"
    assert out[-1] == "[]"


def test_damaged_weights_are_refused_by_name(tmp_path):
    make().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = load_file(path)
    short = {name: tensor for name, tensor in whole.items() if name != "scbert.pooler.dense.bias"}
    short["scbert.extra"] = torch.zeros(2)
    short["scbert.embeddings.genes_embeddings.weight"] = torch.zeros(31, 16)
    save_file(short, path, metadata={"format": "pt"})
    for load in (load_model, type(make()).from_pretrained):
        with pytest.raises(CheckpointError) as refused:
            load(tmp_path)
        for name in ("scbert.pooler.dense.bias", "scbert.extra", "scbert.embeddings.genes_embeddings.weight"):
            assert name in str(refused.value)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cut short"):
        load_model(tmp_path)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        load_model(tmp_path)
    shutil.rmtree(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        load_model(tmp_path)


def test_a_folder_that_claims_another_size_is_refused_before_it_is_made(tmp_path):
    make().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"hidden_size": 4_000_000, "intermediate_size": 4_000_000})
    )
    with pytest.raises(CheckpointError, match=r"\(30, 16\) in the checkpoint, \(30, 4000000\) in the model"):
        load_model(tmp_path)


def test_nothing_is_copied_when_loading_is_refused(tmp_path):
    model, other = make(seed=0), make(seed=1, labels=[{"label_column_name": "x", "n_unique_values": 2}])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"not in the model \(2\)"):
        load_weights(model, other.state_dict())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_finetune_takes_the_backbone_and_names_what_is_new_and_left(tmp_path):
    source, folder = pretrained(tmp_path)
    model = make(
        seed=5, labels=CELLTYPE, label_dict={"celltype": CLASSES}, expressions={"decode_modes": ["token_scores"]}
    )
    report = initialise_from(model, folder, "backbone")
    assert report.new_heads == ["label head celltype"]
    assert report.not_used == ["field head genes_token_scores"]
    assert report.clean and "transform" not in str(report.not_used)
    state, own = source.state_dict(), model.state_dict()
    for name in own:
        if "label_predictions" not in name:
            assert torch.equal(own[name], state[name]), name
    assert "label head celltype" in report.render() and "not used (1): field head genes_token_scores" in report.render()


def test_finetune_without_field_heads_leaves_the_transform_behind(tmp_path):
    _, folder = pretrained(tmp_path)
    report = initialise_from(make(labels=CELLTYPE, label_dict={"celltype": CLASSES}), folder, "backbone")
    assert set(report.not_used) == {
        "field head transform",
        "field head genes_token_scores",
        "field head expressions_token_scores",
    }


def test_a_head_whose_classes_changed_is_refused(tmp_path):
    _, folder = pretrained(tmp_path, labels=CELLTYPE, label_dict={"celltype": CLASSES})
    shuffled = {"T cell": 0, "B cell": 1, "monocyte": 2}
    with pytest.raises(CheckpointError, match="in another order"):
        initialise_from(make(labels=CELLTYPE, label_dict={"celltype": shuffled}), folder, "backbone")
    renamed = {"B cell": 0, "NK": 1, "monocyte": 2}
    with pytest.raises(CheckpointError, match="only there: T cell; only here: NK"):
        initialise_from(make(labels=CELLTYPE, label_dict={"celltype": renamed}), folder, "backbone")
    with pytest.raises(
        CheckpointError, match=r"(?s)celltype\.decoder\.weight .* start all heads fresh: model\.load=encoder"
    ):
        larger = CLASSES | {"NK": 3}
        initialise_from(make(labels=CELLTYPE, label_dict={"celltype": larger}), folder, "backbone")
    fresh = make(seed=9, labels=CELLTYPE, label_dict={"celltype": shuffled})
    head = fresh.cls.label_predictions.predictions.label_decoders["celltype"].decoder.weight.clone()
    assert initialise_from(fresh, folder, "encoder").new_heads == ["label head celltype"]
    report = initialise_from(fresh, folder, "backbone", reset_heads=["celltype"])
    assert report.new_heads == ["label head celltype"]
    assert torch.equal(fresh.cls.label_predictions.predictions.label_decoders["celltype"].decoder.weight, head)
    assert initialise_from(make(labels=CELLTYPE, label_dict={"celltype": CLASSES}), folder, "backbone").new_heads == []


def test_unknown_class_names_are_noted_not_ignored(tmp_path):
    _, folder = pretrained(tmp_path, labels=[{"label_column_name": "celltype", "n_unique_values": 3}])
    report = initialise_from(make(labels=CELLTYPE, label_dict={"celltype": CLASSES}), folder, "backbone")
    assert "class names of the checkpoint are not known" in report.notes[0]


def test_another_vocabulary_of_the_same_size_is_refused(tmp_path):
    _, folder = pretrained(tmp_path, genes={"decode_modes": ["token_scores"], "vocab_sha256": "aa"})
    with pytest.raises(CheckpointError, match="vocabulary is not the checkpoint's"):
        initialise_from(make(genes={"vocab_sha256": "bb"}), folder, "backbone")


def test_a_smaller_backbone_is_refused_and_a_new_field_is_new(tmp_path):
    _, folder = pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"missing from the checkpoint.*encoder\.layer\.1"):
        initialise_from(make(num_hidden_layers=2), folder, "backbone")
    wider = build_model(SIZES, [GENES, EXPRESSIONS, {"field_name": "perturbations", "vocab_size": 8}])
    assert initialise_from(wider, folder, "backbone").new_heads == ["input field perturbations"]


def test_wrapper_prefixes_are_taken_off():
    source, model = make(seed=1), make(seed=2)
    wrapped = {f"model._orig_mod.{name}": tensor for name, tensor in source.state_dict().items()}
    assert load_weights(model, wrapped).clean
    assert torch.equal(model.scbert.pooler.dense.weight, source.scbert.pooler.dense.weight)


def test_label_dictionary_must_number_its_classes():
    with pytest.raises(ConfigError, match=r"must be 0\.\.1"):
        make(labels=CELLTYPE, label_dict={"celltype": {"a": 1, "b": 2}})


def test_gene_vectors_are_placed_frozen_and_survive_saving(tmp_path):
    table = tmp_path / "vectors.txt"
    table.write_text("3 4\nCD3D 1 2 3 4\nUNKNOWN 9 9 9 9\nMS4A1 5 6 7 8\n")
    vocabulary = ["[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]", "CD3D", "LYZ", "MS4A1"]
    genes = {
        "field_name": "genes",
        "vocab_size": 8,
        "num_special_tokens": 5,
        "pretrained_embedding": {"filename": str(table)},
    }
    torch.manual_seed(0)
    model = build_model(
        SIZES, [genes], [{"label_column_name": "x", "n_unique_values": 2}], vocabularies={"genes": vocabulary}
    )
    embedding = model.backbone.embeddings.genes_embeddings
    assert embedding.weight[5].tolist() == [1, 2, 3, 4] and embedding.weight[7].tolist() == [5, 6, 7, 8]
    before = embedding.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(torch.tensor([[[3, 5, 6, 7, 1]]])).logits["x"].square().sum().backward()
    optimizer.step()
    assert torch.equal(embedding.weight[[5, 7]], before[[5, 7]])
    assert not torch.equal(embedding.weight[6], before[6])
    model.save_pretrained(tmp_path / "model")
    table.unlink()
    again = load_model(tmp_path / "model").backbone.embeddings.genes_embeddings
    assert torch.equal(again.weight, embedding.weight) and again.frozen_rows.tolist() == embedding.frozen_rows.tolist()


def test_gene_vectors_that_match_nothing_are_refused(tmp_path):
    table = tmp_path / "vectors.txt"
    table.write_text("1 2\nENSG00000167286 1 2\n")
    genes = {
        "field_name": "genes",
        "vocab_size": 6,
        "num_special_tokens": 5,
        "pretrained_embedding": {"filename": str(table)},
    }
    with pytest.raises(ConfigError, match="do the gene names agree"):
        build_model(SIZES, [genes], vocabularies={"genes": ["[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]", "CD3D"]})
