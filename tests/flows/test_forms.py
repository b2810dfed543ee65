"""The forms of the flows: what a page shows of them, what they refuse, and the overrides that they become."""

from typing import get_args

import pytest
from pydantic import ValidationError

from bmfm_pipeline.config import TestTaskConfig, compose
from bmfm_pipeline.config.sections import ControlSet
from bmfm_pipeline.stages.planning import DEFAULT_CONFIGS, stage_overrides
from flows.parameters import (
    EvaluateParameters,
    FinetuneParameters,
    InterpretParameters,
    PipelineParameters,
    PreprocessParameters,
    PretrainParameters,
    ReevaluateParameters,
)

FORMS = {
    "preprocess": PreprocessParameters,
    "pretrain": PretrainParameters,
    "finetune": FinetuneParameters,
    "evaluate": EvaluateParameters,
    "reevaluate": ReevaluateParameters,
    "interpret": InterpretParameters,
    "pipeline": PipelineParameters,
}
VALUES = {
    "seed": 7,
    "max_epochs": 3,
    "max_steps": 9,
    "batch_size": 5,
    "learning_rate": 0.002,
    "checkpoint": "/models/a b, {c}=$d 'e' \"f\"",
    "ci_method": "wilson",
    "num_bootstrap_runs": 11,
    "controls": "full",
    "margin": 0.01,
    "cells": "/data/cells.h5ad",
    "max_cells": 13,
    "baseline": "zero",
    "sanity_checks": True,
}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
every_knob = pytest.mark.parametrize(
    ("form", "knob"),
    [(form, knob) for form in FORMS.values() for knob in form.knobs],
    ids=[f"{name}-{knob}" for name, form in FORMS.items() for knob in form.knobs],
)


def fields_of(form) -> dict:
    return form.model_json_schema()["properties"]


@every_form
def test_every_field_has_a_title_a_description_and_one_type(form):
    for name, field in fields_of(form).items():
        assert field["title"] and field["title"] != name, name
        assert field["description"].endswith("."), name
        assert isinstance(field["type"], str), f"{name} would show as a choice between types"
        assert field.get("default", "") is not None, f"a page would fill {name} with null, and then refuse it"


@every_form
def test_no_two_fields_share_a_title(form):
    titles = [field["title"] for field in fields_of(form).values()]
    assert len(titles) == len(set(titles))


@every_form
def test_the_dataset_comes_first_and_what_is_rarely_set_last(form):
    fields = fields_of(form)
    assert [field["position"] for field in fields.values()] == list(range(len(fields)))
    names = list(fields)
    assert names[0] == "target"
    rarely = [name for name in names if name in ("overrides", "config_name", "config_dir", "workspace")]
    assert names == [name for name in names if name not in rarely] + rarely


def test_counts_start_at_one_and_rates_above_zero():
    fields = fields_of(PretrainParameters)
    assert {name: fields[name]["minimum"] for name in ("max_epochs", "max_steps", "batch_size")} == {
        "max_epochs": 1,
        "max_steps": 1,
        "batch_size": 1,
    }
    assert fields["seed"]["minimum"] == 0
    assert fields["learning_rate"]["exclusiveMinimum"] == 0


@pytest.mark.parametrize("form", [EvaluateParameters, PipelineParameters])
def test_choices_are_those_that_the_configuration_allows(form):
    fields = fields_of(form)
    assert fields["ci_method"]["enum"] == list(get_args(TestTaskConfig.model_fields["ci_method"].annotation))
    assert all(name in fields["controls"]["description"] for name in get_args(ControlSet))


@pytest.mark.parametrize(
    ("written", "read"),
    [("full", "full"), (" no_pretrain , full", "full,no_pretrain"), ("[auto, celltypist]", "auto,celltypist")],
)
def test_controls_are_words_between_commas(written, read):
    form = EvaluateParameters(controls=written)
    assert form.controls == read
    run = compose(DEFAULT_CONFIGS["evaluate"], form.to_overrides())
    assert run.evaluation.controls == (read.split(",") if "," in read else read)


