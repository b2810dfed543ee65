"""From `input_ids` to the encoder's first state: the sum of the fields' embeddings, positions, LayerNorm, dropout."""

import math

import torch
from torch import Tensor, nn

from bmfm_pipeline.errors import ConfigError
from bmfm_pipeline.models.configuration import MultitaskConfig
from bmfm_pipeline.models.dropout import Dropout
from bmfm_pipeline.models.expressed import CellSummary
from bmfm_pipeline.models.gene2vec import PartlyFrozenEmbedding
from bmfm_pipeline.models.perturbed import PerturbationVectors
from bmfm_pipeline.models.schema import ModelField, module_name
from bmfm_pipeline.models.value_encoders import build_value_encoder


class SinusoidalPositions(nn.Embedding):
    """Fixed sin (even columns) and cos (odd columns) of the position at wavelengths from 2 pi to 10000 * 2 pi."""

    def __init__(self, positions: int, hidden_size: int):
        super().__init__(positions, hidden_size)
        self.weight.requires_grad_(False)

    def table(self) -> Tensor:
        positions, size = self.weight.shape
        rates = torch.exp(torch.arange(0, size, 2, dtype=torch.float64) * (-math.log(10000.0) / size))
        phases = torch.arange(positions, dtype=torch.float64).unsqueeze(1) * rates
        table = torch.zeros(positions, size, dtype=torch.float64)
        table[:, 0::2] = torch.sin(phases)
        table[:, 1::2] = torch.cos(phases[:, : size // 2])
        return table.to(torch.float32)


class FieldEmbeddings(nn.Module):
    """Sum over the input fields of each field's embedding. Module names are `{field}_embeddings`."""

    def __init__(self, config: MultitaskConfig):
        super().__init__()
        self.input_fields = config.input_fields
        if not self.input_fields:
            raise ConfigError("fields: the model needs at least one field with is_input: true")
        for item in self.input_fields:
            self._add_field(item, config)
        self.position_embeddings: nn.Embedding | None = None
        self.position_dropout = config.position_dropout
        if config.position_embedding_type == "absolute":
            self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        elif config.position_embedding_type == "sinusoidal":
            self.position_embeddings = SinusoidalPositions(config.max_position_embeddings, config.hidden_size)
        # Made only where asked for, so that weights without it keep their names.
        self.cell_summary = CellSummary(config) if config.cell_summary else None
        self.perturbation_vectors = PerturbationVectors(config) if config.perturbation_vectors else None
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def _add_field(self, item: ModelField, config: MultitaskConfig) -> None:
        if item.name == "position":
            raise ConfigError(
                "fields: a field cannot be called 'position'; its embedding would be taken for the position embeddings"
            )
        name = _embedding_name(item.name)
        if item.continuous:
            encoder = build_value_encoder(
                item.name, item.encoder_kwargs, config.hidden_size, item.num_special_tokens, config.pad_token_id
            )
            self.add_module(name, encoder)
            return
        if config.pad_token_id >= item.vocab_size:
            raise ConfigError(
                f"fields.{item.name}: pad_token_id {config.pad_token_id} is outside its vocabulary of {item.vocab_size}"
            )
        if item.pretrained_embedding:
            width = item.pretrained_embedding.get("dimension")
            if not width:
                raise ConfigError(
                    f"fields.{item.name}.pretrained_embedding has no dimension yet; it is read from the file by build_model"
                )
            self.add_module(name, PartlyFrozenEmbedding(item.vocab_size, width, config.pad_token_id))
            self.add_module(f"{name}_projection", nn.Linear(width, config.hidden_size))
            return
        self.add_module(name, nn.Embedding(item.vocab_size, config.hidden_size, padding_idx=config.pad_token_id))

    def embed_field(self, name: str, values: Tensor) -> Tensor:
        """(...) token ids or values of one input field -> (..., H)"""
        key = _embedding_name(name)
        module = self.get_submodule(key)
        vectors = module(values.to(torch.int64)) if isinstance(module, nn.Embedding) else module(values)
        projection = getattr(self, f"{key}_projection", None)
        return vectors if projection is None else projection(vectors)

    def field_row(self, name: str) -> int:
        """Where a field stands on the second axis of `input_ids`."""
        return next(row for row, item in enumerate(self.input_fields) if item.name == name)

    def forward(self, input_ids: Tensor, places: Tensor | None = None) -> Tensor:
        """(B, F, L) -> (B, L, H). `places` (L,) are the positions where they are not 0, 1, 2, ... (cells one after another)."""
        if input_ids.dim() != 3 or input_ids.shape[1] != len(self.input_fields):
            raise ValueError(
                f"input_ids has shape {tuple(input_ids.shape)}; expected (batch, {len(self.input_fields)}, length), one row for each of "
                f"{[item.name for item in self.input_fields]}"
            )
        total, vectors = self.sums(input_ids, places)
        if self.cell_summary is not None:
            total = self.cell_summary(total, vectors[self.cell_summary.rows.genes], input_ids, places)
        if self.perturbation_vectors is not None:
            total = total + self.perturbation_vectors(input_ids, places).to(total.dtype)
        return self.dropout(self.LayerNorm(total))

    def sums(self, input_ids: Tensor, places: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """(B, L, H) sum of fields and positions, without the cell summary, and the vectors (B, L, H) of each field."""
        vectors = [self.embed_field(item.name, input_ids[:, row]) for row, item in enumerate(self.input_fields)]
        total = vectors[0]
        for more in vectors[1:]:
            total = total + more
        if self.position_embeddings is not None and places is not None:
            total = total + self._kept(self.position_embeddings.weight.index_select(0, places), total, places)
        elif self.position_embeddings is not None:
            length, room = input_ids.shape[2], self.position_embeddings.num_embeddings
            if length > room:
                raise ValueError(f"the batch is {length} tokens long but model.max_position_embeddings is {room}")
            total = total + self._kept(self.position_embeddings.weight[:length], total, None)
        return total, vectors

    def _kept(self, positions: Tensor, total: Tensor, places: Tensor | None) -> Tensor:
        """Position embeddings (L, H), in training 0 for whole sequences: a model that must do without them at times learns no places by heart."""
        if not (self.training and self.position_dropout):
            return positions
        if places is None:
            kept = torch.rand(len(total), 1, 1, device=total.device)
        else:  # sequences one after the other, each from place 0
            number = torch.cumsum(places == 0, 0)
            kept = torch.rand(len(places) + 1, 1, device=total.device)[number]
        return positions * (kept >= self.position_dropout).to(positions.dtype)


def _embedding_name(field_name: str) -> str:
    return module_name(f"{field_name}_embeddings")
