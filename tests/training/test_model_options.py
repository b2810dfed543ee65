"""Every option of the network through the public config: composed, built, trained for a step, saved, loaded, the same scores."""

import json
import re

import pytest
import torch
from backbone_cases import NAMES
from training_cases import run_config

from bmfm_pipeline.errors import ConfigError
from bmfm_pipeline.models import load_model
from bmfm_pipeline.training import build_data_module, build_module
from bmfm_pipeline.training.child import _hold
from bmfm_pipeline.training.optimiser import decay_groups

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
OWN = {"scnystromformer": {"num_landmarks": 8, "conv_kernel_size": 5}, "scmodernbert": {"local_attention": 8}}
CONTINUOUS = [
    {"field_name": "genes"},
    {"field_name": "expressions", "is_masked": True, "tokenization_strategy": "continuous_value_encoder"},
]


@pytest.fixture(scope="module")
def several(mini_h5ad, tmp_path_factory):
    """The 700 cells with three label columns and two tokens in front of the genes, preprocessed."""
    import anndata
    import numpy as np

    from bmfm_pipeline.stages import plan_stage, run_stage

    folder = tmp_path_factory.mktemp("several")
    cells = anndata.read_h5ad(mini_h5ad)
    cells.obs["batch"] = np.where(np.arange(700) % 3 == 0, "a", np.where(np.arange(700) % 3 == 1, "b", "c"))
    cells.obs["depth"] = np.log(np.asarray(cells.X.sum(axis=1)).ravel())
    cells.write_h5ad(folder / "cells.h5ad")
    columns = "[{label_column_name: celltype}, {label_column_name: batch}, {label_column_name: depth, is_regression_label: true}]"
    words = [f"++label_columns={columns}", "tokenizer.prepend_tokens=['[CLS_0]','[CLS_1]']"]
    jobs = plan_stage("preprocess", str(folder / "cells.h5ad"), overrides=words, workspace=str(folder / "workspace"))
    return run_stage(jobs[-1])["uri"]


def built(folder, name="scbert", **changes):
    run = run_config(
        changes.pop("stage", "finetune"),
        model={"model_type": name, **SMALL, **OWN.get(name, {}), **changes.pop("model", {})},
        data_module__max_length=48,
        **changes,
    )
    data = build_data_module(run, folder)
    data.setup("fit")
    return run, data, build_module(run, data)


def check_step_and_files(data, module, tmp_path):
    """One step moves what is trained, and a saved model comes back with the same scores; returns the weights from before it."""
    model = module.model
    before = {key: value.clone() for key, value in model.state_dict().items()}
    batch = module.on_before_batch_transfer(next(iter(data.train_dataloader())), 0)
    optimiser = torch.optim.AdamW(decay_groups(model.train(), 0.1), lr=1e-2)
    output = model(batch["input_ids"], batch["attention_mask"], positions=batch["positions"])
    result = module.objectives.compute(output.logits, batch["labels"], batch["positions"])
    assert torch.isfinite(result.total)
    result.total.backward()
    optimiser.step()
    model.eval().save_pretrained(tmp_path)
    again = load_model(tmp_path)
    with torch.no_grad():
        first, second = (one(batch["input_ids"], batch["attention_mask"]).logits for one in (model, again))
    assert list(first) == list(second)
    assert all(torch.equal(first[key], second[key]) for key in first)
    return before


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("freeze", [True, r"embeddings\.", r"\.(layer|layers|blocks)\.0\."])
def test_frozen_layers_stay_as_they_are_in_every_backbone(prepared, tmp_path, name, freeze):
    run, data, module = built(prepared, name, task__freeze_layers=freeze)
    _hold(module.model, run, None)
    pattern = re.compile(module.model.encoder_pattern if freeze is True else freeze)
    frozen = [key for key, _ in module.model.named_parameters() if pattern.search(key)]
    assert len(frozen) >= 4
    before = check_step_and_files(data, module, tmp_path)
    after = module.model.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in frozen)
    left = [key for key, p in module.model.named_parameters() if p.requires_grad and key not in frozen]
    assert left and any(not torch.equal(after[key], before[key]) for key in left)


