"""Fields of a training that starts from a checkpoint: the checkpoint's first, the config's other names behind them."""

import pytest

from bmfm_pipeline.config import RunConfig, compose
from bmfm_pipeline.errors import ConfigError
from bmfm_pipeline.stages.checkpoint_fields import with_fields_of
from bmfm_pipeline.stages.jobs import Job


def checkpoint(fields) -> Job:
    """A planned pretraining with these fields."""
    return Job("pretrain", "x", "k", "/w", {"fields": fields}, {}, {}, "c")


def run_of(fields) -> RunConfig:
    plain = compose("fine_tune_train_config", ["dataset=zheng68k-mini", "preset=none"]).model_dump(mode="json")
    return RunConfig.model_validate({**plain, "fields": fields})


def test_the_checkpoint_says_what_a_field_is_and_the_config_what_is_learned_of_it():
    values = {"tokenization_strategy": "continuous_value_encoder", "encoder_kwargs": {"kind": "mlp"}}
    stored = [
        {"field_name": "genes", "vocab_update_strategy": "dynamic"},
        {"field_name": "expressions", "is_masked": True, "decode_modes": {"regression": {}}, **values},
        {"field_name": "perturbations"},
        {"field_name": "label_expressions", "is_input": False},
    ]
    run = run_of(
        [
            {"field_name": "expressions", "is_masked": False},
            {"field_name": "genes", "vocab_update_strategy": "dynamic"},
            {"field_name": "other"},
        ]
    )
    merged = with_fields_of(run, checkpoint(stored))
    assert [entry.field_name for entry in merged.fields] == ["genes", "expressions", "perturbations", "other"]
    genes, expressions, perturbations, _ = merged.fields
    assert expressions.continuous and expressions.encoder_kwargs == {"kind": "mlp"}
    assert not expressions.is_masked and not expressions.decode_modes
    assert genes.vocab_update_strategy == "static" and not perturbations.is_masked
    said = " | ".join(merged.notes)
    assert "expressions: tokenization_strategy, encoder_kwargs as the checkpoint has it, not as the config says" in said
    assert "perturbations is added: the checkpoint reads it" in said
    assert "the vocabulary of genes stays as the checkpoint has it" in said
    assert run.fields[0].field_name == "expressions", "the run that was given stays as it is"


def test_equal_fields_and_no_checkpoint_leave_the_run_alone():
    run = compose("fine_tune_train_config", ["dataset=zheng68k-mini"])
    stored = [entry.model_dump(mode="json") for entry in run.fields]
    assert with_fields_of(run, None) is run
    assert with_fields_of(run, checkpoint(stored)) is run


def test_losses_that_do_not_fit_the_fields_of_the_checkpoint_are_refused():
    run = compose("pre_train_config", ["dataset=zheng68k-mini", "preset=none"])
    stored = [entry.model_dump(mode="json") for entry in run.fields]
    stored[1]["tokenization_strategy"] = "continuous_value_encoder"
    with pytest.raises((ConfigError, ValueError), match="predicts tokens, but field 'expressions' is continuous"):
        with_fields_of(run, checkpoint(stored))


def test_a_checkpoint_of_tokens_takes_from_the_preset_what_reads_numbers(monkeypatch):
    monkeypatch.setattr("bmfm_pipeline.config.presets.find_accelerator", lambda: None)
    run = compose("fine_tune_train_config", ["dataset=zheng68k-mini", "model.checkpoint=/m"])
    assert run.data_module.sqrt_normalize_transform and run.model.linear_path
    merged = with_fields_of(run, checkpoint([{"field_name": "genes"}, {"field_name": "expressions"}]))
    assert not any(field.continuous for field in merged.fields)
    assert not merged.data_module.sqrt_normalize_transform and not merged.model.linear_path
    assert any("reads expressions as tokens" in note for note in merged.notes)
