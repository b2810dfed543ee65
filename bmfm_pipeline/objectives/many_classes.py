"""Cross-entropy over a vocabulary on a processor: the scores are read in strips that stay in its cache."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bmfm_pipeline.config.losses import IGNORED_LABEL

_STRIP = 1 << 20  # scores looked at together
_MANY = 1024


def is_worth_it(scores: Tensor) -> bool:
    """Whether `summed_cross_entropy` is the faster one for (N, C) scores."""
    on_processor = scores.device.type == "cpu" and scores.dtype == torch.float32
    return on_processor and scores.shape[-1] >= _MANY and not torch.compiler.is_compiling()


def summed_cross_entropy(scores: Tensor, targets: Tensor) -> Tensor:
    """As torch's cross_entropy with reduction="sum" and ignored targets of -100: (N, C) float32 scores, (N,) class ids.

    Neither the log-probabilities nor zeros to scatter into are kept: beside the scores there is their gradient and nothing else.
    """
    return _CrossEntropy.apply(scores, targets)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores: Tensor, targets: Tensor) -> Tensor:
        normaliser = scores.new_empty(len(scores))
        for rows in _strips(scores):
            torch.logsumexp(scores[rows], dim=-1, out=normaliser[rows])
        counted = targets != IGNORED_LABEL
        known = targets.clamp(min=0).unsqueeze(-1)
        ctx.save_for_backward(scores, normaliser, counted, known)
        terms = normaliser - scores.gather(-1, known).squeeze(-1)
        return torch.where(counted, terms, torch.zeros_like(terms)).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, pull: Tensor):
        scores, normaliser, counted, known = ctx.saved_tensors
        share = torch.where(counted, pull, torch.zeros_like(pull)).unsqueeze(-1)
        gradient = torch.empty_like(scores)
        for rows in _strips(scores):
            torch.sub(scores[rows], normaliser[rows, None], out=gradient[rows])
            gradient[rows].exp_().mul_(share[rows])
        return gradient.scatter_add_(-1, known, -share), None


def _strips(scores: Tensor) -> Iterator[slice]:
    step = max(1, _STRIP // scores.shape[-1])
    for first in range(0, len(scores), step):
        yield slice(first, first + step)