def test_a_choice_that_does_not_exist_is_refused():
    with pytest.raises(ValidationError, match="controls"):
        EvaluateParameters(controls="none")
    with pytest.raises(ValidationError, match="ci_method"):
        PipelineParameters(ci_method="bootstrap")


@every_form
def test_empty_inputs_leave_the_configuration_as_it_is(form):
    empty = {name: " " if field["type"] == "string" else None for name, field in fields_of(form).items()}
    for box in ("pools", "sanity_checks"):  # ticked or not
        empty.pop(box, None)
    assert form(**empty) == form()
    assert form(**empty).to_overrides() == []


@every_knob
def test_a_knob_becomes_the_override_of_its_key(form, knob):
    key = form.knobs[knob]
    assert [word.partition("=")[0] for word in form(**{knob: VALUES[knob]}).to_overrides()] == [key]


@every_knob
def test_a_value_said_twice_is_refused(form, knob):
    key = form.knobs[knob]
    for word in (f"{key}=1", f"+{key}=1", f"++{key}=1", f"~{key}"):
        with pytest.raises(ValidationError, match=f"{key} is set twice"):
            form(**{knob: VALUES[knob], "overrides": ["data_module.max_length=64", word]})


@every_form
@pytest.mark.parametrize("word", ["trainer.learning_rate", "", "task.max_steps 5"])
def test_what_is_no_override_is_refused(form, word):
    with pytest.raises(ValidationError, match="is not an override"):
        form(overrides=[word])


@every_form
def test_a_field_that_does_not_exist_is_refused(form):
    with pytest.raises(ValidationError, match="max_step\n"):
        form(max_step=3)


def test_the_pipeline_has_no_config_of_a_single_stage():
    assert not {"config_name", "config_dir"} & set(fields_of(PipelineParameters))


@pytest.mark.parametrize("stage", ["preprocess", "pretrain", "finetune", "evaluate", "interpret"])
def test_every_knob_reaches_the_configuration_of_its_stage(stage):
    form = FORMS[stage](**{name: VALUES[name] for name in FORMS[stage].knobs})
    run = compose(DEFAULT_CONFIGS[stage], ["dataset=zheng68k-mini", *form.to_overrides()])
    for knob, key in form.knobs.items():
        value = run
        for part in key.split("."):
            value = getattr(value, part)
        assert value == VALUES[knob], key


def test_every_knob_of_the_pipeline_reaches_a_stage():
    names = [name for name in PipelineParameters.knobs if name != "seed"]
    words = PipelineParameters(**{name: VALUES[name] for name in names}).to_overrides()
    reached = {
        stage: stage_overrides(stage, words) for stage in DEFAULT_CONFIGS if stage not in ("predict", "interpret")
    }
    assert reached["evaluate"] == ['task.ci_method="wilson"', "task.num_bootstrap_runs=11"]
    assert reached["pretrain"] == reached["finetune"]
    assert reached["pretrain"] == ["task.max_epochs=3", "task.max_steps=9", "data_module.batch_size=5"]


@pytest.mark.parametrize(
    ("given", "kept"), [("10, 100", "10, 100"), ([10, 100], "[10, 100]"), (True, "true"), (50, "50"), (False, None)]
)
def test_shares_of_the_cells_are_text_however_they_are_given(given, kept):
    assert PipelineParameters(few_shot=given).few_shot == kept
    assert PipelineParameters(few_shot=given).to_overrides() == []


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("few_shot", "ten", "not a number"),
        ("seeds", "1", "2 seeds or more"),
        ("parallel", 0, "parallel"),
        ("seeds_of", "luck", "seeds_of"),
    ],
)
def test_a_study_that_makes_no_sense_is_refused_by_the_form(field, value, said):
    with pytest.raises(ValidationError, match=said):
        PipelineParameters(**{field: value})
