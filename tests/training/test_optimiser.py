"""Learning rate, weight decay, frozen layers, accumulated gradients, and a loss that is not a number."""

import math
import re

import pytest
import torch
from torch import nn
from training_cases import (
    StopAtLook,
    assert_equal_to_rounding,
    checkpoint,
    equal,
    few_labels,
    history,
    losses,
    run_config,
)

from bmfm_pipeline.config import TrainerConfig
from bmfm_pipeline.errors import ConfigError
from bmfm_pipeline.models import build_model
from bmfm_pipeline.training import build_data_module, build_module
from bmfm_pipeline.training.optimiser import decay_groups, rate_factor


def rates(spec) -> list[float]:
    return [entry["learning_rate"] for entry in history(spec) if "train/loss" in entry]


def test_the_rate_warms_up_and_stays(cases):
    spec = cases.spec(trainer__learning_rate=1e-3, trainer__warmup_steps=4)
    cases.train(spec)
    assert rates(spec) == pytest.approx([2e-4, 4e-4, 6e-4, 8e-4, *[1e-3] * 6])


def test_the_rate_decays_to_zero_over_the_steps_given(cases):
    spec = cases.spec(trainer__learning_rate=1e-3, trainer__warmup_steps=1, trainer__lr_decay_steps=4)
    cases.train(spec)
    assert rates(spec) == pytest.approx([5e-4, 1e-3, 7.5e-4, 5e-4, 2.5e-4, 0, 0, 0, 0, 0])


def test_minus_one_decays_until_the_end_of_training(cases):
    spec = cases.spec(
        trainer__learning_rate=1e-3,
        trainer__warmup_steps=2,
        trainer__lr_decay_steps=-1,
        task__accumulate_grad_batches=2,
    )
    summary, _ = cases.train(spec)
    assert summary["steps"] == 6  # two epochs of five batches, two batches a step and one alone
    assert rates(spec) == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3, 7.5e-4, 5e-4, 2.5e-4])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"lr_decay_steps": 4}, [0.5, 1, 0.75, 0.5, 0.25, 0, 0]),
        ({"lr_decay_steps": 4, "min_lr_ratio": 0.2}, [0.5, 1, 0.8, 0.6, 0.4, 0.2, 0.2]),
        ({"lr_decay_steps": 4, "lr_schedule": "cosine"}, [0.5, 1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5, 0, 0]),
        ({"lr_schedule": "cosine", "min_lr_ratio": 0.5}, [0.5, 1, 0.75 + 0.5**2.5, 0.75, 0.75 - 0.5**2.5, 0.5, 0.5]),
        ({"lr_schedule": "linear"}, [0.5, 1, 0.75, 0.5, 0.25, 0, 0]),
        ({"lr_schedule": "constant"}, [0.5, 1, 1, 1, 1, 1, 1]),
        ({}, [0.5, 1, 1, 1, 1, 1, 1]),
    ],
)
def test_the_rate_falls_as_its_schedule_says(settings, expected):
    factor = rate_factor(TrainerConfig(warmup_steps=1, **settings), planned=5)
    assert [factor(step) for step in range(7)] == pytest.approx(expected)


def test_contradicting_schedules_are_refused():
    with pytest.raises(ValueError, match=r"lr_schedule is constant, but lr_decay_steps is -1"):
        TrainerConfig(lr_schedule="constant", lr_decay_steps=-1)
    with pytest.raises(ValueError, match=r"min_lr_ratio is 0.1, but the rate is constant"):
        TrainerConfig(min_lr_ratio=0.1)
    with pytest.raises(ConfigError, match="lr_schedule is cosine without lr_decay_steps, which needs an end"):
        rate_factor(TrainerConfig(lr_schedule="cosine"), math.inf)


def test_a_decay_without_an_end_or_without_steps_is_refused(cases):
    with pytest.raises(ConfigError, match=r"lr_decay_steps is 0.*use null for a constant rate"):
        cases.train(cases.spec(trainer__lr_decay_steps=0))
    endless = {"task__max_epochs": None, "task__max_time": "00:00:01:00"}
    with pytest.raises(ConfigError, match="lr_decay_steps is -1, which needs an end"):
        cases.train(cases.spec("endless", trainer__lr_decay_steps=-1, **endless))


def test_only_weights_of_linear_layers_decay():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.PReLU(), nn.Linear(4, 2))
    model[4].weight.requires_grad = False
    decayed, plain = decay_groups(model, 0.1)
    assert decayed["weight_decay"] == 0.1
    assert decayed["params"] == [model[1].weight]
    assert plain["weight_decay"] == 0
    assert {id(p) for p in plain["params"]} == {
        id(p) for p in (model[0].weight, model[1].bias, *model[2].parameters(), *model[3].parameters(), model[4].bias)
    }


