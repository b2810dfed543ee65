"""Masking that follows the errors of validations: the weights, where they come from, and that a stopped run keeps them."""

import numpy as np
import pandas as pd
import pytest
import torch
from training_cases import StopAtLook, assert_same_training, checkpoint, run_config

from bmfm_pipeline.errors import ConfigError
from bmfm_pipeline.objectives import build_objectives
from bmfm_pipeline.training import build_data_module, build_module
from bmfm_pipeline.training.adaptive import GeneErrors, adaptive_masking, error_weights
from bmfm_pipeline.training.keeping import Position

ADAPTIVE = {"data_module__masking_strategy": {"kind": "adaptive"}}


@pytest.mark.parametrize("decreasing", [False, True])
def test_weights_are_those_of_a_hundred_bins_of_equal_width(decreasing):
    errors = np.random.default_rng(0).gamma(2.0, size=500)
    turned = errors.max() - errors if decreasing else errors
    expected = (pd.cut(turned, bins=100, labels=False) + 1) / 101
    found = error_weights(errors, np.ones(500, dtype=bool), decreasing=decreasing)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert found.min() == pytest.approx(1 / 101) and found.max() == pytest.approx(100 / 101)


def test_a_temperature_sharpens_and_genes_that_were_not_seen_get_the_mean():
    errors, seen = np.array([0.0, 1.0, 0.5, 9.0]), np.array([True, True, True, False])
    soft = error_weights(errors, seen, temperature=0.5)
    plain = error_weights(errors, seen)
    expected = np.exp(plain[:3] / 0.5) / np.exp(plain[:3] / 0.5).mean()
    np.testing.assert_allclose(soft[:3], expected, rtol=1e-5)
    assert plain[3] == pytest.approx(plain[:3].mean()) and soft[3] == pytest.approx(1.0)
    assert len(set(error_weights(np.ones(4), seen))) == 1
    assert error_weights(errors, np.zeros(4, dtype=bool)).tolist() == [1, 1, 1, 1]


def test_errors_are_added_up_by_gene_and_a_hidden_gene_is_known_by_its_label():
    fields = [
        {"field_name": "genes", "vocab_size": 9, "is_masked": True, "decode_modes": {"token_scores": {}}},
        {"field_name": "expressions", "vocab_size": 9, "is_masked": True, "decode_modes": {"token_scores": {}}},
    ]
    values = np.array([np.nan] * 5 + [0.0, 1.0, 2.0, 3.0])
    losses = [{"field_name": "expressions", "name": "cross_entropy"}]
    objectives = build_objectives(losses, fields, [], {"expressions": values})
    errors = GeneErrors("x", objectives, "expressions", 9, 0, torch.as_tensor(values, dtype=torch.float32))
    labels = {
        "expressions": torch.tensor([[-100, 8, 6, -100], [-100, 5, 7, -100]]),
        "genes": torch.tensor([[-100, 7, -100, -100], [-100, -100, -100, -100]]),
    }
    batch = {
        "input_ids": torch.tensor([[[3, 4, 6, 1], [3, 4, 4, 1]], [[3, 6, 5, 1], [3, 4, 4, 1]]]),
        "labels": labels,
        "positions": objectives.positions(labels),
    }
    predicted = torch.tensor([6, 6, 8, 4])  # 1, 1, 3 and a special token, which stands for no number
    errors.add({"expressions_token_scores": torch.nn.functional.one_hot(predicted, 9).float()}, batch)
    means, seen = errors.means()
    assert seen.nonzero()[0].tolist() == [5, 6, 7]
    assert means[5:8].tolist() == [2.0, (0 + 3) / 2, 2.0]


