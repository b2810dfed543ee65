"""A moving average of the weights: what it is, who uses it, and that a stop anywhere does not change it."""

import pytest
import torch
from training_cases import StopAtLook, assert_same_training, checkpoint, equal, exported, history, run_config

from bmfm_pipeline.training import build_data_module, build_module
from bmfm_pipeline.training.averaging import averaged_weights

WAY = {"trainer__ema_decay": 0.9, "task__val_check_interval": 2, "task__checkpoints_every_n_train_steps": 1}


def validation_losses(spec) -> list[float]:
    return [entry["validation/loss"] for entry in history(spec) if "validation/loss" in entry]


def test_the_average_follows_the_weights_and_is_what_validation_and_export_use(cases):
    averaged, plain = cases.spec("averaged", **WAY), cases.spec("plain", **{**WAY, "trainer__ema_decay": None})
    after = {0: build_module(run_config(), build_data_module(run_config(), cases.data)).state_dict()}
    for step in (1, 2):
        spec = cases.spec(f"{step} steps", **WAY, task__max_steps=step)
        cases.train(spec)
        after[step] = checkpoint(spec)["state_dict"]
    two = spec
    expected = {name: value * (2 / 11) + after[1][name] * (9 / 11) for name, value in after[0].items()}
    expected = {name: value * (3 / 12) + after[2][name] * (9 / 12) for name, value in expected.items()}
    found = averaged_weights(checkpoint(two))
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-7)

    for spec in (averaged, plain):
        cases.train(spec)
    # Training itself is the same; what is validated and exported is not.
    assert equal(checkpoint(averaged)["state_dict"], checkpoint(plain)["state_dict"])
    assert validation_losses(averaged) != validation_losses(plain)
    best = {name.removeprefix("model."): value for name, value in averaged_weights(checkpoint(averaged)).items()}
    assert min(validation_losses(averaged)) == validation_losses(averaged)[-1]
    assert equal(exported(averaged), {name: best[name] for name in exported(averaged)})
    assert not equal(exported(averaged), exported(plain))


def test_a_run_that_is_stopped_goes_on_with_its_average(cases):
    reference, counter = cases.spec("reference", **WAY), StopAtLook()
    cases.train(reference, counter)
    stopped, stops = cases.spec("stopped", **WAY), 0
    while cases.train(stopped, StopAtLook(2 + stops % 3))[0] is None:  # also in the middle of validations
        stops += 1
        assert stops < 40
    assert stops > 5
    assert_same_training(stopped, reference)
    assert equal(averaged_weights(checkpoint(stopped)), averaged_weights(checkpoint(reference)))


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_a_decay_without_an_average_is_refused(cases, decay):
    with pytest.raises(ValueError, match="ema_decay"):
        cases.spec(trainer__ema_decay=decay)
