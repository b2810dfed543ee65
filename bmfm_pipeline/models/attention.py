"""Who sees whom, and the attention that follows from it: fused, classic, or flex on a GPU."""

import functools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import pad, scaled_dot_product_attention

from bmfm_pipeline.errors import ConfigError
from bmfm_pipeline.models.dropout import attend_with_dropout, draw_seed, in_host_memory
from bmfm_pipeline.models.packing import Packing

log = logging.getLogger(__name__)

_BLOCK = 32  # the fewest queries that read their surroundings together
_FLEX_WIDTH = 16


@dataclass(frozen=True)
class Surroundings:
    """Attention in a window, computed block by block: a block of queries reads itself and `window` positions on both sides.

    allowed : (rows * blocks, 1, block, block + 2 * window), True where a key may be seen; rows is 1 when it is the same for all cells.
    """

    window: int
    block: int
    allowed: Tensor


class PackedCells:
    """Attention within each cell of a stream without padding, to keys at most `window` away where there is one."""

    def __init__(self, packing: Packing, window: int | None):
        self.packing, self.window = packing, window
        self._seen: dict[Any, Visibility] = {}

    def of_length(self, length: int, device: torch.device, how: str | None) -> "Visibility":
        """What is seen in cells of one length, where nothing is padding."""
        if length not in self._seen:
            shape = torch.empty(1, length, 0, device=device)
            self._seen[length] = visibility(None, shape, None if how is None else "torch", 0.0, self.window)
        return self._seen[length]

    def padded(self, device: torch.device, how: str | None, dropout: float) -> "Visibility":
        """What is seen in (B, L), padding included."""
        key = (how, dropout)
        if key not in self._seen:
            allowed = self.packing.valid[:, None, None, :]
            shape = torch.empty(self.packing.batch, self.packing.length, 0, device=device)
            self._seen[key] = visibility(allowed, shape, how, dropout, self.window)
        return self._seen[key]


Visibility = Tensor | BlockMask | Surroundings | PackedCells | None


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


def refuse_pairwise(attention_mask: Tensor | Packing | None, model_type: str) -> None:
    """ConfigError for a (B, L, L) mask where the attention matrix is never formed, so that single pairs cannot be hidden."""
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 3:
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


def seen_by_all(
    attention_mask: Tensor | Packing | None, hidden: Tensor, how: str | None, dropout: float, window: int | None = None
) -> Visibility:
    """`visibility` for the 0/1 mask of a batch, or PackedCells for a packing."""
    if isinstance(attention_mask, Packing):
        return PackedCells(attention_mask, window)
    return visibility(attention_allowed(attention_mask), hidden, how, dropout, window)


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


def _attend_flex(query: Tensor, key: Tensor, value: Tensor, seen: BlockMask) -> Tensor:
    """Its kernel wants heads of at least 16: narrower ones are filled up with zeros, which changes no product."""
    run = _compiled_flex() if query.is_cuda else flex_attention
    width = query.shape[-1]
    if width < _FLEX_WIDTH:
        query, key, value = (pad(part, (0, _FLEX_WIDTH - width)) for part in (query, key, value))
    return run(query, key, value, block_mask=seen, scale=width**-0.5)[..., :width]


def attend(
    query: Tensor, key: Tensor, value: Tensor, seen: Visibility, dropout: float, how: str | None
) -> tuple[Tensor, Tensor | None]:
    """softmax(q k / sqrt(d)) v over the keys that are seen, with dropout on the weights.

    query, key, value : (B, heads, L, d); seen : from `visibility`, a boolean mask that broadcasts to (B, heads, L, L) included, or
    PackedCells for a stream (1, heads, T, d).
    Returns (B, heads, L, d) and, for the classic way (`how` None), the weights (B, heads, L, L). A query that sees no key stays finite.
    """
    if isinstance(seen, PackedCells):
        return _attend_in_stream(query, key, value, seen, dropout, how), None
    if isinstance(seen, BlockMask):
        return _attend_flex(query, key, value, seen), None
    if isinstance(seen, Surroundings):
        return _attend_around(query, key, value, seen, dropout), None
    if how is not None and dropout and seen is None and in_host_memory(query):
        return attend_with_dropout(query, key, value, dropout), None
    if how is not None:
        return scaled_dot_product_attention(query, key, value, attn_mask=seen, dropout_p=dropout), None
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    if seen is not None:
        scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, dim=-1)
    return torch.dropout(weights, dropout, dropout > 0).to(value.dtype) @ value, weights


