"""SCNystromformer: the BERT encoder with Nystrom attention, whose cost grows with the length, not with its square."""

import torch
from torch import Tensor, nn
from transformers import initialization as init

from bmfm_pipeline.models.attention import key_mask, refuse_pairwise
from bmfm_pipeline.models.backbone import Backbone
from bmfm_pipeline.models.bert_encoder import BertEncoder
from bmfm_pipeline.models.configuration import SCNystromformerConfig
from bmfm_pipeline.models.multitask import MultitaskModel
from bmfm_pipeline.models.nystrom_attention import NystromAttention, PackedLandmarks, place_landmarks
from bmfm_pipeline.models.packing import Packing


class SCNystromformerBackbone(Backbone):
    """Hidden states are those before the first and after every layer."""

    packs = True

    def __init__(self, config: SCNystromformerConfig):
        super().__init__(config)
        self.config = config
        self.encoder = BertEncoder(config, NystromAttention)

    def encode(self, hidden: Tensor, attention_mask: Tensor | Packing | None, keep_states: bool, keep_weights: bool):
        refuse_pairwise(attention_mask, SCNystromformerConfig.model_type)
        if isinstance(attention_mask, Packing):
            marks = PackedLandmarks(attention_mask, self.config)
        else:
            marks = place_landmarks(hidden, key_mask(attention_mask), self.config)
        return self.encoder(hidden, marks, keep_states, keep_weights)


class SCNystromformerForMultitask(MultitaskModel):
    """SCNystromformer with a pooler, one head per decode mode of every field and one per label column.

    Weights start as MultitaskModel says: Linear, convolution and Embedding normal(0, initializer_range), biases zero.
    """

    config_class = SCNystromformerConfig
    base_model_prefix = "scnystromformer"
    _no_split_modules = ["BertLayer"]  # noqa: RUF012

    def build_backbone(self, config: SCNystromformerConfig) -> nn.Module:
        return SCNystromformerBackbone(config)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Conv2d):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
