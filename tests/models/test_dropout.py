"""Dropout on a processor: its rate, its seed, and attention with dropout against the plain formula."""

import numpy as np
import pytest
import torch

from bmfm_pipeline.models import dropout
from bmfm_pipeline.models.dropout import Dropout, attend_with_dropout


def test_dropout_keeps_the_mean_follows_the_seed_and_rests_in_evaluation():
    layer, states = Dropout(0.1).train(), torch.ones(400, 1000)
    torch.manual_seed(1)
    first = layer(states)
    assert (first == 0).float().mean().item() == pytest.approx(0.1, abs=0.003)
    assert first.max().item() == pytest.approx(1 / 0.9)
    assert first.mean().item() == pytest.approx(1.0, abs=0.004)
    assert not torch.equal(first, layer(states))
    torch.manual_seed(1)
    assert torch.equal(first, layer(states))
    # Neighbours are dropped independently.
    dropped = (first == 0).float()
    together = (dropped[:, 1:] * dropped[:, :-1]).mean().item()
    assert together == pytest.approx(0.01, abs=0.001)
    assert layer.eval()(states) is states or torch.equal(layer(states), states)
    assert not Dropout(1.0).train()(states).any() and torch.equal(Dropout(0.0).train()(states), states)
    assert layer.train()(states.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("room", [1 << 20, 600])
def test_attention_with_dropout_is_its_formula_and_so_are_its_gradients(room, monkeypatch):
    monkeypatch.setattr(dropout, "_SCORES", room)  # a small room takes the heads in parts
    parts = [torch.randn(2, 3, 17, 8, requires_grad=True) for _ in range(3)]

    def formula(query, key, value, rate):
        weights = torch.softmax(query @ key.transpose(-1, -2) / 8**0.5, dim=-1)
        heads = min(3, max(1, room // 17**2))
        kept = []
        for row in (4, 9):
            stream = np.random.SFC64([5, row])
            sizes = [min(heads, 3 - first) for first in range(0, 3, heads)]
            kept.append(torch.cat([dropout._keep(stream, (size, 17, 17), rate) for size in sizes]))
        return (weights * torch.stack(kept) / (1 - rate)) @ value

    for rate in (0.0, 0.3):
        got = attend_with_dropout(*parts, rate, 5, [4, 9])
        wanted = formula(*parts, rate)
        assert torch.allclose(got, wanted, atol=1e-5)
        gradients = [torch.autograd.grad(one.square().sum(), parts) for one in (got, wanted)]
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*gradients, strict=True))
    # A cell's draws are its own, whoever stands beside it.
    alone = attend_with_dropout(*(part[1:] for part in parts), 0.3, 5, [9])
    assert torch.allclose(alone, got[1:], atol=1e-6)


def test_attention_with_dropout_averages_to_attention():
    query, key, value = (torch.randn(1, 1, 6, 4) for _ in range(3))
    torch.manual_seed(0)
    mean = attend_with_dropout(*(part.expand(1000, -1, -1, -1) for part in (query, key, value)), 0.2).mean(dim=0)
    exact = torch.nn.functional.scaled_dot_product_attention(query, key, value)[0]
    assert torch.allclose(mean, exact, atol=0.08)
