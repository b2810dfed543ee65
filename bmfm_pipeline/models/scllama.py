"""SCLlama: a pre-norm encoder in the style of Llama, attending in both directions, over the sum of field embeddings.

Touvron et al. 2023 (RMSNorm, SwiGLU, no biases) without rotary positions, since the order of genes means nothing; module names are those
of the published weights.
"""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from bmfm_pipeline.models.attention import (
    Visibility,
    attend,
    attention_allowed,
    join_heads,
    seen_by_all,
    split_heads,
    visibility,
)
from bmfm_pipeline.models.backbone import Backbone
from bmfm_pipeline.models.configuration import SCLlamaConfig
from bmfm_pipeline.models.dropout import Dropout
from bmfm_pipeline.models.embeddings import FieldEmbeddings
from bmfm_pipeline.models.multitask import MultitaskModel
from bmfm_pipeline.models.packing import Packing


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * scale, computed in float32."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.scale = nn.Parameter(torch.ones(size))

    def forward(self, states: Tensor) -> Tensor:
        wide = states.float()
        normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return normed.to(states.dtype) * self.scale


class FusedAttention(nn.Module):
    def __init__(self, config: SCLlamaConfig):
        super().__init__()
        self.heads, self.how, self.rate = (
            config.num_attention_heads,
            config.attention,
            config.attention_probs_dropout_prob,
        )
        self.c_attn = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor, seen: Visibility) -> tuple[Tensor, Tensor | None]:
        query, key, value = (split_heads(part, self.heads) for part in self.c_attn(hidden).chunk(3, dim=-1))
        mixed, weights = attend(query, key, value, seen, self.rate if self.training else 0.0, self.how)
        return self.proj(join_heads(mixed)), weights


class SwiGLU(nn.Module):
    """c_proj(silu(c_fc1 x) * c_fc2 x)"""

    def __init__(self, config: SCLlamaConfig):
        super().__init__()
        self.c_fc1 = nn.Linear(config.hidden_size, config.feed_forward_size, bias=False)
        self.c_fc2 = nn.Linear(config.hidden_size, config.feed_forward_size, bias=False)
        self.c_proj = nn.Linear(config.feed_forward_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.c_proj(silu(self.c_fc1(hidden)) * self.c_fc2(hidden))


class LlamaBlock(GradientCheckpointingLayer):
    """Norm, attention, residual; norm, feed-forward, residual. The first block has no norm in front of its attention."""

    def __init__(self, config: SCLlamaConfig, index: int):
        super().__init__()
        self.rms_1 = nn.Identity() if index == 0 else RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = FusedAttention(config)
        self.rms_2 = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, hidden: Tensor, seen: Visibility) -> tuple[Tensor, Tensor | None]:
        attended, weights = self.attn(self.rms_1(hidden), seen)
        hidden = hidden + self.dropout(attended)
        return hidden + self.dropout(self.mlp(self.rms_2(hidden))), weights


class LlamaEncoder(nn.Module):
    """Field embeddings and blocks; learned memory tokens are put behind the cell before the first block and taken off after the last."""

    def __init__(self, config: SCLlamaConfig):
        super().__init__()
        self.how, self.rate = config.attention, config.attention_probs_dropout_prob
        self.embeddings = FieldEmbeddings(config)
        self.memory = config.num_memory_tokens
        if self.memory:
            self.aux_tokens = nn.Parameter(torch.empty(1, self.memory, config.hidden_size))
            # Part of the published weights, which do not apply it.
            self.aux_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False).requires_grad_(False)
        self.blocks = nn.ModuleList([LlamaBlock(config, index) for index in range(config.num_hidden_layers)])

    def forward(self, hidden: Tensor, attention_mask: Tensor | Packing | None, keep_states: bool, keep_weights: bool):
        length, rate = hidden.shape[1], self.rate if self.training else 0.0
        if isinstance(attention_mask, Packing):
            return self._forward_packed(hidden, attention_mask, keep_states, rate)
        allowed = attention_allowed(attention_mask)
        if self.memory:
            tokens = self.aux_tokens.to(hidden.dtype).expand(len(hidden), -1, -1)
            hidden = torch.cat([hidden, tokens], dim=1)
            allowed = None if allowed is None else allow_memory(allowed, self.memory)
        seen = visibility(allowed, hidden, self.how, rate)
        states, attentions = [], []
        for block in self.blocks:
            hidden, weights = block(hidden, seen)
            if keep_states:
                states.append(hidden[:, :length])
            if keep_weights:
                attentions.append(weights)
        return (
            hidden[:, :length],
            tuple(states) if keep_states else None,
            tuple(attentions) if keep_weights else None,
        )

    def _forward_packed(self, hidden: Tensor, packing: Packing, keep_states: bool, rate: float):
        places = None
        if self.memory:
            tokens = self.aux_tokens.to(hidden.dtype).expand(packing.batch, -1, -1).flatten(0, 1)
            wider, gathered = packing.longer(self.memory)
            hidden = torch.cat([hidden[0], tokens]).index_select(0, gathered).unsqueeze(0)
            places = torch.nonzero(gathered < len(packing.index)).flatten()
            packing = wider
        seen = seen_by_all(packing, hidden, self.how, rate)

        def of_genes(stream: Tensor) -> Tensor:
            return stream if places is None else stream.index_select(1, places)

        states = []
        for block in self.blocks:
            hidden, _ = block(hidden, seen)
            if keep_states:
                states.append(of_genes(hidden))
        return states[-1] if states else of_genes(hidden), tuple(states) if keep_states else None, None


