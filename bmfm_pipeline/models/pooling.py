"""From the states of all positions to one vector per cell."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bmfm_pipeline.errors import ConfigError
from bmfm_pipeline.models.attention import key_mask

POOLING_METHODS = ("first_token", "pooling_layer", "mean_pooling")


def masked_mean(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the positions where `mask` (B, L) is 1, in float32. (B, L, H) -> (B, H). A cell without any gets zeros."""
    if mask is None:
        return hidden.mean(dim=1)
    weights = mask.to(torch.float32).unsqueeze(-1)
    total = (hidden.float() * weights).sum(dim=1)
    return (total / weights.sum(dim=1).clamp(min=1.0)).to(hidden.dtype)


def masked_max(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """Maximum over the positions where `mask` (B, L) is 1. (B, L, H) -> (B, H). A cell without any gets zeros."""
    if mask is None:
        return hidden.amax(dim=1)
    there = mask.bool().unsqueeze(-1)
    largest = hidden.masked_fill(~there, float("-inf")).amax(dim=1)
    return largest.masked_fill(~there.any(dim=1), 0.0)


class Pooler(nn.Module):
    """Position 0, or the mean or the maximum over unpadded positions, through Linear(H, H) and tanh."""

    def __init__(self, hidden_size: int, how: str = "cls"):
        super().__init__()
        self.how = how
        self.dense = nn.Linear(hidden_size, hidden_size)

    def pick(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """(B, L, H) and a mask (B, L) of what is not padding -> (B, H), before the Linear"""
        if self.how == "cls":
            return hidden[:, 0]
        return masked_mean(hidden, mask) if self.how == "mean" else masked_max(hidden, mask)

    def forward(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """(B, L, H) and a mask (B, L) of what is not padding -> (B, H)"""
        return torch.tanh(self.dense(self.pick(hidden, mask)))


def pool(output: Any, attention_mask: Tensor | None, method: str | int | Sequence[str | int] = "first_token") -> Tensor:
    """One embedding per cell, (B, H), from a model output.

    `first_token` is the last state at position 0; `pooling_layer` the pooler's output; `mean_pooling` the mean over unpadded
    positions after the first (the closing [SEP] included); an integer the last state at that position of the cell, counted from its own
    end when negative, and nan for cells that have no such position; a list of these is concatenated to (B, n * H). Raises ConfigError for
    any other method.
    """
    if isinstance(method, (list, tuple)):
        if not method:
            raise ConfigError("pooling_method is an empty list; name at least one method")
        return torch.cat([pool(output, attention_mask, one) for one in method], dim=-1)
    hidden = output.last_hidden_state
    if method == "first_token":
        return hidden[:, 0]
    if method == "pooling_layer":
        return output.embeddings
    if method == "mean_pooling":
        mask = key_mask(attention_mask)
        return masked_mean(hidden[:, 1:], None if mask is None else mask[:, 1:])
    if isinstance(method, int) and not isinstance(method, bool):
        return _at(hidden, key_mask(attention_mask), method)
    raise ConfigError(
        f"pooling_method {method!r}: there are {', '.join(POOLING_METHODS)}, a position (integer), or a list of these"
    )


def _at(hidden: Tensor, mask: Tensor | None, position: int) -> Tensor:
    """(B, H) states at one position of each cell, whatever the length of the batch; nan where a cell is shorter."""
    batch, length = hidden.shape[:2]
    sizes = torch.full((batch,), length, device=hidden.device) if mask is None else mask.sum(dim=1)
    places = torch.full_like(sizes, position) if position >= 0 else sizes + position
    there = (places >= 0) & (places < sizes)
    states = hidden[torch.arange(batch, device=hidden.device), places.clamp(0, length - 1)]
    return states.masked_fill(~there.unsqueeze(1), float("nan"))
