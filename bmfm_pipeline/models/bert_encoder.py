"""The post-norm BERT encoder: self-attention and feed-forward, each followed by residual and LayerNorm.

Devlin et al. 2019 (BERT), without token types; module names are those of the published scBERT-style weights.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from bmfm_pipeline.models.configuration import SCBertConfig


class SelfAttention(nn.Module):
    """Multi-head attention, fused (`torch`) or classic, which keeps the attention weights."""

    def __init__(self, config: SCBertConfig):
        super().__init__()
        self.heads = config.num_attention_heads
        self.fused = config.attention == "torch"
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)

    def forward(self, hidden: Tensor, allowed: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(B, L, H) states and a boolean mask that broadcasts to (B, heads, L, L), True where a key may be seen."""
        batch, length, size = hidden.shape
        query, key, value = (
            layer(hidden).view(batch, length, self.heads, size // self.heads).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        if self.fused:
            rate = self.dropout.p if self.training else 0.0
            mixed, weights = scaled_dot_product_attention(query, key, value, attn_mask=allowed, dropout_p=rate), None
        else:
            scores = query @ key.transpose(-1, -2) / math.sqrt(size // self.heads)
            if allowed is not None:
                scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
            weights = torch.softmax(scores, dim=-1)
            mixed = self.dropout(weights).to(value.dtype) @ value
        return mixed.transpose(1, 2).reshape(batch, length, size), weights


class ResidualOutput(nn.Module):
    """Linear, dropout, residual, LayerNorm."""

    def __init__(self, width: int, config: SCBertConfig):
        super().__init__()
        self.dense = nn.Linear(width, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, states: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(states)) + residual)


class Attention(nn.Module):
    def __init__(self, config: SCBertConfig):
        super().__init__()
        self.self = SelfAttention(config)
        self.output = ResidualOutput(config.hidden_size, config)

    def forward(self, hidden: Tensor, allowed: Tensor | None) -> tuple[Tensor, Tensor | None]:
        mixed, weights = self.self(hidden, allowed)
        return self.output(mixed, hidden), weights


class Intermediate(nn.Module):
    def __init__(self, config: SCBertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, hidden: Tensor) -> Tensor:
        return self.activation(self.dense(hidden))


class BertLayer(GradientCheckpointingLayer):
    def __init__(self, config: SCBertConfig):
        super().__init__()
        self.attention = Attention(config)
        self.intermediate = Intermediate(config)
        self.output = ResidualOutput(config.intermediate_size, config)

    def forward(self, hidden: Tensor, allowed: Tensor | None) -> tuple[Tensor, Tensor | None]:
        attended, weights = self.attention(hidden, allowed)
        return self.output(self.intermediate(attended), attended), weights


class BertEncoder(nn.Module):
    def __init__(self, config: SCBertConfig):
        super().__init__()
        self.layer = nn.ModuleList([BertLayer(config) for _ in range(config.num_hidden_layers)])

    def forward(
        self, hidden: Tensor, allowed: Tensor | None, keep_states: bool = False, keep_weights: bool = False
    ) -> tuple[Tensor, tuple[Tensor, ...] | None, tuple[Tensor, ...] | None]:
        """Last states, and on request the states before and after every layer and the attention weights of every layer."""
        states, attentions = [hidden], []
        for layer in self.layer:
            hidden, weights = layer(hidden, allowed)
            if keep_states:
                states.append(hidden)
            if keep_weights:
                attentions.append(weights)
        return hidden, tuple(states) if keep_states else None, tuple(attentions) if keep_weights else None


def attention_allowed(attention_mask: Tensor | None) -> Tensor | None:
    """Boolean mask (B, 1, 1, L) or (B, 1, L, L), True where a key may be seen, from a 0/1 mask (B, L) or (B, L, L)."""
    if attention_mask is None:
        return None
    if attention_mask.dim() == 2:
        return attention_mask.to(torch.bool)[:, None, None, :]
    if attention_mask.dim() == 3:
        return attention_mask.to(torch.bool)[:, None]
    raise ValueError(
        f"attention_mask has shape {tuple(attention_mask.shape)}; expected (batch, length) or (batch, length, length)"
    )
