"""The post-norm BERT encoder: self-attention and feed-forward, each followed by residual and LayerNorm.

Devlin et al. 2019 (BERT), without token types; module names are those of the published scBERT-style weights. What attends is given
by the backbone, so encoders that approximate attention share the rest.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from bmfm_pipeline.models.attention import Visibility, attend, attend_first, join_heads, split_heads
from bmfm_pipeline.models.configuration import MultitaskConfig, SCBertConfig
from bmfm_pipeline.models.dropout import Dropout


class Projections(nn.Module):
    """The query, key and value projections, which every kind of self-attention begins with."""

    def __init__(self, config: MultitaskConfig):
        super().__init__()
        self.heads = config.num_attention_heads
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = Dropout(config.attention_probs_dropout_prob)

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, L, H) -> query, key and value, each (B, heads, L, H / heads)"""
        query, key, value = (split_heads(layer(hidden), self.heads) for layer in (self.query, self.key, self.value))
        return query, key, value


class SelfAttention(Projections):
    """Softmax attention in the way that `config.attention` names; the classic one keeps its weights."""

    def __init__(self, config: SCBertConfig):
        super().__init__(config)
        self.how = config.attention

    def forward(self, hidden: Tensor, seen: Visibility) -> tuple[Tensor, Tensor | None]:
        """(B, L, H) states -> (B, L, H), and the weights (B, heads, L, L) or None"""
        rate = self.dropout.p if self.training else 0.0
        mixed, weights = attend(*self.project(hidden), seen, rate, self.how)
        return join_heads(mixed), weights

    def of_first(self, first: Tensor, hidden: Tensor, seen: Visibility) -> Tensor:
        """What the first positions (cells, 1, H) of the states `hidden` get, as attend_first says, without dropout."""
        query, key, value = (
            split_heads(layer(states), self.heads)
            for layer, states in ((self.query, first), (self.key, hidden), (self.value, hidden))
        )
        return join_heads(attend_first(query, key, value, seen, self.how)[0])


class ResidualOutput(nn.Module):
    """Linear, dropout, residual, LayerNorm."""

    def __init__(self, width: int, config: MultitaskConfig):
        super().__init__()
        self.dense = nn.Linear(width, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, states: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(states)) + residual)


class Attention(nn.Module):
    def __init__(self, config: MultitaskConfig, build_attention: Callable[[Any], nn.Module]):
        super().__init__()
        self.self = build_attention(config)
        self.output = ResidualOutput(config.hidden_size, config)

    def forward(self, hidden: Tensor, seen: Any) -> tuple[Tensor, Tensor | None]:
        mixed, weights = self.self(hidden, seen)
        return self.output(mixed, hidden), weights


class Intermediate(nn.Module):
    def __init__(self, config: MultitaskConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, hidden: Tensor) -> Tensor:
        return self.activation(self.dense(hidden))


class BertLayer(GradientCheckpointingLayer):
    def __init__(self, config: MultitaskConfig, build_attention: Callable[[Any], nn.Module]):
        super().__init__()
        self.attention = Attention(config, build_attention)
        self.intermediate = Intermediate(config)
        self.output = ResidualOutput(config.intermediate_size, config)

    def forward(self, hidden: Tensor, seen: Any) -> tuple[Tensor, Tensor | None]:
        attended, weights = self.attention(hidden, seen)
        return self.output(self.intermediate(attended), attended), weights

    def of_first(self, first: Tensor, hidden: Tensor, seen: Any) -> Tensor:
        """The states of the first positions (cells, 1, H) alone."""
        attended = self.attention.output(self.attention.self.of_first(first, hidden, seen), first)
        return self.output(self.intermediate(attended), attended)


class BertEncoder(nn.Module):
    """The layers one after another. `build_attention(config)` makes the self-attention of a layer: (states, seen) -> (states, weights)."""

    def __init__(self, config: MultitaskConfig, build_attention: Callable[[Any], nn.Module]):
        super().__init__()
        self.layer = nn.ModuleList([BertLayer(config, build_attention) for _ in range(config.num_hidden_layers)])

    def forward(
        self, hidden: Tensor, seen: Any, keep_states: bool = False, keep_weights: bool = False
    ) -> tuple[Tensor, tuple[Tensor, ...] | None, tuple[Tensor, ...] | None]:
        """Last states, and on request the states before and after every layer and the attention weights of every layer.

        `seen` says which keys are seen, in whatever form the self-attention takes it.
        """
        states, attentions = [hidden], []
        for layer in self.layer:
            hidden, weights = layer(hidden, seen)
            if keep_states:
                states.append(hidden)
            if keep_weights:
                attentions.append(weights)
        return hidden, tuple(states) if keep_states else None, tuple(attentions) if keep_weights else None

    def first_states(self, hidden: Tensor, seen: Any, firsts: Callable[[Tensor], Tensor]) -> Tensor:
        """Last states of the first positions, which `firsts` takes out of states: the last layer computes no others.

        The self-attention must have `of_first`.
        """
        for layer in self.layer[:-1]:
            hidden, _ = layer(hidden, seen)
        return self.layer[-1].of_first(firsts(hidden), hidden, seen)
