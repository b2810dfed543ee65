"""Low-rank adapters: where they go, what is trained beside them, that a run resumes exactly and ends in plain weights."""

import json
from pathlib import Path

import pytest
import torch
from backbone_cases import NAMES, batch, model_of
from safetensors.torch import load_file
from training_cases import StopAtLook, assert_same_training, checkpoint, exported, notes

from bmfm_pipeline.config.adapters import LoraSettings
from bmfm_pipeline.errors import CheckpointError, ConfigError
from bmfm_pipeline.models import initialise_from, load_model
from bmfm_pipeline.training.adapters import add_adapters, layers_to_adapt, load_adapter, merge_adapters, save_adapter
from bmfm_pipeline.training.optimiser import decay_groups

SHORT = {"task__max_epochs": 1, "trainer__learning_rate": 3e-2}


def logits(model) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return model.eval()(*batch()).logits


def assert_close(first, second, tolerance=5e-6):
    for key, value in first.items():
        assert torch.allclose(value, second[key], atol=tolerance, rtol=1e-5), key


@pytest.mark.parametrize("dora", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_adapters_begin_without_effect_learn_and_merge_into_plain_weights(tmp_path, name, dora):
    model = model_of(name)
    before, plain_names = logits(model), set(model.state_dict())
    frozen_before = {key for key, p in model.named_parameters() if not p.requires_grad}
    adapted = add_adapters(model, LoraSettings(use_dora=dora, bias="lora_only"), seed=1)
    assert_close(before, logits(model), 0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.train().activation_checkpointing_enable({"use_reentrant": False})
    sum(value.square().mean() for value in model(*batch()).logits.values()).backward()
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad.abs().sum() > 0 for p in trained.values())
    assert all("lora_" in key or key.endswith("bias") or "pooler" in key or key.startswith("cls.") for key in trained)
    assert not frozen_before & set(trained)
    decayed = {id(p) for group in decay_groups(model, 0.1) if group["weight_decay"] for p in group["params"]}
    assert all(
        (id(p) in decayed) is bool("lora_A" in key or "lora_B" in key) for key, p in trained.items() if "lora_" in key
    )
    for layer in adapted.layers:  # each one has an adapter that reaches the result
        assert f"{layer}.lora_B.default.weight" in trained
    moved = logits(model)
    assert not torch.allclose(moved["celltype"], before["celltype"], atol=1e-3)
    save_adapter(model, tmp_path / "adapter", adapted)
    merge_adapters(model)
    assert set(model.state_dict()) == plain_names
    assert_close(moved, logits(model))
    assert_close(moved, logits(load_adapter(model_of(name), tmp_path / "adapter")))


def test_the_saved_adapter_is_what_peft_reads(tmp_path):
    from peft import PeftModel

    model = model_of("scbert")
    adapted = add_adapters(model, LoraSettings(layers_to_transform=[0, 2]), seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    save_adapter(model, tmp_path, adapted)
    assert_close(logits(model), logits(PeftModel.from_pretrained(model_of("scbert"), tmp_path)))
    with pytest.raises(CheckpointError, match="adapts layers that this SCLlamaForMultitask does not have"):
        load_adapter(model_of("scllama"), tmp_path)
    with pytest.raises(CheckpointError, match="holds no adapter"):
        load_adapter(model_of("scbert"), tmp_path / "nothing")


@pytest.mark.parametrize(
    ("name", "settings", "count"),
    [
        ("scbert", {}, 18),
        ("scperformer", {"preset": "performer"}, 21),
        ("scmodernbert", {"preset": "scmodernbert"}, 12),
        ("scllama", {"preset": "llama"}, 15),
        ("scnystromformer", {"preset": "nystromformer", "layers_to_transform": 1}, 6),
        ("scllama", {"target_modules": "all-linear", "layers_to_transform": [0, 2], "layers_pattern": "blocks"}, 10),
        ("scbert", {"target_modules": ["query", "output.dense"]}, 9),
        ("scbert", {"target_modules": r".*\.layer\.[01]\..*(query|value)"}, 4),
    ],
)
def test_layers_are_chosen_by_preset_name_pattern_and_number(name, settings, count):
    chosen = layers_to_adapt(model_of(name), LoraSettings(**settings))
    assert len(chosen) == len(set(chosen)) == count
    assert not [layer for layer in chosen if "pooler" in layer or layer.startswith("cls")]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "llama"}, "preset llama names layers of scllama, but the model is scbert; use the preset default"),
        ({"target_modules": ["query", "c_attn"]}, "no Linear layer called c_attn; it has dense, key, query, value"),
        ({"target_modules": "quer"}, "no Linear layer of the encoder of this scbert is matched as a whole by 'quer'"),
        ({"target_modules": "("}, "is not a regular expression"),
        ({"layers_to_transform": [1, 3]}, "there is no layer 3; layers are 0 to 2"),
        ({"layers_pattern": "blocks"}, "no layer of this scbert is numbered behind blocks"),
    ],
)
def test_names_that_match_nothing_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        layers_to_adapt(model_of("scbert"), LoraSettings(**settings))


