"""How strongly a cell expresses each of its genes, read from the very tokens of the batch, and what is summed with that as weight."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bmfm_pipeline.errors import ConfigError
from bmfm_pipeline.models.configuration import MultitaskConfig


@dataclass(frozen=True)
class ExpressionRows:
    """Where genes and their values stand on the second axis of `input_ids`."""

    genes: int
    values: int
    vocabulary: int

    @classmethod
    def of(cls, config: MultitaskConfig, key: str) -> "ExpressionRows":
        """Of the field genes and the first continuous field. Raises ConfigError naming `key` when one is not there."""
        fields = config.input_fields
        genes = [row for row, item in enumerate(fields) if item.name == "genes" and not item.continuous]
        values = [row for row, item in enumerate(fields) if item.continuous]
        if not genes or not values:
            raise ConfigError(
                f"model.{key}: sums over genes by their value, so it needs the input field genes and a continuous input field, found "
                f"{', '.join(item.name for item in fields)}; give expressions tokenization_strategy=continuous_value_encoder, or set "
                f"model.{key}=false"
            )
        return cls(genes[0], values[0], fields[genes[0]].vocab_size)

    def weights(self, input_ids: Tensor, starts: Tensor | None = None) -> Tensor:
        """(B, F, L) -> (B, L) float32: values of length 1 in every cell; special tokens, which are negative, count as 0.

        With `starts` (cells,), the cells lie one after another in a stream, (1, F, T), and begin there.
        """
        values = input_ids[:, self.values].float().clamp(min=0)
        if starts is None:
            return values / values.square().sum(dim=1, keepdim=True).sqrt().clamp(min=1e-6)
        cells = cell_numbers(starts, values.shape[1])
        squares = torch.zeros(len(starts), device=values.device).index_add(0, cells, values[0].square())
        return values / squares.sqrt().clamp(min=1e-6).index_select(0, cells)


def cell_numbers(starts: Tensor, length: int) -> Tensor:
    """(T,): which cell each place of a stream belongs to, for cells that begin at `starts`, ascending from 0."""
    marks = torch.zeros(length, dtype=torch.int64, device=starts.device).index_fill(0, starts, 1)
    return marks.cumsum(0) - 1


class CellSummary(nn.Module):
    """The sum of a cell's gene vectors, each times its value, through a LayerNorm: what position 0 is given beside its own token.

    With gene vectors from a singular value decomposition this is the cell's place among its principal components.
    """

    def __init__(self, config: MultitaskConfig):
        super().__init__()
        self.rows = ExpressionRows.of(config, "cell_summary")
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, total: Tensor, vectors: Tensor, input_ids: Tensor, places: Tensor | None) -> Tensor:
        """`total` (B, L, H) with the summary added at position 0 of every cell; `vectors` (B, L, H) are those of the genes."""
        if places is None:
            summary = torch.bmm(self.rows.weights(input_ids).to(vectors.dtype).unsqueeze(1), vectors)[:, 0]
            starts = torch.zeros(1, dtype=torch.int64, device=total.device)
            return total.index_add(1, starts, self.LayerNorm(summary).to(total.dtype).unsqueeze(1))
        starts = torch.nonzero(places == 0).flatten()
        weighted = vectors[0] * self.rows.weights(input_ids, starts)[0].to(vectors.dtype).unsqueeze(-1)
        cells = cell_numbers(starts, len(places))
        summary = weighted.new_zeros(len(starts), weighted.shape[-1]).index_add(0, cells, weighted)
        return total.index_add(1, starts, self.LayerNorm(summary).to(total.dtype).unsqueeze(0))

    def parts(self, vectors: Tensor, input_ids: Tensor) -> Tensor:
        """(B, L, H) gene vectors and (B, F, L) tokens -> (B, L, H): what each position adds to the summary.

        They sum to the summary less the bias of its LayerNorm, which is the summary of a cell without expression: the norm's divisor is
        taken as it is for this cell, and what is left of the norm is linear.
        """
        weighted = self.rows.weights(input_ids).to(vectors.dtype).unsqueeze(-1) * vectors
        spread = weighted.sum(dim=1).var(dim=-1, unbiased=False) + self.LayerNorm.eps
        centred = weighted - weighted.mean(dim=-1, keepdim=True)
        return centred * spread.rsqrt()[:, None, None] * self.LayerNorm.weight


class GeneScores(nn.Embedding):
    """A linear classifier of the cell's expression: scores = sum over its genes of SCALE * size[gene] * value * weight[gene, class].

    The values of a cell have length 1. `sizes` (V,) are the root mean squares of the values by gene, measured before training: an
    optimiser that moves all weights alike, as Adam does, would learn from the many rare genes first, which say little about other
    cells. All weights start at zero: the path says nothing before it has learned something.
    """

    SCALE = 2000.0

    def __init__(self, rows: ExpressionRows, outputs: int, pad_token_id: int):
        super().__init__(rows.vocabulary, outputs, padding_idx=pad_token_id)
        self.rows = rows
        self.register_buffer("sizes", torch.full((rows.vocabulary,), rows.vocabulary**-0.5))

    def forward(self, input_ids: Tensor) -> Tensor:
        """(B, F, L) -> (B, outputs)"""
        genes = input_ids[:, self.rows.genes].to(torch.int64)
        weights = self.rows.weights(input_ids) * self.sizes[genes] * self.SCALE
        return nn.functional.embedding_bag(
            genes, self.weight, mode="sum", per_sample_weights=weights.to(self.weight.dtype)
        )

    def parts(self, input_ids: Tensor) -> Tensor:
        """(B, F, L) -> (B, L, outputs): what each position adds to the scores."""
        genes = input_ids[:, self.rows.genes].to(torch.int64)
        weights = self.rows.weights(input_ids) * self.sizes[genes] * self.SCALE
        return weights.to(self.weight.dtype).unsqueeze(-1) * self.weight[genes]

    @property
    def is_fresh(self) -> bool:
        """Whether nothing was learned yet."""
        return not bool(self.weight.any())

    @torch.no_grad()
    def measure(self, batches: Iterable[Tensor]) -> None:
        """Take the sizes from `input_ids` (B, F, L) of training cells; genes that none of them expresses get 0."""
        squares, cells = torch.zeros_like(self.sizes), 0
        for input_ids in batches:
            genes = input_ids[:, self.rows.genes].to(torch.int64).flatten()
            squares.index_add_(0, genes, self.rows.weights(input_ids).square().flatten())
            cells += len(input_ids)
        self.sizes.copy_((squares / max(cells, 1)).sqrt())
