"""SCPerformer: the BERT encoder with attention through random features, whose cost grows with the length, not with its square."""

from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import initialization as init

from bmfm_pipeline.models.attention import key_mask, refuse_pairwise
from bmfm_pipeline.models.backbone import Backbone
from bmfm_pipeline.models.bert_encoder import BertEncoder
from bmfm_pipeline.models.configuration import SCPerformerConfig
from bmfm_pipeline.models.multitask import MultitaskModel
from bmfm_pipeline.models.packing import Packing
from bmfm_pipeline.models.random_features import RandomFeatureAttention


class SCPerformerBackbone(Backbone):
    """Hidden states are those before the first and after every layer.

    Features that are redrawn follow from the number of training passes, which is stored with the weights, so training that resumes
    meets the same ones.
    """

    packs = True

    def __init__(self, config: SCPerformerConfig):
        super().__init__(config)
        if config.feature_seed is None:
            config.feature_seed = int(torch.randint(2**31 - 1, (1,), device="cpu"))
        self.encoder = BertEncoder(config, RandomFeatureAttention)
        for index, attention in enumerate(self.attentions()):
            attention.layer = index
        self.interval = config.feature_redraw_interval
        if self.interval is not None:
            self.register_buffer("training_passes", torch.zeros((), dtype=torch.int64))
            self._passes: int | None = None  # the same number, read without waiting for an accelerator

    def attentions(self) -> list[RandomFeatureAttention]:
        return [layer.attention.self for layer in self.encoder.layer]

    def _count_pass(self) -> None:
        if self._passes is None:
            self._passes = int(self.training_passes)
        if self._passes and self._passes % self.interval == 0:
            for attention in self.attentions():
                # A new tensor: the old one may still be needed by a backward pass.
                features = attention.draw(self._passes // self.interval)
                attention.projection_matrix = features.to(attention.projection_matrix)
        self._passes += 1
        self.training_passes.fill_(self._passes)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._passes = None

    def encode(self, hidden: Tensor, attention_mask: Tensor | Packing | None, keep_states: bool, keep_weights: bool):
        refuse_pairwise(attention_mask, SCPerformerConfig.model_type)
        if self.training and self.interval is not None:
            self._count_pass()
        valid = attention_mask if isinstance(attention_mask, Packing) else key_mask(attention_mask)
        return self.encoder(hidden, valid, keep_states, keep_weights)


class SCPerformerForMultitask(MultitaskModel):
    """SCPerformer with a pooler, one head per decode mode of every field and one per label column.

    Weights start as MultitaskModel says: Linear and Embedding normal(0, initializer_range), biases zero; random features are drawn from
    config.feature_seed.
    """

    config_class = SCPerformerConfig
    base_model_prefix = "scperformer"
    lora_targets: ClassVar[tuple[str, ...]] = ("query", "key", "value", "out", "dense")
    _no_split_modules = ["BertLayer"]  # noqa: RUF012
    may_be_missing: ClassVar[dict[str, str]] = {
        "projection_matrix": "the random features are not among these weights; they are drawn from model.feature_seed",
        "training_passes": "the weights do not count training passes; features are redrawn as if training began here",
    }

    def build_backbone(self, config: SCPerformerConfig) -> nn.Module:
        return SCPerformerBackbone(config)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, RandomFeatureAttention):
            init.copy_(module.projection_matrix, module.draw(0))
        elif isinstance(module, SCPerformerBackbone) and module.interval is not None:
            init.zeros_(module.training_passes)