def allow_memory(allowed: Tensor, tokens: int) -> Tensor:
    """The mask (B, 1, 1, L) or (B, 1, L, L) with memory tokens behind: all see them.

    In the second form they see what some other position sees, so that what is hidden from a cell's tokens does not reach them by this
    way.
    """
    batch, _, queries, keys = allowed.shape
    wider = torch.cat([allowed, allowed.new_ones(batch, 1, queries, tokens)], dim=-1)
    if queries == 1:
        return wider
    others = (allowed & ~torch.eye(keys, dtype=torch.bool, device=allowed.device)).any(dim=2, keepdim=True)
    theirs = torch.cat([others, others.new_ones(batch, 1, 1, tokens)], dim=-1)
    return torch.cat([wider, theirs.expand(-1, -1, tokens, -1)], dim=2)


class SCLlamaBackbone(Backbone):
    """Hidden states are those after every block; there is no norm behind the last one."""

    packs = True
    no_weights = "fused attention does not keep its weights; build the model with attention: null to get attentions"

    def __init__(self, config: SCLlamaConfig):
        nn.Module.__init__(self)  # the published names have the embeddings inside the encoder
        self.can_return_weights = config.attention is None
        self.encoder = LlamaEncoder(config)
        self._surround(config)

    @property
    def embeddings(self) -> FieldEmbeddings:
        return self.encoder.embeddings

    def encode(self, hidden: Tensor, attention_mask: Tensor | Packing | None, keep_states: bool, keep_weights: bool):
        return self.encoder(hidden, attention_mask, keep_states, keep_weights)


class SCLlamaForMultitask(MultitaskModel):
    """SCLlama with a pooler, one head per decode mode of every field and one per label column.

    Weights start as MultitaskModel says, with these differences: while initializer_range is None, Linear weights are uniform within
    1 / sqrt(inputs), as torch draws them, and embeddings and memory tokens are normal(0, 0.02).
    """

    config_class = SCLlamaConfig
    base_model_prefix = "core"
    embeddings_name: ClassVar[str] = "encoder.embeddings"
    encoder_pattern: ClassVar[str] = r"\.encoder\.(blocks|aux_)"
    lora_targets: ClassVar[tuple[str, ...]] = ("c_attn", "proj", "c_fc1", "c_fc2", "c_proj")
    _no_split_modules = ["LlamaBlock"]  # noqa: RUF012

    def build_backbone(self, config: SCLlamaConfig) -> nn.Module:
        return SCLlamaBackbone(config)

    def draw_weight(self, module: nn.Linear | nn.Embedding) -> None:
        std = self.config.initializer_range
        if std is None and isinstance(module, nn.Linear):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
        else:
            init.normal_(module.weight, mean=0.0, std=0.02 if std is None else std)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, RMSNorm):
            init.ones_(module.scale)
        elif isinstance(module, LlamaEncoder) and module.memory:
            init.normal_(module.aux_tokens, mean=0.0, std=self.config.initializer_range or 0.02)
