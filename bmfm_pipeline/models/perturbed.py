"""What was done to a cell, told to every position at once: the sum of vectors of the perturbed genes."""

import torch
from torch import Tensor, nn

from bmfm_pipeline.errors import ConfigError
from bmfm_pipeline.models.configuration import MultitaskConfig
from bmfm_pipeline.models.expressed import cell_numbers

FLAGS = "perturbations"


class PerturbationVectors(nn.Embedding):
    """A vector for each gene that may be perturbed, added up over the perturbed genes of a cell and given to all of its positions.

    Attention alone would have to find one flagged position among hundreds. Vectors start at zero and are learned for genes that
    training perturbs; so a gene that it does not perturb changes nothing, and two genes together begin as the sum of both.
    """

    def __init__(self, config: MultitaskConfig):
        rows = {item.name: (row, item) for row, item in enumerate(config.input_fields)}
        if "genes" not in rows or FLAGS not in rows or rows[FLAGS][1].continuous:
            raise ConfigError(
                f"model.perturbation_vectors: needs the input fields genes and {FLAGS}, the latter as tokens; found {', '.join(rows)}; "
                "set model.perturbation_vectors=false"
            )
        super().__init__(rows["genes"][1].vocab_size, config.hidden_size)
        self.genes, self.flags = rows["genes"][0], rows[FLAGS][0]
        self.not_perturbed = rows[FLAGS][1].num_special_tokens  # the token of 0; that of 1 follows

    def forward(self, input_ids: Tensor, places: Tensor | None) -> Tensor:
        """(B, F, L) -> (B, 1, H), or (1, T, H) for cells one after another (places given): what each position is given."""
        flagged = input_ids[:, self.flags] > self.not_perturbed
        vectors = super().forward(input_ids[:, self.genes].to(torch.int64)) * flagged.unsqueeze(-1)
        if places is None:
            return vectors.sum(dim=1, keepdim=True)
        starts = torch.nonzero(places == 0).flatten()
        cells = cell_numbers(starts, len(places))
        sums = vectors.new_zeros(len(starts), vectors.shape[-1]).index_add(0, cells, vectors[0])
        return sums.index_select(0, cells).unsqueeze(0)
