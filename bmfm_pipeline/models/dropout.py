"""Dropout on a processor: attention that never keeps its weights, and random numbers at a tenth of the usual cost.

torch draws one number per element in sequence and, with dropout, forms the attention weights of the whole batch. Here 16 bits per
element are drawn by a hash of its number, so rates are rounded to 1/65,536. Everything follows from torch's generator.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_SCORES = 1 << 20  # attention weights held at a time, so that they stay in the processor's cache


def in_host_memory(states: Tensor) -> bool:
    """Whether these functions serve `states`: float32 in host memory."""
    return states.device.type == "cpu" and states.dtype == torch.float32


def draw_seed() -> int:
    """A number from torch's generator that a stream of others starts from."""
    return int(torch.randint(2**62, (1,), device="cpu"))


def _keep(stream: np.random.SFC64, shape: Sequence[int], rate: float, out: Tensor | None = None) -> Tensor:
    """float32 of `shape`: 1 with probability 1 - rate, else 0. `out` must be contiguous."""
    from bmfm_pipeline.models.dropout_kernel import fill_kept

    bits = int(stream.random_raw())
    out = torch.empty(shape) if out is None else out
    fill_kept(out.view(-1).numpy(), np.uint32(bits & 0xFFFFFFFF), np.uint32(bits >> 32), np.uint32(round(rate * 65536)))
    return out


class Dropout(nn.Dropout):
    """nn.Dropout, drawn as above where that is possible."""

    def forward(self, states: Tensor) -> Tensor:
        if not self.training or not 0 < self.p < 1 or torch.compiler.is_compiling() or not in_host_memory(states):
            return super().forward(states)
        kept = _keep(np.random.SFC64(draw_seed()), states.shape, self.p)
        return states * kept.mul_(1 / (1 - self.p))


@torch.compiler.disable
def attend_with_dropout(
    query: Tensor, key: Tensor, value: Tensor, rate: float, seed: int | None = None, rows: Sequence[int] | None = None
) -> Tensor:
    """dropout(softmax(q k / sqrt(d))) v for float32 in host memory: (cells, heads, L, d) thrice -> (cells, heads, L, d).

    A cell's weights are formed, used and forgotten, and formed again in the backward pass: memory does not grow with the batch. What is
    dropped follows from the seed and the cell's number in `rows`, not from its neighbours. By default a seed is drawn, and cells are
    numbered as they stand.
    """
    seed = draw_seed() if seed is None else seed
    rows = range(len(query)) if rows is None else rows
    return _AttentionWithDropout.apply(query, key, value, rate, seed, tuple(rows))


class _AttentionWithDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, rate: float, seed: int, rows: tuple[int, ...]):
        ctx.save_for_backward(query, key, value)
        ctx.rate, ctx.seed, ctx.rows = rate, seed, rows
        mixed = _like(query)
        for part, weights, kept in _weights(query, key, rate, seed, rows):
            mixed[part] = weights.mul_(kept) @ value[part]
        return mixed.mul_(1 / (1 - rate))

    @staticmethod
    @once_differentiable
    def backward(ctx, pull: Tensor):
        query, key, value = ctx.saved_tensors
        scale = query.shape[-1] ** -0.5
        pulls = _like(query), _like(key), _like(value)
        pull = pull * (1 / (1 - ctx.rate))
        dropped = None
        for part, weights, kept in _weights(query, key, ctx.rate, ctx.seed, ctx.rows):
            dropped = torch.mul(
                weights, kept, out=dropped if dropped is not None and dropped.shape == kept.shape else None
            )
            pulls[2][part] = dropped.transpose(-1, -2) @ pull[part]
            through = torch.bmm(pull[part], value[part].transpose(-1, -2), out=dropped).mul_(kept)
            inner = torch._softmax_backward_data(through, weights, -1, torch.float32).mul_(scale)
            pulls[0][part] = inner @ key[part]
            pulls[1][part] = inner.transpose(-1, -2) @ query[part]
        return *pulls, None, None, None


def _like(states: Tensor) -> Tensor:
    """Room for a result, laid out as the heads of one position side by side."""
    cells, heads, length, width = states.shape
    return states.new_empty(cells, length, heads, width).transpose(1, 2)


def _weights(
    query: Tensor, key: Tensor, rate: float, seed: int, rows: Sequence[int]
) -> Iterator[tuple[tuple[int, slice], Tensor, Tensor]]:
    """For some heads of a cell at a time: which, their weights (heads, L, L), and what is kept of them. Both are overwritten by the next."""
    heads, length, width = query.shape[1:]
    step = min(heads, max(1, _SCORES // length**2))
    room, kept_room = torch.empty(2, step, length, length)
    for cell, row in enumerate(rows):
        stream = np.random.SFC64([seed, row])
        for first in range(0, heads, step):
            some = slice(first, min(first + step, heads))
            weights, kept = (part[: some.stop - first] for part in (room, kept_room))
            torch.baddbmm(
                weights, query[cell, some], key[cell, some].transpose(-1, -2), beta=0, alpha=width**-0.5, out=weights
            )
            torch.softmax(weights, dim=-1, out=weights)
            yield (cell, some), weights, _keep(stream, weights.shape, rate, kept)
