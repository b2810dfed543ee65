"""Cross-entropy over a vocabulary, strip by strip, against torch's."""

import pytest
import torch
from torch.nn import functional as F

from bmfm_pipeline.objectives import many_classes
from bmfm_pipeline.objectives.losses import cross_entropy
from bmfm_pipeline.objectives.many_classes import is_worth_it, summed_cross_entropy


@pytest.mark.parametrize("strip", [1 << 20, 5000, 1])
def test_value_and_gradient_are_those_of_torch(strip, monkeypatch):
    monkeypatch.setattr(many_classes, "_STRIP", strip)
    scores = (5 * torch.randn(9, 2000)).requires_grad_()
    targets = torch.randint(0, 2000, (9,))
    targets[[2, 5]] = -100
    got, wanted = summed_cross_entropy(scores, targets), F.cross_entropy(scores, targets, reduction="sum")
    assert torch.allclose(got, wanted, rtol=1e-6)
    pull, other = (torch.autograd.grad(0.3 * one, scores)[0] for one in (got, wanted))
    assert torch.allclose(pull, other, atol=1e-6) and not pull[2].any()


def test_no_target_gives_zero_and_nan_is_not_hidden():
    scores = torch.randn(3, 1500, requires_grad=True)
    nothing = summed_cross_entropy(scores, torch.full((3,), -100))
    nothing.backward()
    assert nothing.item() == 0 and not scores.grad.any()
    empty = summed_cross_entropy(torch.empty(0, 1500, requires_grad=True), torch.empty(0, dtype=torch.int64))
    empty.backward()
    assert empty.item() == 0
    assert torch.isnan(summed_cross_entropy(torch.full((1, 1500), torch.nan), torch.tensor([4])))


def test_the_loss_uses_it_where_it_serves():
    scores, targets = torch.randn(6, 3000), torch.randint(0, 3000, (6,))
    assert is_worth_it(scores) and not is_worth_it(scores[:, :100]) and not is_worth_it(scores.double())
    for options in ({}, {"label_smoothing": 0.1}, {"weights": torch.rand(3000)}):
        total, count = cross_entropy(scores, targets, **options)
        weight = options.get("weights")
        expected = F.cross_entropy(
            scores, targets, weight=weight, reduction="sum", label_smoothing=options.get("label_smoothing", 0.0)
        )
        assert torch.allclose(total, expected, rtol=1e-5)
        assert torch.allclose(count, torch.tensor(6.0) if weight is None else weight[targets].sum())
