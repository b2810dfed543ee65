"""SCBert: the BERT encoder over the sum of field embeddings, for any mix of field and label objectives."""

from torch import Tensor, nn

from bmfm_pipeline.models.attention import can_attend_first, seen_by_all
from bmfm_pipeline.models.backbone import Backbone
from bmfm_pipeline.models.bert_encoder import BertEncoder, SelfAttention
from bmfm_pipeline.models.configuration import SCBertConfig
from bmfm_pipeline.models.multitask import MultitaskModel
from bmfm_pipeline.models.packing import Packing


class SCBertBackbone(Backbone):
    """Hidden states are those before the first and after every layer."""

    packs = True
    no_weights = "fused attention does not keep its weights; build the model with attention: null to get attentions"

    def __init__(self, config: SCBertConfig):
        super().__init__(config)
        self.how, self.rate = config.attention, config.attention_probs_dropout_prob
        self.can_return_weights = config.attention is None
        self.encoder = BertEncoder(config, SelfAttention)

    def encode(self, hidden: Tensor, attention_mask: Tensor | Packing | None, keep_states: bool, keep_weights: bool):
        rate = self.rate if self.training else 0.0
        seen = seen_by_all(attention_mask, hidden, self.how, rate)
        return self.encoder(hidden, seen, keep_states, keep_weights)

    def encode_first(self, hidden: Tensor, attention_mask: Tensor | Packing | None) -> Tensor | None:
        if self.training:
            return None
        seen = seen_by_all(attention_mask, hidden, self.how, 0.0)
        if not can_attend_first(hidden, seen):
            return None
        if not isinstance(attention_mask, Packing):
            return self.encoder.first_states(hidden, seen, lambda states: states[:, :1])
        packing = attention_mask
        firsts = self.encoder.first_states(hidden, seen, lambda states: states[0, packing.firsts].unsqueeze(1))
        return packing.unpack_firsts(firsts)


class SCBertForMultitask(MultitaskModel):
    """SCBert with a pooler, one head per decode mode of every field and one per label column.

    Weights start as MultitaskModel says: Linear and Embedding normal(0, initializer_range), biases zero.
    """

    config_class = SCBertConfig
    base_model_prefix = "scbert"
    _no_split_modules = ["BertLayer"]  # noqa: RUF012

    def build_backbone(self, config: SCBertConfig) -> nn.Module:
        return SCBertBackbone(config)