def test_errors_of_whole_cell_targets_are_added_up_where_there_is_a_target():
    fields = [
        {"field_name": "genes", "vocab_size": 4},
        {
            "field_name": "expressions",
            "vocab_size": 9,
            "decode_modes": {"wced": {"vocab_field": "genes"}},
            "tokenization_strategy": "continuous_value_encoder",
        },
    ]
    losses = [{"field_name": "expressions", "name": "mse", "wced_target": "non_input_genes"}]
    errors = GeneErrors("x", build_objectives(losses, fields), "expressions", 4, 0, None)
    targets = torch.tensor([[-100.0, 1.0, -100.0, 2.0], [-100.0, 3.0, -100.0, -100.0]])
    scores = torch.tensor([[[5.0, 0.5, 5.0, 2.0]], [[5.0, 1.0, 5.0, 5.0]]])
    errors.add({"expressions_wced": scores}, {"labels": {"expressions": {"non_input": targets}}})
    means, seen = errors.means()
    assert seen.tolist() == [False, True, False, True] and means.tolist() == [0.0, 1.25, 0.0, 0.0]
    errors.reset()
    nothing, everything = torch.full_like(targets, -100.0), torch.full_like(targets, 4.0)
    errors.add({"expressions_wced": scores}, {"labels": {"expressions": {"non_input": nothing, "all": everything}}})
    assert errors.means()[0].tolist() == [1.0, 3.25, 1.0, 1.5]


def test_badly_predicted_genes_are_masked_more_from_the_next_epoch_on(cases, prepared):
    spec = cases.spec(**ADAPTIVE, task__max_epochs=3)
    cases.train(spec)
    [state] = [value for key, value in checkpoint(spec)["callbacks"].items() if "AdaptiveMasking" in key]
    assert [first for first, _ in state["weights"]] == [2, 3]
    weights = state["weights"][-1][1].numpy()
    assert weights.shape == (765,) and weights.min() < 0.1 and weights.max() == pytest.approx(100 / 101)

    data = build_data_module(run_config(**ADAPTIVE, data_module__limit_dataset_samples=None), prepared)
    data.setup("fit")
    data.set_mask_weights(weights, from_epoch=1)
    column = {token: place for place, token in enumerate(data.gene_token_ids)}
    heavy = []
    for epoch in (0, 1):
        data.train_sampler.set_epoch(epoch)
        chosen = [batch["input_ids"][:, 0][batch["labels"]["expressions"] != -100] for batch in data.train_dataloader()]
        heavy.append(np.mean([weights[column[int(token)]] for token in torch.cat(chosen)]))
    assert heavy[1] > 1.1 * heavy[0]


@pytest.mark.parametrize(
    "way",
    [
        ADAPTIVE | {"task__val_check_interval": 2, "data_module__num_workers": 2},
        {
            "data_module__selective_dropout": {"fraction": 0.3, "adaptive": True, "temperature": 0.5},
            "fields": [
                {"field_name": "genes"},
                {
                    "field_name": "expressions",
                    "is_masked": True,
                    "tokenization_strategy": "continuous_value_encoder",
                },
            ],
            "trainer__losses": None,
        },
    ],
    ids=["masking, validation within the epoch", "dropout, continuous values"],
)
def test_a_run_that_is_stopped_keeps_its_weights(cases, way):
    reference, stopped = cases.spec("reference", **way), cases.spec("stopped", **way)
    plain = cases.spec(
        "plain", **{key: value for key, value in way.items() if "masking" not in key and "dropout" not in key}
    )
    assert cases.train(reference)[0] is not None
    stops = 0
    while cases.train(stopped, StopAtLook(5))[0] is None:
        stops += 1
        assert stops < 30
    assert stops >= 2
    assert_same_training(stopped, reference)
    cases.train(plain)
    assert not torch.equal(*(next(iter(checkpoint(s)["state_dict"].values())) for s in (reference, plain)))


def test_what_has_no_errors_to_follow_is_refused(prepared):
    labels = run_config("finetune", data_module__selective_dropout={"fraction": 0.3, "adaptive": True})
    data = build_data_module(labels, prepared)
    data.setup("fit")
    with pytest.raises(ConfigError, match=r"selective_dropout: adaptive needs values that are predicted"):
        adaptive_masking(labels, data, build_module(labels, data), Position(data))
    zeros = run_config(**ADAPTIVE, trainer__losses=[{"field_name": "genes", "name": "cross_entropy"}],
                       fields=[{"field_name": "genes", "is_masked": True}, {"field_name": "expressions", "is_masked": True}])  # fmt: skip
    data = build_data_module(zeros, prepared)
    data.setup("fit")
    with pytest.raises(ConfigError, match=r"needs a loss that predicts values of the field 'expressions' .*found none"):
        adaptive_masking(zeros, data, build_module(zeros, data), Position(data))
