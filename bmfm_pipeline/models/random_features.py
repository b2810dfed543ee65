"""Attention through random features: softmax(q k) as an average over products of features of q and of k, linear in the length.

Choromanski et al. 2021, Rethinking Attention with Performers (FAVOR+).
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import elu, relu

from bmfm_pipeline.models.attention import join_heads
from bmfm_pipeline.models.bert_encoder import Projections
from bmfm_pipeline.models.configuration import SCPerformerConfig
from bmfm_pipeline.models.packing import Packing

_SMALLEST = 1e-30


def draw_features(count: int, width: int, algorithm: str, fixed_norms: bool, generator: torch.Generator) -> Tensor:
    """`count` random directions, (count, width), float32.

    `gaussian` draws each on its own. `qr` draws blocks of `width` directions that are at right angles, which lowers the variance.
    `fixed_norms` gives each the norm sqrt(width), otherwise norms are those of Gaussian vectors.
    """
    gaussian = torch.randn(count, width, generator=generator, device="cpu", dtype=torch.float64)
    directions = gaussian
    if algorithm == "qr":
        blocks = []
        for start in range(0, count, width):
            square = torch.randn(width, width, generator=generator, device="cpu", dtype=torch.float64)
            orthogonal, upper = torch.linalg.qr(square)
            # Signs of the diagonal make the distribution uniform over rotations.
            blocks.append((orthogonal * torch.sign(torch.diagonal(upper))).T[: count - start])
        directions = torch.cat(blocks)
    norms = gaussian.norm(dim=1, keepdim=True)
    if fixed_norms:
        norms = torch.full_like(norms, width**0.5)
    return (directions / directions.norm(dim=1, keepdim=True) * norms).to(torch.float32)


class RandomFeatureAttention(Projections):
    """Self-attention over random features; `projection_matrix` (features, d), shared by the heads, is part of the weights."""

    def __init__(self, config: SCPerformerConfig):
        super().__init__(config)
        width = config.hidden_size // config.num_attention_heads
        self.kernel, self.epsilon = config.kernel_type, config.kernel_epsilon
        self.scale = width**-0.25 if config.normalize_output else 1.0
        self.legacy = config.legacy_attention
        self.out = nn.Linear(config.hidden_size, config.hidden_size)
        self.register_buffer("projection_matrix", torch.empty(config.features, width))
        self.config, self.layer = config, 0

    def draw(self, number: int) -> Tensor:
        """The features of the n-th draw, (features, d): they follow from config.feature_seed, the layer and n alone."""
        config = self.config
        seed = np.random.SeedSequence([config.feature_seed, self.layer, number]).generate_state(1, np.uint64)[0]
        return draw_features(
            *self.projection_matrix.shape,
            config.feature_generation_algorithm,
            config.regularize_feature_norms,
            torch.Generator().manual_seed(int(seed >> np.uint64(1))),
        )

    def forward(self, hidden: Tensor, valid: Tensor | Packing | None) -> tuple[Tensor, None]:
        """(B, L, H) states and (B, L), True where a position is not padding -> (B, L, H), None. With a Packing: (1, T, H), likewise."""
        query, key, value = self.project(hidden)
        # Exponentials and sums over all positions do not survive half precision.
        with torch.autocast(hidden.device.type, enabled=False):
            parts = query.float(), key.float(), value.float()
            if isinstance(valid, Packing):
                mixed = self._mix_in_stream(valid, *parts)
            else:
                mix = self._legacy_mix if self.legacy else self._mix
                mixed = mix(*parts, None if valid is None else valid[:, None, :, None])
        return self.out(self.dropout(join_heads(mixed.to(value.dtype)))), None

    @torch.compiler.disable
    def _mix_in_stream(self, packing: Packing, *parts: Tensor) -> Tensor:
        if parts[0].device.type == "cpu":
            return packing.by_group(lambda _, *cells: self._mix(*cells, None), *parts)
        return packing.in_cells(lambda *cells: self._mix(*cells, packing.valid[:, None, :, None]), *parts)

    def _mix(self, query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None) -> Tensor:
        queries = self._features(query * self.scale, (-1,), None)
        keys = self._features(key * self.scale, (-2, -1), keep)
        if keep is not None:
            keys = keys * keep
        return _weigh(queries, keys, value)

    def _features(self, states: Tensor, shared: tuple[int, ...], keep: Tensor | None) -> Tensor:
        """(B, heads, L, d) -> (B, heads, L, features), none below zero.

        The largest exponent over the axes `shared` (padding apart) is taken off first: a query has its own, the keys of a cell have one.
        The same factor stands above and below the fraction, so it changes nothing but the range of the numbers.
        """
        projected = states @ self.projection_matrix.float().T
        if self.kernel in ("relu", "elu"):
            return (relu(projected) if self.kernel == "relu" else elu(projected) + 1) + self.epsilon
        if self.kernel == "cosh":
            projected = torch.cat([projected, -projected], dim=-1)
        exponent = projected - states.square().sum(dim=-1, keepdim=True) / 2
        if keep is not None:
            exponent = exponent.masked_fill(~keep, torch.finfo(exponent.dtype).min)
        largest = exponent.detach().amax(dim=shared, keepdim=True)
        return (torch.exp(exponent - largest) + self.epsilon) / len(self.projection_matrix) ** 0.5

    def _legacy_mix(self, query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None) -> Tensor:
        """As published weights were trained: padding counts in the normaliser, and one largest norm is taken off for the whole batch."""
        queries, keys = self._legacy_features(query, False), self._legacy_features(key, True)
        return _weigh(queries, keys, value if keep is None else value * keep)

    def _legacy_features(self, states: Tensor, whole_batch: bool) -> Tensor:
        projected = states * self.scale @ self.projection_matrix.float().T
        if self.kernel in ("relu", "elu"):
            return (relu(projected) if self.kernel == "relu" else elu(projected) + 1) + self.epsilon
        half_norm = -states.square().sum(dim=-1, keepdim=True) / 2
        projected = projected - (half_norm.max() if whole_batch else half_norm)
        raised = torch.exp(half_norm + projected)
        if self.kernel == "cosh":
            raised = torch.cat([raised, torch.exp(half_norm - projected)], dim=-1)
        return (raised + self.epsilon) / len(self.projection_matrix) ** 0.5


def _weigh(queries: Tensor, keys: Tensor, value: Tensor) -> Tensor:
    """Average of the values, weighted by the products of features: (B, heads, L, m) twice and (B, heads, L, d) -> (B, heads, L, d)"""
    total = queries @ keys.sum(dim=2).unsqueeze(-1)
    return queries @ (keys.transpose(-1, -2) @ value) / total.clamp(min=_SMALLEST)