def test_embeddings_of_input_fields_that_the_checkpoint_does_not_know_are_trained():
    model = model_of("scbert")
    adapted = add_adapters(model, LoraSettings(), new_fields=["expressions"])
    trained = [key for key, p in model.named_parameters() if p.requires_grad and ".embeddings." in key]
    assert trained and all("expressions_embeddings" in key for key in trained)
    assert adapted.whole == ["expressions_embeddings", "pooler", "cls"]


@pytest.fixture(scope="module")
def pretrained(prepared, tmp_path_factory) -> Path:
    from training_cases import Cases

    cases = Cases(prepared, tmp_path_factory.mktemp("adapters"))
    spec = cases.spec("pretrained", task__max_epochs=1)
    cases.train(spec)
    return Path(spec.run_dir) / "model"


def test_a_fine_tune_with_adapters_leaves_the_pretrained_weights_and_exports_plain_ones(cases, pretrained):
    spec = cases.spec(
        "tuned", "finetune", init_from=pretrained, trainer__lora_config="default", trainer__weight_decay=0.1, **SHORT,
        model__load="backbone",
    )  # fmt: skip
    summary, events = cases.train(spec)
    start = next(event for event in events if event["kind"] == "start")
    assert summary["trained_parameters"] == start["trained_parameters"] < summary["parameters"]
    assert any(
        f"DoRA of rank 16 in 12 layers of the encoder, pooler, cls trained in full: {start['trained_parameters']:,} of"
        in text
        for text in notes(events)
    )
    stored, base = checkpoint(spec), load_file(pretrained / "model.safetensors")
    for key, tensor in stored["state_dict"].items():
        plain = key.removeprefix("model.").replace(".base_layer.", ".")
        if "lora_" not in key and plain in base and "pooler" not in plain:
            assert torch.equal(tensor, base[plain]), key
    assert all(tensor.abs().sum() > 0 for key, tensor in stored["state_dict"].items() if "lora_B" in key)
    decayed, still = stored["optimizer_states"][0]["param_groups"]
    assert (decayed["weight_decay"], still["weight_decay"]) == (0.1, 0.0)
    model = Path(spec.run_dir) / "model"
    assert not [key for key in exported(spec) if "lora" in key or "base_layer" in key]
    described = json.loads((model / "adapter" / "adapter_config.json").read_text())
    assert described["use_dora"] and described["modules_to_save"] == ["pooler", "cls"]
    assert str(cases.folder) not in (model / "adapter" / "adapter_config.json").read_text()
    tuned = load_model(model)
    again = type(tuned)(tuned.config)
    initialise_from(again, pretrained, "backbone")
    again = load_adapter(again, model / "adapter")
    ids = torch.stack([torch.arange(5, 25), torch.arange(5, 25) % 8 + 5]).unsqueeze(0)
    with torch.no_grad():
        first, second = tuned(ids).logits["celltype"], again.eval()(ids).logits["celltype"]
    assert torch.allclose(first, second, atol=1e-5)


def test_a_run_with_adapters_that_is_stopped_resumes_exactly_and_recomputed_layers_change_nothing(cases, pretrained):
    options = {"init_from": pretrained, "trainer__lora_config": {"r": 4}, "model__load": "backbone", **SHORT}
    reference, stopped = (cases.spec(name, "finetune", **options) for name in ("reference", "stopped"))
    saving = cases.spec("saving", "finetune", model__gradient_checkpointing=True, **options)
    cases.train(reference)
    assert cases.train(stopped, StopAtLook(3))[0] is None
    cases.train(stopped)
    assert_same_training(stopped, reference)
    cases.train(saving)
    assert_same_training(saving, reference)


def test_adapters_without_pretrained_weights_are_refused(cases):
    with pytest.raises(ConfigError, match=r"model.checkpoint is null.*finetune\.trainer\.lora_config"):
        cases.train(cases.spec(trainer__lora_config="default"))
