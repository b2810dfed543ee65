"""Learning rate, weight decay, frozen layers, accumulated gradients, and a loss that is not a number."""

import math

import pytest
import torch
from torch import nn
from training_cases import checkpoint, equal, history, losses, run_config

from bmfm_pipeline.errors import ConfigError, TrainingError
from bmfm_pipeline.training import build_data_module, build_module
from bmfm_pipeline.training.module import decay_groups


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


def test_decay_reaches_the_optimiser(cases):
    spec = cases.spec(trainer__weight_decay=0.03)
    cases.train(spec)
    groups = checkpoint(spec)["optimizer_states"][0]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.03, 0.0]


def test_two_batches_a_step_equal_one_of_twice_the_size(cases):
    """Up to dropout, which is off here, and to a loss that is averaged per batch."""
    still = {"model__hidden_dropout_prob": 0, "model__attention_probs_dropout_prob": 0, "task__max_epochs": 1}
    gathered = cases.spec("gathered", data_module__batch_size=10, task__accumulate_grad_batches=2, **still)
    at_once = cases.spec("at once", data_module__batch_size=20, **still)
    for spec in (gathered, at_once):
        cases.train(spec)
    assert len(losses(gathered)) == len(losses(at_once)) == 5
    assert losses(gathered) == pytest.approx(losses(at_once), rel=0.02)


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


def test_a_loss_that_is_not_a_number_ends_training_and_names_the_batch(cases):
    spec = cases.spec(trainer__learning_rate=1e30, trainer__warmup_steps=0, task__gradient_clip_val=None)
    with pytest.raises(
        TrainingError, match=r"the loss is (nan|inf) at step \d+, batch \d+ \(cells [ACGT]+.*learning_rate"
    ):
        cases.train(spec)
    assert all(math.isfinite(value) for value in losses(spec))