@torch.compiler.disable
def _attend_in_stream(
    query: Tensor, key: Tensor, value: Tensor, seen: PackedCells, dropout: float, how: str | None
) -> Tensor:
    """On a processor group by group, on a GPU by a kernel for cells of any length, or in the padded batch where that one cannot serve."""
    packing = seen.packing
    if query.device.type != "cpu":
        if how is not None and not dropout and can_vary(query):
            return _attend_varying(query, key, value, packing, seen.window)
        padded = seen.padded(query.device, how, dropout)
        return packing.in_cells(lambda *parts: attend(*parts, padded, dropout, how)[0], query, key, value)
    seed = draw_seed() if dropout else 0

    def within_cells(rows: list[int], *parts: Tensor) -> Tensor:
        around = seen.of_length(parts[0].shape[2], query.device, how)
        if how is not None and dropout and around is None and in_host_memory(query):
            return attend_with_dropout(*parts, dropout, seed, rows)
        return attend(*parts, around, dropout, how)[0]

    return packing.by_group(within_cells, query, key, value)


def attend_first(
    query: Tensor, key: Tensor, value: Tensor, seen: Visibility, how: str | None
) -> tuple[Tensor, Tensor | None]:
    """`attend` without dropout for the first position of every cell only.

    query : (B, heads, 1, d); key, value : (B, heads, L, d), or (1, heads, T, d) with PackedCells, and the query then has the cells in
    the order of the stream. Returns as many positions as the query has, and the weights of the classic way.
    """
    if not isinstance(seen, PackedCells):
        return attend(query, key, value, seen, 0.0, how)
    mixed, cells = [], 0
    sizes = [length * len(rows) for length, _, rows in seen.packing.groups]
    streams = [part[0].transpose(0, 1).split(sizes) for part in (key, value)]
    for (length, _, rows), *pieces in zip(seen.packing.groups, *streams, strict=True):
        keys, values = (piece.unflatten(0, (len(rows), length)).transpose(1, 2) for piece in pieces)
        mixed.append(attend(query[cells : cells + len(rows)], keys, values, None, 0.0, how)[0])
        cells += len(rows)
    return mixed[0] if len(mixed) == 1 else torch.cat(mixed), None


def can_attend_first(hidden: Tensor, seen: Visibility) -> bool:
    """Whether `attend_first` serves: in host memory, where the keys that are seen do not depend on the query."""
    if hidden.device.type != "cpu":
        return False
    if isinstance(seen, PackedCells):
        return seen.window is None
    return seen is None or (isinstance(seen, Tensor) and seen.shape[2] == 1)


def can_vary(states: Tensor) -> bool:
    """Whether the kernel for cells of varying length serves `states` (1, heads, T, d): half precision, on a GPU that has it."""
    if states.dtype not in (torch.float16, torch.bfloat16) or states.shape[-1] % 8 or states.shape[-1] > 256:
        return False
    return states.is_cuda and torch.cuda.get_device_capability(states.device) >= (8, 0) and _varlen() is not None


@functools.cache
def _varlen() -> Callable[..., Tensor] | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


def _attend_varying(query: Tensor, key: Tensor, value: Tensor, packing: Packing, window: int | None) -> Tensor:
    streams = [part[0].transpose(0, 1) for part in (query, key, value)]
    reach = (-1, -1) if window is None else (window, window)
    longest = max(packing.lengths)
    mixed = _varlen()(*streams, packing.offsets, packing.offsets, longest, longest, window_size=reach)
    return mixed.transpose(0, 1).unsqueeze(0)


def split_heads(states: Tensor, heads: int) -> Tensor:
    """(B, L, H) -> (B, heads, L, H / heads)"""
    batch, length, size = states.shape
    return states.view(batch, length, heads, size // heads).transpose(1, 2)


def join_heads(states: Tensor) -> Tensor:
    """(B, heads, L, d) -> (B, L, heads * d)"""
    return states.transpose(1, 2).flatten(2)
