"""From a cell without its genes to the cell as it is: the line that gradients are integrated along, for any backbone.

The line begins behind the LayerNorm of the embeddings. In front of it nothing would be learned: the norm makes vectors of one length, so
that a cell is the same at every point of a line that starts at zero, and all of the change happens at the start, where no step falls.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bmfm_pipeline.errors import ConfigError
from bmfm_pipeline.models.heads import GradientReversal
from bmfm_pipeline.models.packing import Packing
from bmfm_pipeline.models.schema import ModelField, module_name

BASELINES = ("pad", "zero")


def naming_row(fields: Sequence[ModelField]) -> int:
    """Which row of `input_ids` names positions: that of genes, else of the first field of tokens."""
    tokens = [row for row, item in enumerate(fields) if not item.continuous]
    if not tokens:
        raise ConfigError("fields: attributions need a field of tokens that names each position, such as genes")
    return next((row for row in tokens if fields[row].name == "genes"), tokens[0])


@dataclass(frozen=True)
class Baseline:
    """What stands in place of a cell's genes.

    `pad`: every field holds its padding token, which says nothing; a continuous field -(pad + 1), its code for it. `zero`: genes stay, and
    every other field holds the value zero: measured, and not expressed. `zero_ids` are the tokens of value zero, by tokenised field.
    `keep`: ids, in the field that names positions, of tokens that belong to no gene and stay.
    """

    kind: str
    keep: tuple[int, ...]
    pad_token_id: int
    zero_ids: Mapping[str, int]

    def genes(self, input_ids: Tensor, fields: Sequence[ModelField]) -> Tensor:
        """(B, F, L) -> (B, L), True where a position is a gene and not a special token."""
        names = input_ids[:, naming_row(fields)].to(torch.int64)
        return ~torch.isin(names, torch.tensor(self.keep, device=names.device))

    def of(self, input_ids: Tensor, fields: Sequence[ModelField]) -> Tensor:
        """The baseline of a batch, of the same shape (B, F, L). Raises ConfigError where a field has no value zero."""
        genes, own = self.genes(input_ids, fields), input_ids.clone()
        for row, item in enumerate(fields):
            if self.kind == "pad":
                value = -(self.pad_token_id + 1.0) if item.continuous else self.pad_token_id
            elif row == naming_row(fields):
                continue
            elif item.continuous:
                value = 0.0
            elif item.name in self.zero_ids:
                value = self.zero_ids[item.name]
            else:
                raise ConfigError(
                    f"task.baseline: zero: the vocabulary of the field {item.name} has no value 0; use task.baseline=pad"
                )
            own[:, row] = torch.where(genes, torch.full_like(own[:, row], value), own[:, row])
        return own


@dataclass
class Ends:
    """Both ends of the line for a batch, and what the scores between them need besides.

    `inputs` and `baselines` are states (B, L, H), and the cell summary (B, H) where the model has one. `difference` (B, L, H) and `parts`
    (B, L, H) share what is found among positions: parts of the summary sum to its difference. `first` (B, H) is position 0 before
    the summary is added; `mask` (B, L).
    """

    inputs: tuple[Tensor, ...]
    baselines: tuple[Tensor, ...]
    mask: Tensor
    difference: Tensor
    first: Tensor | None
    parts: Tensor | None

    def extras(self, targets: Tensor) -> tuple:
        """Arguments of LabelScores.between behind the inputs."""
        return (self.mask, targets, self.difference, self.first, self.parts)


class LabelScores(nn.Module):
    """The scores of some label columns side by side, as a function of a point on the line."""

    def __init__(self, model: nn.Module, labels: Sequence[str]):
        super().__init__()
        self.model = model
        self.heads = model.cls.label_predictions.predictions
        self.labels = [label for label in self.heads.labels if label.name in labels]
        self.fields = model.config.input_fields
        self.legacy = getattr(model.config, "legacy_attention", False)

    @property
    def starts(self) -> dict[str, int]:
        """At which output each label column begins."""
        starts, place = {}, 0
        for label in self.labels:
            starts[label.name] = place
            place += label.output_size
        return starts

    def ends(self, input_ids: Tensor, attention_mask: Tensor, baseline: Baseline) -> Ends:
        """The line from the baseline to the cells."""
        embeddings = self.model.backbone.embeddings
        summary = embeddings.cell_summary
        ids = (input_ids, baseline.of(input_ids, self.fields))
        with torch.no_grad():
            sums = [embeddings.sums(one) for one in ids]
            last, first = (embeddings.LayerNorm(total) for total, _ in sums)
            difference = last - first
            if summary is None:
                return Ends((last,), (first,), attention_mask, difference, None, None)
            difference[:, 0] = 0.0  # what position 0 changes by is the summary, an input of its own
            parts = summary.parts(sums[0][1][summary.rows.genes], input_ids)
            bias = summary.LayerNorm.bias.expand(len(input_ids), -1)
            inputs, baselines = (last, bias + parts.sum(dim=1)), (first, bias.contiguous())
            return Ends(inputs, baselines, attention_mask, difference, sums[0][0][:, 0], parts)

    def between(self, states: Tensor, *rest) -> Tensor:
        """(N, L, H) states, then the summary (N, H) of models that have one, then `Ends.extras` -> (N, K) scores of the targets.

        What the encoder says only; where there is a linear path it is half of the score, see `linear_parts`.
        """
        summary, rest = (None, rest) if len(rest) == 5 else (rest[0], rest[1:])
        mask, targets, _, first, _ = rest
        if summary is not None:
            lead = self.model.backbone.embeddings.LayerNorm(first + summary)
            states = torch.cat([lead.unsqueeze(1), states[:, 1:]], dim=1)
        return self._of_encoder(states, mask).gather(1, targets)

    def _of_encoder(self, states: Tensor, mask: Tensor) -> Tensor:
        packing = None
        if self.model.backbone.packs and not self.legacy:
            mask, packing = Packing.of(mask)
        first_only = not self.legacy and not any(label.decode_from for label in self.labels)
        state = self.model.backbone(None, mask, inputs_embeds=states, packing=packing, first_only=first_only)
        shared: dict = {}
        scores = []
        for label in self.labels:
            decoder = self.heads.label_decoders[module_name(label.name)]
            found = (
                decoder.decoder(self.heads.state_of(label, state.embeddings, state.head_states, shared)) * decoder.scale
            )
            scores.append(found if decoder.linear_path is None else found * decoder.share)
        return torch.cat(scores, dim=1)

    @torch.no_grad()
    def linear_parts(self, input_ids: Tensor) -> Tensor | None:
        """(B, L, outputs): what each position adds to the scores beside the encoder; None where no column has a linear path.

        The path is linear in the values, so this is exact, and it says nothing of a cell whose values are all zero.
        """
        decoders = [self.heads.label_decoders[module_name(label.name)] for label in self.labels]
        if all(decoder.linear_path is None for decoder in decoders):
            return None
        parts = []
        for label, decoder in zip(self.labels, decoders, strict=True):
            if decoder.linear_path is None:
                parts.append(
                    torch.zeros(len(input_ids), input_ids.shape[2], label.output_size, device=input_ids.device)
                )
            else:
                parts.append(decoder.linear_path.parts(input_ids) * decoder.scale * (1 - decoder.share))
        return torch.cat(parts, dim=2)


@contextmanager
def plain_gradients(model: nn.Module) -> Iterator[None]:
    """Within, gradients are those of the scores: of inputs only, and not reversed by heads that train the encoder to unlearn."""
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    reversed_by = {module: module.coefficient for module in model.modules() if isinstance(module, GradientReversal)}
    model.requires_grad_(False)
    for module in reversed_by:
        module.coefficient = -1.0
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(wanted[name])
        for module, coefficient in reversed_by.items():
            module.coefficient = coefficient
