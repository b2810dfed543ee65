"""Who sees whom, and the attention that follows from it: fused, classic, or flex on a GPU."""

import functools
import logging
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import pad, scaled_dot_product_attention

from bmfm_pipeline.errors import ConfigError

log = logging.getLogger(__name__)

_BLOCK = 32  # the fewest queries that read their surroundings together


@dataclass(frozen=True)
class Surroundings:
    """Attention in a window, computed block by block: a block of queries reads itself and `window` positions on both sides.

    allowed : (rows * blocks, 1, block, block + 2 * window), True where a key may be seen; rows is 1 when it is the same for all cells.
    """

    window: int
    block: int
    allowed: Tensor


Visibility = Tensor | BlockMask | Surroundings | None


def key_mask(attention_mask: Tensor | None) -> Tensor | None:
    """(B, L), True where a position is not padding, from a 0/1 mask (B, L) or (B, L, L).

    In the latter every position sees itself unless it is padding, so its diagonal is the answer.
    """
    if attention_mask is None:
        return None
    if attention_mask.dim() == 3:
        return torch.diagonal(attention_mask, dim1=1, dim2=2).to(torch.bool)
    return attention_mask.to(torch.bool)


def attention_allowed(attention_mask: Tensor | None) -> Tensor | None:
    """Boolean mask (B, 1, 1, L) or (B, 1, L, L), True where a key may be seen, from a 0/1 mask (B, L) or (B, L, L).

    In the latter padding sees itself: a query that sees nothing has no attention weights, and no result on some devices.
    """
    if attention_mask is None:
        return None
    if attention_mask.dim() == 2:
        return attention_mask.to(torch.bool)[:, None, None, :]
    if attention_mask.dim() == 3:
        allowed = attention_mask.to(torch.bool)[:, None]
        return allowed | torch.eye(allowed.shape[-1], dtype=torch.bool, device=allowed.device)
    raise ValueError(
        f"attention_mask has shape {tuple(attention_mask.shape)}; expected (batch, length) or (batch, length, length)"
    )


def refuse_pairwise(attention_mask: Tensor | None, model_type: str) -> None:
    """ConfigError for a (B, L, L) mask where the attention matrix is never formed, so that single pairs cannot be hidden."""
    if attention_mask is not None and attention_mask.dim() == 3:
        raise ConfigError(
            f"data_module.prevent_attention_to_masked: {model_type} approximates attention and cannot hide single pairs of positions; "
            "set it to false, or use model=scbert, model=modernbert or model=llama"
        )


def visibility(
    allowed: Tensor | None, hidden: Tensor, how: str | None, dropout: float, window: int | None = None
) -> Visibility:
    """What `attend` takes as `seen` for states `hidden` (B, L, H), computed once for all layers that share it.

    `allowed` is the mask of `attention_allowed`; `window`, when given, hides keys that are further away than this many positions, but
    never a position from itself.
    `dropout` is the rate in force. Flex attention needs a GPU and has no dropout; without these it is computed as `torch`, which
    gives the same numbers, and a warning says so once.
    """
    length, device = hidden.shape[1], hidden.device
    if how == "flex" and can_flex(device.type, dropout):
        return block_mask(allowed, length, device, window) if allowed is not None or window is not None else None
    if window is None or window >= length - 1:
        return allowed
    block = max(_BLOCK, window)
    if how is not None and (allowed is None or allowed.shape[2] == 1) and 2 * (block + 2 * window) <= length:
        return surroundings(allowed, length, device, window, block)
    near = within(window, length, device)
    return near if allowed is None else allowed & near | within(0, length, device)


def within(window: int, length: int, device: torch.device) -> Tensor:
    """(L, L), True where two positions are at most `window` apart."""
    places = torch.arange(length, device=device)
    return (places[:, None] - places[None, :]).abs() <= window


@functools.cache
def can_flex(device: str, dropout: float) -> bool:
    """Whether flex attention can be used here; the first refusal of each kind is logged."""
    if device != "cuda":
        log.warning("model.attention is flex, which needs a GPU: computed as torch, which gives the same numbers")
        return False
    if dropout:
        log.warning(
            "model.attention is flex, which has no dropout: training with model.attention_probs_dropout_prob %g is computed as torch; "
            "set it to 0 to train with flex",
            dropout,
        )
        return False
    return True


