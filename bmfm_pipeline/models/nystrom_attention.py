"""Nystrom attention: averages of queries and keys (landmarks) stand for all of them, at a cost that grows with the length.

Xiong et al. 2021, Nystromformer: softmax(Q K^T) is approximated by softmax(Q k^T) pinv(softmax(q k^T)) softmax(q K^T), where q and k
are the landmarks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention

from bmfm_pipeline.errors import ConfigError
from bmfm_pipeline.models.attention import join_heads
from bmfm_pipeline.models.bert_encoder import Projections
from bmfm_pipeline.models.configuration import SCNystromformerConfig
from bmfm_pipeline.models.packing import Packing

_BLOCK = 32  # positions that the convolution computes at once


@dataclass
class Landmarks:
    """Which cells are approximated and how their landmarks are made; computed once for all layers.

    valid : (B, L), True where a position is not padding, or None. exact, rows : indices of the cells with full and with approximated
    attention. weights : (len(rows), landmarks, L), the share of every position in every landmark.
    """

    valid: Tensor | None
    exact: Tensor
    rows: Tensor
    weights: Tensor


def place_landmarks(hidden: Tensor, valid: Tensor | None, config: SCNystromformerConfig) -> Landmarks:
    """The positions of each cell that are not padding, cut into `num_landmarks` segments of as equal a size as possible.

    `hidden` is (B, L, H), `valid` (B, L). A cell with no more positions than landmarks is attended to in full. Segments follow from the
    cell alone, so neither the length of the batch nor the other cells in it change a result.
    """
    (batch, length), count, device = hidden.shape[:2], config.num_landmarks, hidden.device
    if config.legacy_attention and length % count:
        raise ConfigError(
            f"model.legacy_attention: the batch is {length} tokens long, which is not a multiple of model.num_landmarks {count}; set it "
            "to false, or pad to a multiple (data_module.padding=max_length)"
        )
    everything = valid is None or config.legacy_attention
    inside = torch.ones(batch, length, dtype=torch.bool, device=device) if everything else valid
    sizes = inside.sum(dim=1)
    exact, rows = torch.nonzero(sizes <= count).flatten(), torch.nonzero(sizes > count).flatten()
    inside, sizes = inside[rows], sizes[rows]
    segment = torch.div((inside.cumsum(dim=1) - 1) * count, sizes[:, None], rounding_mode="floor")
    member = (segment[:, None, :] == torch.arange(count, device=device)[:, None]) & inside[:, None, :]
    return Landmarks(valid, exact, rows, member / member.sum(dim=2, keepdim=True))


class PackedLandmarks:
    """The landmarks of the cells of a stream without padding."""

    def __init__(self, packing: Packing, config: SCNystromformerConfig):
        self.packing, self.config = packing, config
        self._made: dict[tuple[int, int], Landmarks] = {}

    def of_group(self, states: Tensor) -> Landmarks:
        """For (cells, heads, L, d) of which nothing is padding."""
        cells, _, length, _ = states.shape
        if (cells, length) not in self._made:
            shape = torch.empty(cells, length, 0, device=states.device)
            self._made[cells, length] = place_landmarks(shape, None, self.config)
        return self._made[cells, length]

    def padded(self, states: Tensor) -> Landmarks:
        """For the padded (B, heads, L, d)."""
        if (0, 0) not in self._made:
            shape = torch.empty(self.packing.batch, self.packing.length, 0, device=states.device)
            self._made[0, 0] = place_landmarks(shape, self.packing.valid, self.config)
        return self._made[0, 0]


def pseudo_inverse(matrix: Tensor, method: str, iterations: int, shared_start: bool = False) -> Tensor:
    """Moore-Penrose inverse of (..., m, m) matrices whose rows add up to 1, by an iteration of matrix products.

    `original` (Razavi et al. 2014), `newton` (Newton-Schulz) or `chebyshev`. Every matrix starts from a scale of its own, so that the
    result for one cell does not depend on others; with `shared_start` from the largest in the batch.
    """

    def scale(columns: Tensor) -> Tensor:
        return columns.max() if shared_start else columns.amax(dim=-1)[..., None, None]

    transposed = matrix.transpose(-1, -2)
    one = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    if method == "original":
        inverse = transposed / scale(matrix.sum(dim=-2))
        for _ in range(iterations):
            product = matrix @ inverse
            inverse = 0.25 * inverse @ (13 * one - product @ (15 * one - product @ (7 * one - product)))
        return inverse
    # The largest column sum of A^T A is no less than its largest eigenvalue.
    inverse = 2 * transposed / scale((transposed @ matrix).sum(dim=-2))
    for _ in range(iterations):
        product = matrix @ inverse
        if method == "newton":
            inverse = inverse @ (2 * one - product)
        else:
            inverse = inverse @ (3 * one - product @ (3 * one - product))
    return inverse


def slide(values: Tensor, weights: Tensor) -> Tensor:
    """The convolution of (B, heads, L, d) along L with one filter per head, (heads, odd width), zeros outside.

    Blocks of positions with their surroundings are multiplied by a banded matrix, which processors do several times faster than a
    convolution of so few channels.
    """
    length, width = values.shape[2], weights.shape[-1]
    blocks, reach = -(-length // _BLOCK), _BLOCK + width - 1
    padded = pad(values, (0, 0, width // 2, width // 2 + blocks * _BLOCK - length))
    offset = torch.arange(reach, device=values.device)[:, None] - torch.arange(_BLOCK, device=values.device)
    inside = (offset >= 0) & (offset < width)
    band = torch.where(inside, weights[:, offset.clamp(0, width - 1)], 0)
    slid = padded.unfold(2, reach, _BLOCK) @ band[:, None].to(values.dtype)
    return slid.transpose(-1, -2).flatten(2, 3)[:, :, :length]


class NystromAttention(Projections):
    """Self-attention through landmarks, plus a depthwise convolution over the values; padding takes part in neither.

    Dropout is on the weights by which landmarks read the keys.
    """

    def __init__(self, config: SCNystromformerConfig):
        super().__init__(config)
        self.method, self.iterations, self.legacy = (
            config.inverse_method,
            config.inverse_n_iter,
            config.legacy_attention,
        )
        width = config.conv_kernel_size
        self.conv = nn.Conv2d(
            self.heads, self.heads, (width, 1), padding=(width // 2, 0), bias=False, groups=self.heads
        )

    def forward(self, hidden: Tensor, marks: Landmarks | PackedLandmarks) -> tuple[Tensor, None]:
        """(B, L, H) states -> (B, L, H), None; (1, T, H) for the landmarks of a stream."""
        parts = self.project(hidden)
        if isinstance(marks, PackedLandmarks):
            return join_heads(self._mix_in_stream(marks, *parts)), None
        return join_heads(self._mix(marks, *parts)), None

    @torch.compiler.disable
    def _mix_in_stream(self, marks: PackedLandmarks, *parts: Tensor) -> Tensor:
        if parts[0].device.type == "cpu":
            return marks.packing.by_group(lambda _, *cells: self._mix(marks.of_group(cells[0]), *cells), *parts)
        return marks.packing.in_cells(lambda *cells: self._mix(marks.padded(cells[0]), *cells), *parts)

    def _mix(self, marks: Landmarks, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(B, heads, L, d) thrice -> (B, heads, L, d)"""
        seen = None if marks.valid is None else marks.valid[:, None, None, :]
        if seen is not None and not self.legacy:
            value = value * marks.valid[:, None, :, None]
        local = slide(value, self.conv.weight.flatten(1))
        if not len(marks.exact):
            mixed = self._approximate(query, key, value, seen, marks.weights)
        elif not len(marks.rows):
            mixed = self._exact(query, key, value, seen)
        else:
            mixed = torch.empty_like(value)
            for rows, more in ((marks.exact, None), (marks.rows, marks.weights)):
                parts = [part[rows] for part in (query, key, value)] + [None if seen is None else seen[rows]]
                mixed[rows] = self._exact(*parts) if more is None else self._approximate(*parts, more)
        return mixed + local

    def _exact(self, query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None) -> Tensor:
        rate = self.dropout.p if self.training else 0.0
        return scaled_dot_product_attention(query, key, value, attn_mask=seen, dropout_p=rate)

    def _approximate(self, query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None, shares: Tensor) -> Tensor:
        """(B, heads, L, d) and the landmarks' shares (B, m, L) -> (B, heads, L, d)"""
        # The iteration loses its way in half precision.
        with torch.autocast(query.device.type, enabled=False):
            scale = query.shape[-1] ** -0.25
            query, key, shares = query.float() * scale, key.float() * scale, shares.unsqueeze(1)
            queries, keys = shares @ query, shares @ key
            to_keys = queries @ key.transpose(-1, -2)
            if seen is not None:
                to_keys = to_keys.masked_fill(~seen, torch.finfo(to_keys.dtype).min)
            read = self.dropout(torch.softmax(to_keys, dim=-1)) @ value.float()
            between = torch.softmax(queries @ keys.transpose(-1, -2), dim=-1)
            between = pseudo_inverse(between, self.method, self.iterations, shared_start=self.legacy)
            mixed = torch.softmax(query @ keys.transpose(-1, -2), dim=-1) @ (between @ read)
        return mixed.to(value.dtype)
