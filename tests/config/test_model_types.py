"""The model section of each type: its keys, packaged groups, existing spellings, and switching from one type to another."""

import dataclasses

import pytest

from bmfm_pipeline.config import compose, compose_raw
from bmfm_pipeline.config.models import MODELS, WHERE_WEIGHTS_START
from bmfm_pipeline.errors import ConfigError

GROUPS = {name: name if name == "scbert" else name.removeprefix("sc") for name in MODELS}
ON_PRETRAINING = "defaults: [pre_train_config, _self_]\n"
# In every model configuration, but given elsewhere or without meaning for a person.
BESIDE = {"model_type", "pad_token_id", "use_cache", "attention_kwargs"}


@pytest.mark.parametrize("name", MODELS)
def test_the_packaged_group_holds_every_key_with_its_default(name):
    raw = compose_raw("pre_train_config", [f"model={GROUPS[name]}"])["model"]
    given = {key: value for key, value in raw.items() if not key.startswith("_")}
    assert set(given) == set(MODELS[name].model_fields) - BESIDE
    assert given == {key: MODELS[name].model_fields[key].default for key in given}


@pytest.mark.parametrize("name", MODELS)
def test_keys_and_defaults_are_those_of_the_network(name):
    from bmfm_pipeline.models.registry import BACKBONES

    network = {field.name: field.default for field in dataclasses.fields(BACKBONES[name].config_class)}
    said = MODELS[name].model_fields.items()
    own = {key: field.default for key, field in said if key not in ("model_type", "path_shares", *WHERE_WEIGHTS_START)}
    assert own == {key: network[key] for key in own} | {"classifier_pooling": None}
    # What transformers adds to every configuration is no setting of ours.
    from transformers import PretrainedConfig

    general = {field.name for field in dataclasses.fields(PretrainedConfig)}
    assert set(network) - general - set(own) <= {"fields", "label_columns", "checkpoint"}


def test_a_type_said_by_target_starts_from_its_own_defaults(tmp_path, write):
    write(
        tmp_path,
        "mine",
        ON_PRETRAINING
        + "model: {_target_: bmfm_targets.config.SCModernBertConfig, norm_eps: 1.0e-6, hidden_size: 48}\n",
    )
    model = compose("mine", ["preset=none"], tmp_path).model
    assert (model.model_type, model.num_hidden_layers, model.layer_norm_eps, model.hidden_size) == (
        "scmodernbert",
        22,
        1e-6,
        48,
    )


def test_a_type_said_in_an_override_does_too():
    model = compose("pre_train_config", ["+model.model_type=scllama", "preset=none"]).model
    assert model == MODELS["scllama"](num_hidden_layers=12)


@pytest.mark.usefixtures("without_accelerator")
def test_an_older_spelling_counts_as_written_where_the_preset_would_set_the_key(tmp_path, write):
    block = "model: {_target_: bmfm_targets.config.SCModernBertConfig, embedding_dropout: 0.25}\n"
    run = compose("mine", config_dir=write(tmp_path, "mine", ON_PRETRAINING + block))
    assert run.preset_used == "laptop" and run.model.hidden_dropout_prob == 0.25


def test_keys_of_bmfm_targets_that_change_nothing_here_are_accepted_where_they_are_off(tmp_path, write):
    block = (
        "model: {_target_: bmfm_targets.models.predictive.llama.LlamaForMultiTaskConfig, hidden_size: 384, flex_attention: true, "
        "use_cache: true, pad_token_id: 0}\n"
    )
    run = compose("mine", config_dir=write(tmp_path, "mine", ON_PRETRAINING + block))
    assert (run.model.hidden_size, run.model.pad_token_id) == (384, 2)
    block = "model: {_target_: bmfm_targets.config.SCPerformerConfig, causal: true}\n"
    with pytest.raises(ConfigError, match=r"'causal' is a key of bmfm_targets that this version does not offer"):
        compose("mine", config_dir=write(tmp_path, "mine", ON_PRETRAINING + block))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["+model.model_type=scgpt"], "model_type must be one of scbert, .*found 'scgpt'"),
        (
            ["model=performer", "+model.attention=flex"],
            "scperformer has no key 'attention', scbert and scmodernbert and scllama",
        ),
        (["model=performer", "+model.kernel_typ=relu"], "did you mean 'kernel_type'"),
        (["model=nystromformer", "model.conv_kernel_size=4"], "must be odd"),
        (["model=modernbert", "model.num_attention_heads=256"], "is odd"),
        (["model.intermediate_size=null"], "only scllama"),
        (
            ["model=performer", "data_module.prevent_attention_to_masked=true"],
            "model=scbert, model=modernbert or model=llama",
        ),
        (["model=nystromformer", "data_module.prevent_attention_to_masked=true"], "scnystromformer approximates"),
        (["model=perfomer"], "performer"),
    ],
)
def test_what_cannot_be_built_is_refused(overrides, words):
    with pytest.raises(ConfigError, match=words):
        compose("pre_train_config", overrides)


@pytest.mark.parametrize("group", ["scbert", "modernbert", "llama"])
def test_hiding_masked_positions_goes_with_exact_attention(group):
    run = compose("pre_train_config", [f"model={group}", "data_module.prevent_attention_to_masked=true"])
    assert run.data_module.prevent_attention_to_masked