def surroundings(allowed: Tensor | None, length: int, device: torch.device, window: int, block: int) -> Surroundings:
    """The window in blocks, for keys that are `allowed` (B, 1, 1, L) or all."""
    blocks, reach = -(-length // block), block + 2 * window
    offset = torch.arange(reach, device=device) - window - torch.arange(block, device=device)[:, None]
    keys = torch.ones(1, length, dtype=torch.bool, device=device) if allowed is None else allowed[:, 0, 0]
    keys = pad(keys, (window, window + blocks * block - length)).unfold(1, reach, block)
    seen = keys[:, :, None, :] & (offset.abs() <= window) | (offset == 0)
    return Surroundings(window, block, seen.flatten(0, 1).unsqueeze(1))


def _attend_around(query: Tensor, key: Tensor, value: Tensor, seen: Surroundings, dropout: float) -> Tensor:
    batch, heads, length, width = query.shape
    blocks, reach = -(-length // seen.block), seen.block + 2 * seen.window
    tail = blocks * seen.block - length

    def cut(states: Tensor, around: int, size: int) -> Tensor:
        """(B, heads, L, d) -> (B * blocks, heads, size, d)"""
        parts = pad(states, (0, 0, around, around + tail)).unfold(2, size, seen.block)
        return parts.permute(0, 2, 1, 4, 3).reshape(batch * blocks, heads, size, width)

    allowed = seen.allowed if len(seen.allowed) == batch * blocks else seen.allowed.repeat(batch, 1, 1, 1)
    keys, values = (cut(states, seen.window, reach) for states in (key, value))
    mixed = scaled_dot_product_attention(cut(query, 0, seen.block), keys, values, attn_mask=allowed, dropout_p=dropout)
    mixed = mixed.view(batch, blocks, heads, seen.block, width).transpose(1, 2)
    return mixed.reshape(batch, heads, -1, width)[:, :, :length]


def block_mask(allowed: Tensor | None, length: int, device: torch.device, window: int | None) -> BlockMask:
    """The same visibility in the form that flex attention skips whole blocks by."""
    batch = None if allowed is None else allowed.shape[0]
    per_query = allowed is not None and allowed.shape[2] > 1

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        inside = (query - key).abs() <= (length if window is None else window)
        if allowed is None:
            return inside
        inside = inside & (allowed[row, 0, query, key] if per_query else allowed[row, 0, 0, key])
        return inside if window is None else inside | (query == key)

    return create_block_mask(visible, batch, None, length, length, device=device)


@functools.cache
def _compiled_flex():
    return torch.compile(flex_attention)


def attend(
    query: Tensor, key: Tensor, value: Tensor, seen: Visibility, dropout: float, how: str | None
) -> tuple[Tensor, Tensor | None]:
    """softmax(q k / sqrt(d)) v over the keys that are seen, with dropout on the weights.

    query, key, value : (B, heads, L, d); seen : from `visibility`, a boolean mask that broadcasts to (B, heads, L, L) included.
    Returns (B, heads, L, d) and, for the classic way (`how` None), the weights (B, heads, L, L). A query that sees no key stays finite.
    """
    if isinstance(seen, BlockMask):
        run = _compiled_flex() if query.is_cuda else flex_attention
        return run(query, key, value, block_mask=seen), None
    if isinstance(seen, Surroundings):
        return _attend_around(query, key, value, seen, dropout), None
    if how is not None:
        return scaled_dot_product_attention(query, key, value, attn_mask=seen, dropout_p=dropout), None
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    if seen is not None:
        scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, dim=-1)
    return torch.dropout(weights, dropout, dropout > 0).to(value.dtype) @ value, weights


def split_heads(states: Tensor, heads: int) -> Tensor:
    """(B, L, H) -> (B, heads, L, H / heads)"""
    batch, length, size = states.shape
    return states.view(batch, length, heads, size // heads).transpose(1, 2)


def join_heads(states: Tensor) -> Tensor:
    """(B, heads, L, d) -> (B, L, heads * d)"""
    return states.transpose(1, 2).flatten(2)
