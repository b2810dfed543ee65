"""The model around any encoder: field embeddings in front, pooler, field heads and label heads behind; how weights start."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from bmfm_pipeline.errors import CheckpointError
from bmfm_pipeline.models.configuration import MultitaskConfig
from bmfm_pipeline.models.embeddings import SinusoidalPositions
from bmfm_pipeline.models.gene2vec import PartlyFrozenEmbedding
from bmfm_pipeline.models.heads import Heads
from bmfm_pipeline.models.value_encoders import ScaleAdaptEncoder


@dataclass
class MultitaskOutput(ModelOutput):
    """`logits` by head in a fixed order: the fields' heads in the order of the fields, then the label columns.

    `last_hidden_state` (B, L, H); `embeddings` (B, H) is the pooler's output; `hidden_states` holds the embedding output and every
    layer's; `attentions` every layer's weights (B, heads, L, L).
    """

    logits: dict[str, Tensor] | None = None
    last_hidden_state: Tensor | None = None
    embeddings: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class MultitaskModel(PreTrainedModel):
    """Base of the models of all backbones. A backbone has `.embeddings` (FieldEmbeddings) and `.pooler`, and is named `base_model_prefix`.

    Weights start as: Linear normal(0, initializer_range) with zero bias; Embedding normal(0, initializer_range) with the pad row
    zero; LayerNorm weight 1, bias 0; learned frequencies normal(0, 2 pi basis_scale); fixed tables as their formulas say.
    """

    config_class = MultitaskConfig
    supports_gradient_checkpointing = True

    def __init__(self, config: MultitaskConfig):
        super().__init__(config)
        setattr(self, self.base_model_prefix, self.build_backbone(config))
        self.cls = Heads(config)
        self.post_init()

    def build_backbone(self, config: Any) -> nn.Module:
        """The encoder with its embeddings and pooler; calling it returns a MultitaskOutput that lacks only the logits."""
        raise NotImplementedError(f"{type(self).__name__} has no backbone")

    @property
    def backbone(self) -> nn.Module:
        return getattr(self, self.base_model_prefix)

    def get_input_embeddings(self) -> nn.Module:
        """The embedding of the first input field."""
        embeddings = self.backbone.embeddings
        return next(iter(embeddings.children()))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool = False,
        positions: dict[str, Tensor] | None = None,
        output_attentions: bool = False,
        inputs_embeds: Tensor | None = None,
    ) -> MultitaskOutput:
        """Scores of every head for a batch.

        Parameters
        ----------
        input_ids : (B, F, L), one row per input field; integers, or float32 when a field is continuous.
        attention_mask : 0/1, (B, L) or (B, L, L); None means that nothing is padding.
        positions : for each field whose heads are wanted, the flat indices into B * L to score; logits are then (n, V) or (n, 1)
            and fields it does not name are not scored at all. None scores every position of every field.
        inputs_embeds : (B, L, H) in place of `input_ids`; skips the embedding layer with its LayerNorm.
        """
        state = self.backbone(
            input_ids,
            attention_mask,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            inputs_embeds=inputs_embeds,
        )
        state.logits = self.cls(
            state.last_hidden_state, state.embeddings, input_ids, self.backbone.embeddings, positions
        )
        return state

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, mean=0.0, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, SinusoidalPositions):
            init.copy_(module.weight, module.table())
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=std)
            # The pad row is a slice, which does not carry the mark of a weight that was already loaded.
            if module.padding_idx is not None and not getattr(module.weight, "_is_hf_initialized", False):
                init.zeros_(module.weight[module.padding_idx])
            if isinstance(module, PartlyFrozenEmbedding):
                init.zeros_(module.frozen_rows)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.PReLU):
            init.constant_(module.weight, 0.25)
        elif isinstance(module, ScaleAdaptEncoder):
            if isinstance(module.basis, nn.Parameter):
                init.normal_(module.basis, mean=0.0, std=2 * torch.pi * module.basis_scale)
            for name, value in module.first_buffers().items():
                init.copy_(getattr(module, name), value)

    @classmethod
    def from_pretrained(cls, *args, strict: bool = True, output_loading_info: bool = False, **kwargs):
        """As in transformers, but weights that do not fit are an error (CheckpointError) unless `strict=False`."""
        kwargs.setdefault("ignore_mismatched_sizes", strict)
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        wrong = {
            kind: sorted(map(str, info.get(kind) or []))
            for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        }
        if strict and any(wrong.values()):
            listed = "; ".join(
                f"{kind.replace('_', ' ')}: {', '.join(names)}" for kind, names in wrong.items() if names
            )
            raise CheckpointError(
                f"{args[0] if args else 'weights'}: do not fit {cls.__name__}: {listed}; pass strict=False to load the rest"
            )
        return (model, info) if output_loading_info else model
