"""Convolutions between the embeddings and the first layer of the encoder: motifs of a sequence, found where they stand."""

from torch import Tensor, nn
from transformers.activations import ACT2FN

from bmfm_pipeline.models.configuration import MultitaskConfig
from bmfm_pipeline.models.dropout import Dropout
from bmfm_pipeline.models.packing import Packing


class ConvolutionLayer(nn.Module):
    """A convolution over positions of one sequence, activation, dropout, residual, LayerNorm. Behind both ends zeros are read."""

    def __init__(self, config: MultitaskConfig):
        super().__init__()
        width = config.convolution_width
        self.conv = nn.Conv1d(config.hidden_size, config.hidden_size, width, padding=width // 2)
        self.activation = ACT2FN[config.hidden_act]
        self.dropout = Dropout(config.hidden_dropout_prob)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden: Tensor, valid: Tensor | None) -> Tensor:
        """(B, L, H) and (B, L, 1), 0 where padding is -> (B, L, H)"""
        read = hidden if valid is None else hidden * valid
        found = self.activation(self.conv(read.transpose(1, 2))).transpose(1, 2)
        return self.LayerNorm(hidden + self.dropout(found))


class Neighbourhood(nn.Module):
    """`config.convolution_layers` convolutions over `config.convolution_width` positions each."""

    def __init__(self, config: MultitaskConfig):
        super().__init__()
        self.layer = nn.ModuleList([ConvolutionLayer(config) for _ in range(config.convolution_layers)])

    def forward(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """(B, L, H) and a mask (B, L) of what is not padding -> (B, L, H)"""
        valid = None if mask is None else mask.to(hidden.dtype).unsqueeze(-1)
        for layer in self.layer:
            hidden = layer(hidden, valid)
        return hidden

    def of_stream(self, stream: Tensor, packing: Packing) -> Tensor:
        """The same on the stream (1, T, H) of a packing; sequences do not see each other."""
        return packing.pack(self(packing.unpack(stream), packing.valid))