@pytest.mark.parametrize("name", NAMES)
def test_layers_computed_twice_give_the_same_step_to_the_last_bit(prepared, name):
    gradients = []
    for saving in (False, True):
        dropout = {"hidden_dropout_prob": 0.2, "gradient_checkpointing": saving}
        _, data, module = built(prepared, name, model=dropout)
        assert any(getattr(part, "gradient_checkpointing", False) for part in module.model.modules()) is saving
        batch = next(iter(data.train_dataloader()))
        torch.manual_seed(3)
        module.model.train()(batch["input_ids"], batch["attention_mask"]).logits["celltype"].logsumexp(
            -1
        ).sum().backward()
        gradients.append({key: p.grad for key, p in module.model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 10
    assert all(torch.equal(gradients[0][key], gradients[1][key]) for key in gradients[0])


@pytest.mark.parametrize("style", ["inner product", "concat query", "sum query"])
def test_gene_queries_from_the_cell(prepared, tmp_path, style):
    fields = json.loads(json.dumps(CONTINUOUS))
    fields[1]["decode_modes"] = {"mvc_regression": {"arch_style": style, "query_field": "genes"}}
    losses = [
        {"field_name": "expressions", "name": "mse"},
        {"field_name": "expressions", "name": "mse", "decoder_key": "expressions_mvc_regression", "loss_group": "mvc"},
    ]
    _, data, module = built(prepared, stage="pretrain", fields=fields, trainer__losses=losses)
    before = check_step_and_files(data, module, tmp_path)
    head = [key for key in before if "expressions_mvc_regression" in key and "hidden_activation_fn" not in key]
    assert head and all(not torch.equal(before[key], module.model.state_dict()[key]) for key in head)


@pytest.mark.parametrize("name", NAMES)
def test_several_labels_with_their_own_tokens_groups_depths_and_reversal(several, tmp_path, name):
    columns = [
        {"label_column_name": "celltype", "task_group": "cell", "classifier_depth": 2, "decode_from": 1},
        {"label_column_name": "depth", "is_regression_label": True, "task_group": "cell"},
        {"label_column_name": "batch", "gradient_reversal_coefficient": 0.3, "decode_from": 0},
    ]
    _, data, module = built(
        several,
        name,
        label_columns=columns,
        trainer__losses=None,
        tokenizer__prepend_tokens=["[CLS_0]", "[CLS_1]"],
        model={"classifier_pooling": "mean"},
    )
    batch = next(iter(data.train_dataloader()))
    genes = data.prepared.vocabularies["genes"]
    assert batch["input_ids"][:, 0, :2].unique(dim=0).tolist() == [genes.ids(["[CLS_0]", "[CLS_1]"]).tolist()]
    with torch.no_grad():
        output = module.model.eval()(batch["input_ids"], batch["attention_mask"])
        heads = module.model.cls.label_predictions.predictions
        assert torch.allclose(
            output.logits["batch"], heads.label_decoders["batch"].decoder(output.head_states[:, 0]), atol=1e-6
        )
        shared = heads.task_groups["cell"]
        assert torch.allclose(
            output.logits["celltype"],
            heads.label_decoders["celltype"].decoder(shared(output.head_states[:, 1])),
            atol=1e-6,
        )
        depth = heads.label_decoders["depth"]
        expected = depth.mean + depth.scale * depth.decoder(shared(output.embeddings))
        assert torch.allclose(output.logits["depth"], expected, atol=1e-5)
    check_step_and_files(data, module, tmp_path)


def vectors_of(data, width=6) -> tuple[str, list[str]]:
    genes = data.prepared.vocabularies["genes"].tokens[10:40]
    lines = [f"{len(genes) + 1} {width}", "NOT_A_GENE " + " ".join(["9"] * width)]
    lines += [
        f"{gene} " + " ".join(str(place + index / 10) for index in range(width)) for place, gene in enumerate(genes)
    ]
    return "\n".join(lines) + "\n", genes


@pytest.mark.parametrize("place", ["disk", "s3"])
def test_gene_vectors_of_a_file_wherever_it_lies(prepared, tmp_path, request, place):
    text, genes = vectors_of(build_data_module(run_config("finetune"), prepared))
    if place == "disk":
        address = str(tmp_path / "vectors.txt")
        (tmp_path / "vectors.txt").write_text(text)
    else:
        address = request.getfixturevalue("s3").put("vectors.txt", text.encode())
    fields = [{"field_name": "genes", "pretrained_embedding": {"filename": address}}, {"field_name": "expressions"}]
    _, data, module = built(prepared, fields=fields)
    table = module.model.backbone.embeddings.genes_embeddings
    assert int(table.frozen_rows.sum()) == len(genes) and table.weight.shape[1] == 6
    assert module.model.config.fields[0]["pretrained_embedding"]["filename"] == address
    ids = data.prepared.vocabularies["genes"].ids(genes)
    before = check_step_and_files(data, module, tmp_path / "model")
    key = next(name for name in before if name.endswith("genes_embeddings.weight"))
    after = module.model.state_dict()[key]
    assert torch.equal(after[ids], before[key][ids]) and not torch.equal(after, before[key])


def test_a_file_of_gene_vectors_that_is_not_there_is_named(prepared):
    fields = [{"field_name": "genes", "pretrained_embedding": {"filename": "/nowhere/vectors.txt"}}]
    with pytest.raises(Exception, match=r"/nowhere/vectors.txt: pretrained embedding not found"):
        built(prepared, fields=[*fields, {"field_name": "expressions"}])


def test_adapter_presets_are_checked_against_the_type_before_data_is_read():
    with pytest.raises(ConfigError, match="preset llama names layers of scllama, but the model is scbert"):
        run_config(trainer__lora_config="llama", sizes_from_checkpoint=False)
    for value in ("default", "scbert", {"r": 8, "bias": "all", "layers_to_transform": 1, "task_type": "SEQ_CLS"}, {}):
        assert run_config(trainer__lora_config=value).trainer.lora_config is not None
    for value, message in (
        ("lama", "there is no preset 'lama'"),
        ({"rank": 8}, "unknown key 'rank'"),
        ({"preset": "default", "target_modules": ["query"]}, "both name the layers"),
        ({"target_modules": []}, "is empty"),
        ({"r": 0}, "greater than 0"),
    ):
        with pytest.raises(ValueError, match=message):
            run_config(trainer__lora_config=value)
