"""SCBert: the BERT encoder over the sum of field embeddings, for any mix of field and label objectives."""

from torch import Tensor, nn

from bmfm_pipeline.models.bert_encoder import BertEncoder, attention_allowed
from bmfm_pipeline.models.configuration import SCBertConfig
from bmfm_pipeline.models.embeddings import FieldEmbeddings
from bmfm_pipeline.models.multitask import MultitaskModel, MultitaskOutput
from bmfm_pipeline.models.pooling import Pooler


class SCBertBackbone(nn.Module):
    """Embeddings, encoder and pooler."""

    def __init__(self, config: SCBertConfig):
        super().__init__()
        self.can_return_weights = config.attention is None
        self.embeddings = FieldEmbeddings(config)
        self.encoder = BertEncoder(config)
        self.pooler = Pooler(config.hidden_size, config.classifier_pooling)

    def forward(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        inputs_embeds: Tensor | None = None,
    ) -> MultitaskOutput:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if output_attentions and not self.can_return_weights:
            raise ValueError(
                "fused attention does not keep its weights; build the model with attention: null to get attentions"
            )
        hidden = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        last, states, weights = self.encoder(
            hidden, attention_allowed(attention_mask), output_hidden_states, output_attentions
        )
        pooled = self.pooler(last, attention_mask)
        return MultitaskOutput(last_hidden_state=last, embeddings=pooled, hidden_states=states, attentions=weights)


class SCBertForMultitask(MultitaskModel):
    """SCBert with a pooler, one head per decode mode of every field and one per label column."""

    config_class = SCBertConfig
    base_model_prefix = "scbert"
    _no_split_modules = ["BertLayer"]  # noqa: RUF012

    def build_backbone(self, config: SCBertConfig) -> nn.Module:
        return SCBertBackbone(config)