@pytest.mark.parametrize("kind", ["scbert", "scmodernbert", "scperformer", "scnystromformer", "scllama"])
def test_layers_learn_the_slower_the_deeper_they_lie(kind):
    fields = [
        {"field_name": "genes", "vocab_size": 9},
        {"field_name": "layers.0", "vocab_size": 7, "is_masked": True, "decode_modes": ["token_scores"]},
    ]
    sizes = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 8}
    model = build_model({"model_type": kind, **sizes}, fields, [{"label_column_name": "kind", "n_unique_values": 3}])
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = decay_groups(model, 0.1, learning_rate=1.0, layerwise_lr_decay=0.5)
    rates = {names[id(parameter)]: group["lr"] for group in groups for parameter in group["params"]}
    assert len(rates) == sum(parameter.requires_grad for parameter in model.parameters())
    for name, rate in rates.items():
        if name.startswith("cls.") or "pooler" in name or "final_norm" in name:
            assert rate == 1.0, name
        elif ".embeddings." in name or "aux_tokens" in name:
            assert rate == 0.5**4, name
        else:
            layer = int(re.search(r"\.(\d)\.", name)[1])
            assert rate == 0.5 ** (3 - layer), name
    assert groups[0]["lr"] == 1.0
    assert len(groups) == 9 if kind != "scllama" else 8 <= len(groups) <= 10


def test_layerwise_rates_need_layers():
    with pytest.raises(ConfigError, match="no numbered layers"):
        decay_groups(nn.Sequential(nn.Linear(2, 2)), 0.0, 1.0, 0.9)


def test_layerwise_rates_follow_the_schedule_and_leave_frozen_layers_out(cases):
    spec = cases.spec(
        trainer__layerwise_lr_decay=0.5, trainer__learning_rate=1e-3, trainer__warmup_steps=4, task__freeze_layers=True
    )
    cases.train(spec, StopAtLook(2))
    groups = checkpoint(spec)["optimizer_states"][0]["param_groups"]
    # Heads with and without decay, embeddings; the two frozen layers between them still count.
    assert [group["initial_lr"] for group in groups] == pytest.approx([1e-3, 1e-3, 1e-3 / 8])
    assert [group["lr"] / group["initial_lr"] for group in groups] == pytest.approx([0.6] * 3)
    assert rates(spec) == pytest.approx([2e-4, 4e-4])
    cases.train(spec)
    assert rates(spec) == pytest.approx([2e-4, 4e-4, 6e-4, 8e-4, *[1e-3] * 6])


def test_decay_reaches_the_optimiser(cases):
    spec = cases.spec(trainer__weight_decay=0.03)
    cases.train(spec)
    groups = checkpoint(spec)["optimizer_states"][0]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.03, 0.0]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_that_make_a_step_together_equal_one_that_holds_their_cells(cases, workers):
    """Also where targets are shared out unevenly, or some batches have none, and for the last step of an epoch, which is short."""
    gathered = cases.spec(
        "gathered",
        data_module__batch_size=1,
        task__accumulate_grad_batches=4,
        data_module__num_workers=workers,
        **few_labels(cases),
    )
    at_once = cases.spec("at once", data_module__batch_size=4, **few_labels(cases))
    for spec in (gathered, at_once):
        cases.train(spec)
    assert_equal_to_rounding(gathered, at_once)
    with_labels = [entry for entry in history(at_once) if "train/celltype_cross_entropy_loss" in entry]
    assert 0 < len(with_labels) < len(losses(at_once)) == 22


def test_a_limited_epoch_ends_with_a_short_step(cases):
    few = few_labels(cases, task__max_epochs=1, task__limit_train_batches=5, trainer__learning_rate=1e-20)
    gathered = cases.spec("gathered", data_module__batch_size=2, task__accumulate_grad_batches=2, **few)
    alone = cases.spec("alone", data_module__batch_size=2, **few)
    for spec in (gathered, alone):
        cases.train(spec)
    assert len(losses(gathered)) == 3
    assert losses(gathered)[2] == losses(alone)[4]  # the fifth batch is a step of its own


@pytest.mark.parametrize(("freeze", "part"), [(True, ".encoder."), (r"embeddings\.", "embeddings.")])
def test_frozen_layers_stay_bit_identical_and_the_others_move(cases, freeze, part):
    spec = cases.spec(task__freeze_layers=freeze)
    _, events = cases.train(spec)
    before = build_module(run_config(), build_data_module(run_config(), cases.data)).state_dict()
    after = checkpoint(spec)["state_dict"]
    frozen = {name for name in after if part in name}
    assert frozen
    assert equal({name: after[name] for name in frozen}, {name: before[name] for name in frozen})
    assert any(not torch.equal(after[name], before[name]) for name in after if name not in frozen)
    start = next(event for event in events if event["kind"] == "start")
    assert start["trained_parameters"] < start["parameters"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("no_such_layer", "no parameter matches 'no_such_layer'.*names begin with"),
        ("(", "not a regular"),
        (".*", "every"),
    ],
)
def test_freezing_nothing_or_everything_is_refused(cases, pattern, message):
    with pytest.raises(ConfigError, match=message):
        cases.train(cases.spec(task__freeze_layers=pattern))
