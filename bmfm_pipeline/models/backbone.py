"""What every backbone has: field embeddings in front, an encoder, a pooler behind."""

from dataclasses import dataclass

from torch import Tensor, nn
from transformers.utils import ModelOutput

from bmfm_pipeline.models.attention import key_mask
from bmfm_pipeline.models.configuration import MultitaskConfig
from bmfm_pipeline.models.embeddings import FieldEmbeddings
from bmfm_pipeline.models.neighbourhood import Neighbourhood
from bmfm_pipeline.models.packing import Packing
from bmfm_pipeline.models.pooling import Pooler


@dataclass
class MultitaskOutput(ModelOutput):
    """`logits` by head in a fixed order: the fields' heads in the order of the fields, then the label columns.

    `last_hidden_state` (B, L, H) is the state after the last layer, from which embeddings of cells are taken; `head_states` (B, L, H) is
    what the heads read, the same or, where the encoder ends in a norm, that state normed; `embeddings` (B, H) is the pooler's output,
    in a backbone that does without its pooler the pooled state;
    `hidden_states` are those that the backbone documents, from the first to the last layer; `attentions` every layer's weights
    (B, heads, L, L).
    """

    logits: dict[str, Tensor] | None = None
    last_hidden_state: Tensor | None = None
    head_states: Tensor | None = None
    embeddings: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class Backbone(nn.Module):
    """Base of the backbones: calling one returns a MultitaskOutput that lacks only the logits.

    A subclass makes its encoder and defines `encode`; `self.embeddings` and `self.pooler` are made here, or where published names want
    them.
    """

    # Whether `encode` takes a Packing too; where it does not, padding is computed.
    packs = False
    # Whether attention weights can be returned; the reason when they cannot.
    can_return_weights = False
    no_weights = "this attention is approximated, so there are no attention weights to return"

    def __init__(self, config: MultitaskConfig):
        super().__init__()
        self.embeddings = FieldEmbeddings(config)
        self._surround(config)

    def _surround(self, config: MultitaskConfig) -> None:
        """Make what stands between the embeddings and the encoder, and behind it."""
        # Made only where asked for, so that weights without it keep their names.
        self.neighbourhood = Neighbourhood(config) if config.convolution_layers else None
        self.pooler = Pooler(config.hidden_size, config.classifier_pooling)

    def encode(
        self, hidden: Tensor, attention_mask: Tensor | Packing | None, keep_states: bool, keep_weights: bool
    ) -> tuple[Tensor, tuple[Tensor, ...] | None, tuple[Tensor, ...] | None]:
        """(B, L, H) embeddings and a 0/1 mask (B, L), (B, L, L) or None -> last states, states and attention weights of the layers.

        With a Packing the embeddings and states are a stream (1, T, H), and no weights are asked for.
        """
        raise NotImplementedError(f"{type(self).__name__} has no encoder")

    def forward(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        inputs_embeds: Tensor | None = None,
        packing: Packing | None = None,
        first_only: bool = False,
    ) -> MultitaskOutput:
        """With a packing, what is at padding is not computed; states are zero there. `first_only`: states of the first position are
        enough, (B, 1, H), where the backbone saves work by it."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if output_attentions and not self.can_return_weights:
            raise ValueError(self.no_weights)
        first_only = first_only and self.pooler.how == "cls" and not (output_hidden_states or output_attentions)
        if packing is not None:
            return self._forward_packed(input_ids, inputs_embeds, packing, output_hidden_states, first_only)
        hidden = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if self.neighbourhood is not None:
            hidden = self.neighbourhood(hidden, key_mask(attention_mask))
        if first_only and (first := self.encode_first(hidden, attention_mask)) is not None:
            return self._output_of_first(first)
        last, states, weights = self.encode(hidden, attention_mask, output_hidden_states, output_attentions)
        states_of_heads = self.finish(last)
        return MultitaskOutput(
            last_hidden_state=last,
            head_states=states_of_heads,
            embeddings=self.summarise(states_of_heads, key_mask(attention_mask)),
            hidden_states=states,
            attentions=weights,
        )

    def _forward_packed(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        packing: Packing,
        keep_states: bool,
        first_only: bool,
    ) -> MultitaskOutput:
        if inputs_embeds is not None:
            hidden = packing.pack(inputs_embeds)
        else:
            hidden = self.embeddings(packing.pack(input_ids.transpose(1, 2)).transpose(1, 2), packing.places)
        if self.neighbourhood is not None:
            hidden = self.neighbourhood.of_stream(hidden, packing)
        if first_only and (first := self.encode_first(hidden, packing)) is not None:
            return self._output_of_first(first)
        last, states, _ = self.encode(hidden, packing, keep_states, False)
        finished = self.finish(last)
        of_cells = packing.unpack(last)
        of_heads = of_cells if finished is last else packing.unpack(finished)
        if states is not None:
            states = (*(packing.unpack(state) for state in states[:-1]), of_cells)
        return MultitaskOutput(
            last_hidden_state=of_cells,
            head_states=of_heads,
            embeddings=self.summarise(of_heads, packing.valid),
            hidden_states=states,
        )

    def _output_of_first(self, first: Tensor) -> MultitaskOutput:
        states = self.finish(first)
        return MultitaskOutput(last_hidden_state=first, head_states=states, embeddings=self.summarise(states, None))

    def encode_first(self, hidden: Tensor, attention_mask: Tensor | Packing | None) -> Tensor | None:
        """`encode` for the first position alone: (B, 1, H) last states in the order of the batch; None where nothing is saved by it."""
        return None

    def finish(self, last: Tensor) -> Tensor:
        """What the heads of single positions read of the last states (B, L, H): these themselves."""
        return last

    def summarise(self, states: Tensor, valid: Tensor | None) -> Tensor:
        """(B, L, H) states and (B, L), True where a position is not padding -> (B, H), what the heads of whole cells read."""
        return self.pooler(states, valid)
