"""SCModernBert: a pre-norm encoder with rotary positions, gated feed-forward and attention that is local in most layers.

Warner et al. 2024 (ModernBERT) over the sum of field embeddings; module names are those of the published weights.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from bmfm_pipeline.models.attention import (
    Visibility,
    attend,
    attention_allowed,
    join_heads,
    seen_by_all,
    split_heads,
    within,
)
from bmfm_pipeline.models.backbone import Backbone
from bmfm_pipeline.models.configuration import SCModernBertConfig
from bmfm_pipeline.models.dropout import Dropout
from bmfm_pipeline.models.multitask import MultitaskModel
from bmfm_pipeline.models.packing import Packing


def rotary_table(length: int, width: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines (L, width) of position times frequency; frequencies fall from 1 to about 1 / theta (Su et al. 2021, RoPE)."""
    rates = theta ** (-torch.arange(0, width, 2, dtype=torch.float32, device=device) / width)
    angles = torch.arange(length, dtype=torch.float32, device=device)[:, None] * rates
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(states: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the pairs (i, i + d/2) of (B, heads, L, d) by the angles of their positions, in float32."""
    cosines, sines = table
    first, second = states.float().chunk(2, dim=-1)
    turned = states.float() * cosines + torch.cat([-second, first], dim=-1) * sines
    return turned.to(states.dtype)


class RotaryAttention(nn.Module):
    def __init__(self, config: SCModernBertConfig):
        super().__init__()
        self.heads, self.how, self.rate = (
            config.num_attention_heads,
            config.attention,
            config.attention_probs_dropout_prob,
        )
        self.Wqkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.attention_bias)
        self.Wo = nn.Linear(config.hidden_size, config.hidden_size, bias=config.attention_bias)
        self.out_drop = Dropout(config.attention_probs_dropout_prob)

    def forward(
        self, hidden: Tensor, seen: Visibility, table: tuple[Tensor, Tensor], blind: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        query, key, value = (split_heads(part, self.heads) for part in self.Wqkv(hidden).chunk(3, dim=-1))
        rate = self.rate if self.training else 0.0
        mixed, weights = attend(rotate(query, table), rotate(key, table), value, seen, rate, self.how)
        if blind is not None:
            mixed = torch.where(blind, value.mean(dim=2, keepdim=True), mixed)
        return self.out_drop(self.Wo(join_heads(mixed))), weights


class GatedFeedForward(nn.Module):
    """Wo(activation(a) * b), where a and b are the halves of Wi x (Shazeer 2020, GLU variants)."""

    def __init__(self, config: SCModernBertConfig):
        super().__init__()
        self.Wi = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=config.mlp_bias)
        self.Wo = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act = ACT2FN[config.hidden_act]
        self.drop = Dropout(config.mlp_dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        content, gate = self.Wi(hidden).chunk(2, dim=-1)
        return self.Wo(self.drop(self.act(content) * gate))


class ModernBertLayer(GradientCheckpointingLayer):
    """Norm, attention, residual; norm, feed-forward, residual. The first layer has no norm in front of its attention."""

    def __init__(self, config: SCModernBertConfig, index: int):
        super().__init__()
        self.is_global = index % config.global_attn_every_n_layers == 0
        self.attn_norm = nn.Identity() if index == 0 else _norm(config)
        self.attn = RotaryAttention(config)
        self.mlp_norm = _norm(config)
        self.mlp = GatedFeedForward(config)

    def forward(
        self, hidden: Tensor, seen: Visibility, table: tuple[Tensor, Tensor], blind: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """(B, L, H) states -> (B, L, H), and the attention weights or None. Positions marked in `blind` (B, 1, L, 1) average all values."""
        attended, weights = self.attn(self.attn_norm(hidden), seen, table, blind)
        hidden = hidden + attended
        return hidden + self.mlp(self.mlp_norm(hidden)), weights


def _norm(config: SCModernBertConfig) -> nn.LayerNorm:
    return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, bias=config.norm_bias)


class SCModernBertBackbone(Backbone):
    """Hidden states are those before the first and after every layer, without the final norm.

    The heads read the normed states, those of whole cells at position 0 or their mean; the pooler's Linear is part of the published
    weights, which do not apply it.
    """

    packs = True
    no_weights = "fused attention does not keep its weights; build the model with attention: null to get attentions"

    def __init__(self, config: SCModernBertConfig):
        super().__init__(config)
        self.pooler.requires_grad_(False)
        self.config = config
        self.can_return_weights = config.attention is None
        self.layers = nn.ModuleList([ModernBertLayer(config, index) for index in range(config.num_hidden_layers)])
        self.final_norm = _norm(config)

    def encode(self, hidden: Tensor, attention_mask: Tensor | Packing | None, keep_states: bool, keep_weights: bool):
        config = self.config
        rate = config.attention_probs_dropout_prob if self.training else 0.0
        window = config.local_attention // 2
        packing = attention_mask if isinstance(attention_mask, Packing) else None
        far = (
            seen_by_all(attention_mask, hidden, config.attention, rate),
            self._table(config.global_rope_theta, hidden, packing),
        )
        if config.legacy_attention and packing is None and attention_mask is not None:
            allowed = attention_allowed(attention_mask)
            seen = allowed & within(window, hidden.shape[1], hidden.device)
            blind = ~seen.any(dim=-1, keepdim=True)
            near = (seen | blind, far[1], blind)
        else:
            theta = config.global_rope_theta if config.legacy_attention else config.local_rope_theta
            seen = seen_by_all(attention_mask, hidden, config.attention, rate, window)
            near = (seen, self._table(theta, hidden, packing))
        states, attentions = [hidden], []
        for layer in self.layers:
            hidden, weights = layer(hidden, *(far if layer.is_global else near))
            if keep_states:
                states.append(hidden)
            if keep_weights:
                attentions.append(weights)
        return hidden, tuple(states) if keep_states else None, tuple(attentions) if keep_weights else None

    def _table(self, theta: float, hidden: Tensor, packing: Packing | None) -> tuple[Tensor, Tensor]:
        width = self.config.hidden_size // self.config.num_attention_heads
        if packing is None:
            return rotary_table(hidden.shape[1], width, theta, hidden.device)
        cosines, sines = rotary_table(packing.length, width, theta, hidden.device)
        return cosines.index_select(0, packing.places), sines.index_select(0, packing.places)

    def finish(self, last: Tensor) -> Tensor:
        return self.final_norm(last)

    def summarise(self, states: Tensor, valid: Tensor | None) -> Tensor:
        return self.pooler.pick(states, valid)


class SCModernBertForMultitask(MultitaskModel):
    """SCModernBert with a pooler, one head per decode mode of every field and one per label column.

    Weights start as MultitaskModel says, but Linear and Embedding are normal(0, initializer_range) cut at initializer_cutoff_factor
    standard deviations.
    """

    config_class = SCModernBertConfig
    base_model_prefix = "scmodernbert"
    encoder_pattern: ClassVar[str] = r"\.(layers|final_norm)\."
    lora_targets: ClassVar[tuple[str, ...]] = ("Wqkv", "Wo", "Wi")
    _no_split_modules = ["ModernBertLayer"]  # noqa: RUF012

    def build_backbone(self, config: SCModernBertConfig) -> nn.Module:
        return SCModernBertBackbone(config)

    def draw_weight(self, module: nn.Linear | nn.Embedding) -> None:
        std, cut = self.config.initializer_range, self.config.initializer_cutoff_factor
        init.trunc_normal_(module.weight, mean=0.0, std=std, a=-cut * std, b=cut * std)
