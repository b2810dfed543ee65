"""The model around any encoder: field embeddings in front, pooler, field heads and label heads behind; how weights start."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init

from bmfm_pipeline.errors import CheckpointError
from bmfm_pipeline.models.backbone import Backbone, MultitaskOutput
from bmfm_pipeline.models.configuration import MultitaskConfig
from bmfm_pipeline.models.embeddings import SinusoidalPositions
from bmfm_pipeline.models.expressed import GeneScores
from bmfm_pipeline.models.gene2vec import PartlyFrozenEmbedding
from bmfm_pipeline.models.heads import Heads
from bmfm_pipeline.models.packing import Packing
from bmfm_pipeline.models.perturbed import PerturbationVectors
from bmfm_pipeline.models.value_encoders import ScaleAdaptEncoder
from bmfm_pipeline.models.words import WordScores


class MultitaskModel(PreTrainedModel):
    """Base of the models of all backbones. The backbone is the attribute that `base_model_prefix` names.

    Weights start as: Linear normal(0, initializer_range) with zero bias; Embedding normal(0, initializer_range) with the pad row
    zero; Conv1d normal(0, 1 / sqrt(inputs)) with zero bias; LayerNorm weight 1, bias 0; learned frequencies normal(0, 2 pi basis_scale); fixed tables as their formulas say. Backbones
    say where they differ.
    """

    config_class = MultitaskConfig
    supports_gradient_checkpointing = True
    # Where in the backbone the field embeddings are.
    embeddings_name: ClassVar[str] = "embeddings"
    # Which parameters are the encoder's, searched for in their names; freezing the encoder freezes these.
    encoder_pattern: ClassVar[str] = r"\.encoder\."
    # Last parts of the names of the encoder's Linear layers that low-rank adapters go into by default.
    lora_targets: ClassVar[tuple[str, ...]] = ("query", "key", "value", "dense")
    # Last part of the names of tensors that published weights may lack, and what is said when all of them are missing.
    may_be_missing: ClassVar[dict[str, str]] = {}

    def __init__(self, config: MultitaskConfig):
        super().__init__(config)
        setattr(self, self.base_model_prefix, self.build_backbone(config))
        self.cls = Heads(config)
        self.post_init()

    def build_backbone(self, config: Any) -> Backbone:
        """The encoder with its embeddings and pooler."""
        raise NotImplementedError(f"{type(self).__name__} has no backbone")

    @property
    def backbone(self) -> Backbone:
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
        packing: Packing | None = None,
        first_only: bool = False,
    ) -> MultitaskOutput:
        """Scores of every head for a batch.

        Parameters
        ----------
        input_ids : (B, F, L), one row per input field; integers, or float32 when a field is continuous.
        attention_mask : 0/1, (B, L) or (B, L, L); None means that nothing is padding.
        positions : for each field whose heads are wanted, the flat indices into B * L to score; logits are then (n, V) or (n, 1)
            and fields it does not name are not scored at all. None scores every position of every field.
        inputs_embeds : (B, L, H) in place of `input_ids`; skips the embedding layer with its LayerNorm.
        packing : from Packing.of, made here when it is not given. It is used where `positions` says which positions are
            read: padding is then not computed, and states there are zero. Without `positions`, with attention weights, or in the
            arithmetic of model.legacy_attention every position is computed.
        first_only : of the last states only those at the first position are read, by label heads and by whoever asks for the output;
            what this saves (all other positions of the last layer) is left out where `positions` names no field. States are then
            (B, 1, H), else as without it.
        """
        legacy = getattr(self.config, "legacy_attention", False)
        if positions is None or output_attentions or legacy or not self.backbone.packs:
            packing = None
        elif packing is None:
            attention_mask, packing = Packing.of(attention_mask)
        state = self.backbone(
            input_ids,
            attention_mask,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            inputs_embeds=inputs_embeds,
            packing=packing,
            first_only=first_only and positions == {} and not legacy and not self._reads_further(),
        )
        state.logits = self.cls(state, input_ids, self.backbone.embeddings, positions)
        return state

    def _reads_further(self) -> bool:
        """Whether a label is decoded from another position than the first."""
        return any(label.decode_from for label in self.config.model_labels)

    def draw_weight(self, module: nn.Linear | nn.Embedding) -> None:
        """First values of the weight of a Linear or an Embedding."""
        init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (PerturbationVectors, WordScores)):
            init.zeros_(module.weight)
        elif isinstance(module, nn.Linear):
            self.draw_weight(module)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, SinusoidalPositions):
            init.copy_(module.weight, module.table())
        elif isinstance(module, GeneScores):
            init.zeros_(module.weight)
            init.constant_(module.sizes, module.num_embeddings**-0.5)
        elif isinstance(module, nn.Embedding):
            self.draw_weight(module)
            # The pad row is a slice, which does not carry the mark of a weight that was already loaded.
            if module.padding_idx is not None and not getattr(module.weight, "_is_hf_initialized", False):
                init.zeros_(module.weight[module.padding_idx])
            if isinstance(module, PartlyFrozenEmbedding):
                init.zeros_(module.frozen_rows)
        elif isinstance(module, nn.Conv1d):
            # Its variance is kept by the sum over a window, whatever its width.
            init.kaiming_normal_(module.weight, nonlinearity="linear")
            init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            if module.bias is not None:
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
