"""What the encoder's states are turned into: scores per position for fields, scores per cell for label columns."""

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from bmfm_pipeline.models.backbone import MultitaskOutput
from bmfm_pipeline.models.configuration import MultitaskConfig
from bmfm_pipeline.models.dropout import Dropout
from bmfm_pipeline.models.embeddings import FieldEmbeddings
from bmfm_pipeline.models.expressed import ExpressionRows, GeneScores
from bmfm_pipeline.models.schema import MVC_STYLES, ModelField, ModelLabel, module_name
from bmfm_pipeline.models.words import WordScores


class _Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states: Tensor, coefficient: float) -> Tensor:
        ctx.coefficient = coefficient
        return states.view_as(states)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return -ctx.coefficient * gradient, None


class GradientReversal(nn.Module):
    """Identity forward; backward the gradient times -coefficient, so that the encoder unlearns what the head predicts.

    Ganin et al. 2016, Domain-Adversarial Training of Neural Networks.
    """

    def __init__(self, coefficient: float):
        super().__init__()
        self.coefficient = float(coefficient)

    def forward(self, states: Tensor) -> Tensor:
        return _Reversal.apply(states, self.coefficient)


class HeadTransform(nn.Module):
    """Linear(H, H), activation, LayerNorm: shared by the heads of all fields."""

    def __init__(self, config: MultitaskConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, states: Tensor) -> Tensor:
        return self.LayerNorm(self.activation(self.dense(states)))


class GeneQueryDecoder(nn.Module):
    """Value of a gene from the cell's vector and a query made of the gene's embedding, q = sigmoid(Linear(e)).

    The masked value prediction for cell modelling of scGPT (Cui et al. 2024) in its three forms: `inner product` <W q, cell>, and a
    perceptron of one hidden layer on the two side by side (`concat query`) or on their sum (`sum query`).
    """

    def __init__(self, hidden_size: int, query_field: str, arch_style: str = "inner product"):
        super().__init__()
        self.query_field, self.arch_style = query_field, arch_style
        narrow = 64
        self.gene_to_query = nn.Linear(hidden_size, narrow if arch_style == "concat query" else hidden_size)
        self.hidden_activation_fn = nn.PReLU()
        if arch_style == "inner product":
            self.projection_matrix = nn.Linear(hidden_size, hidden_size, bias=False)
            # Part of the published weights of this form, which does not apply it.
            self.hidden_activation_fn.weight.requires_grad_(False)
        else:
            self.fc1 = nn.Linear(hidden_size + (narrow if arch_style == "concat query" else 0), narrow)
            self.fc2 = nn.Linear(narrow, 1)

    def forward(self, gene_embeddings: Tensor, cell: Tensor) -> Tensor:
        """(..., H) gene embeddings and (..., H) cell vectors that broadcast -> (..., 1)"""
        query = torch.sigmoid(self.gene_to_query(gene_embeddings))
        if self.arch_style == "inner product":
            return (self.projection_matrix(query) * cell).sum(dim=-1, keepdim=True)
        if self.arch_style == "concat query":
            both = torch.cat([cell.expand(*query.shape[:-1], -1), query], dim=-1)
        else:
            both = cell + query
        return self.fc2(self.hidden_activation_fn(self.fc1(both)))


class _FieldDecoders(nn.Module):
    def __init__(self, config: MultitaskConfig):
        super().__init__()
        self.field_decoders = nn.ModuleDict()
        sizes = {item.name: item.vocab_size for item in config.model_fields}
        for item in config.model_fields:
            for mode, options in item.decode_modes.items():
                self.field_decoders[module_name(f"{item.name}_{mode}")] = _decoder(
                    item, mode, options, sizes, config.hidden_size
                )


def _decoder(item: ModelField, mode: str, options: dict, sizes: dict[str, int | None], hidden_size: int) -> nn.Module:
    if mode == "token_scores":
        return nn.Linear(hidden_size, item.vocab_size)
    if mode == "wced":
        return nn.Linear(hidden_size, sizes[options["vocab_field"]] * max(1, len(options.get("logit_outputs") or [])))
    if mode.startswith("mvc_"):
        style = options.get("arch_style", MVC_STYLES[0])
        return GeneQueryDecoder(hidden_size, options.get("query_field", item.name), style)
    return nn.Linear(hidden_size, 1)


class FieldHeads(nn.Module):
    """All heads of all fields behind one shared transform.

    Heads score every position, or only the flat positions (indices into B * L) asked for: with a vocabulary of tens of thousands
    of genes the scores of unmasked positions would dominate memory and time. The whole-cell head (`wced`) scores position 0 only.
    """

    def __init__(self, config: MultitaskConfig):
        super().__init__()
        self.transform = HeadTransform(config)
        self.decoder = _FieldDecoders(config)
        self.fields = [item for item in config.model_fields if item.decode_modes]
        self._vocabulary = {item.name: item.vocab_size for item in config.model_fields}

    def head(self, key: str) -> nn.Module:
        return self.decoder.field_decoders[module_name(key)]

    def forward(
        self,
        hidden: Tensor,
        cell: Tensor,
        input_ids: Tensor | None,
        embeddings: FieldEmbeddings,
        positions: dict[str, Tensor] | None,
    ) -> dict[str, Tensor]:
        """Scores by `{field}_{mode}`: (B, L, n), or (n positions, n) where `positions` names the field; fields it leaves out are skipped.

        `wced` is (B, 1, V, outputs), or (B, 1, V) for one output, whatever `positions` says.
        """
        scores: dict[str, Tensor] = {}
        everywhere: Tensor | None = None
        for item in self.fields:
            per_position = [mode for mode in item.decode_modes if mode != "wced"]
            picked = None if positions is None else positions.get(item.name)
            wanted = per_position and (positions is None or picked is not None)
            if wanted and any(not mode.startswith("mvc_") for mode in per_position):
                if picked is not None:
                    states = self.transform(hidden.reshape(-1, hidden.shape[-1]).index_select(0, picked))
                else:
                    everywhere = self.transform(hidden) if everywhere is None else everywhere
                    states = everywhere
            for mode in item.decode_modes:
                key = f"{item.name}_{mode}"
                if mode == "wced":
                    scores[key] = self._whole_cell(item, self.transform(hidden[:, :1]))
                elif not wanted:
                    continue
                elif mode.startswith("mvc_"):
                    scores[key] = self._gene_query(self.head(key), cell, input_ids, embeddings, picked)
                else:
                    scores[key] = self.head(key)(states)
        return scores

    def _whole_cell(self, item: ModelField, state: Tensor) -> Tensor:
        flat = self.head(f"{item.name}_wced")(state)
        options = item.decode_modes["wced"]
        outputs = max(1, len(options.get("logit_outputs") or []))
        if outputs == 1:
            return flat
        return flat.reshape(*flat.shape[:-1], self._vocabulary[options["vocab_field"]], outputs)

    @staticmethod
    def _gene_query(
        head: GeneQueryDecoder,
        cell: Tensor,
        input_ids: Tensor | None,
        embeddings: FieldEmbeddings,
        picked: Tensor | None,
    ) -> Tensor:
        if input_ids is None:
            raise ValueError(
                "the gene-query heads (mvc) look up gene embeddings, so they need input_ids, not inputs_embeds"
            )
        values = input_ids[:, embeddings.field_row(head.query_field)]
        if picked is None:
            return head(embeddings.embed_field(head.query_field, values), cell.unsqueeze(1))
        genes = embeddings.embed_field(head.query_field, values.reshape(-1).index_select(0, picked))
        return head(genes, cell.index_select(0, torch.div(picked, values.shape[1], rounding_mode="floor")))


# Behind the name of a label column: the scores of its paths, from which each of them learns by itself.
PATHS = "%paths"


class _LabelDecoder(nn.Module):
    """`decoder` is a single Linear in the plain case; reversal in front and a second layer make it a Sequential."""

    def __init__(self, label: ModelLabel, config: MultitaskConfig, dropout: float):
        super().__init__()
        layers: list[nn.Module] = []
        if label.gradient_reversal_coefficient is not None:
            layers.append(GradientReversal(label.gradient_reversal_coefficient))
        if label.classifier_depth == 2:
            layers += [
                nn.Linear(config.hidden_size, config.hidden_size),
                ACT2FN[config.hidden_act],
                Dropout(dropout),
            ]
        layers.append(nn.Linear(config.hidden_size, label.output_size))
        self.decoder = layers[0] if len(layers) == 1 else nn.Sequential(*layers)
        self.mean, self.scale, self.share = label.value_mean, label.value_scale, label.encoder_share
        self.linear_path: GeneScores | WordScores | None = None
        # What the encoder is to unlearn must not come in beside it.
        if config.linear_path and label.gradient_reversal_coefficient is None:
            self.linear_path = _linear_path(config, label.output_size)

    def forward(self, states: Tensor, input_ids: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The scores, and those of each path (2, B, outputs), encoder first; None where there is one path."""
        scores = self._in_units(self.decoder(states))
        if self.linear_path is None:
            return scores, None
        if input_ids is None:
            raise ValueError("model.linear_path reads the tokens themselves, so it needs input_ids, not inputs_embeds")
        paths = torch.stack([scores, self._in_units(self.linear_path(input_ids).to(scores.dtype))])
        return paths.mean(dim=0) if self.share == 0.5 else torch.lerp(paths[1], paths[0], self.share), paths

    def _in_units(self, found: Tensor) -> Tensor:
        """Deviations from the mean as numbers of the column; large numbers are not told apart in half precision."""
        return found if (self.mean, self.scale) == (0.0, 1.0) else found.float() * self.scale + self.mean


def _linear_path(config: MultitaskConfig, outputs: int) -> GeneScores | WordScores:
    """Of the values of genes, or of the words of a sequence where tokens are all that there is."""
    if len(config.input_fields) == 1 and not config.input_fields[0].continuous:
        return WordScores.of(config, outputs)
    return GeneScores(ExpressionRows.of(config, "linear_path"), outputs, config.pad_token_id)


class LabelHeads(nn.Module):
    """One head per label column; columns of one `task_group` share a Linear(H, H), dropout and activation in front of theirs."""

    def __init__(self, config: MultitaskConfig, dropout: float):
        super().__init__()
        self.keep_paths = False
        self.labels = config.model_labels
        self.label_decoders = nn.ModuleDict(
            {module_name(x.name): _LabelDecoder(x, config, dropout) for x in self.labels}
        )
        groups = dict.fromkeys(x.task_group for x in self.labels if x.task_group)
        if groups:
            self.task_groups = nn.ModuleDict(
                {
                    module_name(group): nn.Sequential(
                        nn.Linear(config.hidden_size, config.hidden_size),
                        Dropout(dropout),
                        ACT2FN[config.hidden_act],
                    )
                    for group in groups
                }
            )

    @staticmethod
    def paths_key(label: str) -> str:
        """Where the scores of a column's paths stand among the outputs, the encoder's first."""
        return label + PATHS

    def forward(self, pooled: Tensor, hidden: Tensor, input_ids: Tensor | None = None) -> dict[str, Tensor]:
        """(B, H) pooled state and (B, L, H) states -> {label: (B, classes)}; `input_ids` (B, F, L) for linear paths.

        In training and with `keep_paths`, a column whose scores are put together of two paths also has these, (2, B, classes).
        """
        scores: dict[str, Tensor] = {}
        shared: dict[tuple[str, int | None], Tensor] = {}
        for label in self.labels:
            state = self.state_of(label, pooled, hidden, shared)
            scores[label.name], paths = self.label_decoders[module_name(label.name)](state, input_ids)
            if paths is not None and (self.training or self.keep_paths):
                scores[self.paths_key(label.name)] = paths
        return scores

    def state_of(
        self, label: ModelLabel, pooled: Tensor, hidden: Tensor, shared: dict[tuple[str, int | None], Tensor]
    ) -> Tensor:
        """(B, H), what the decoder of a label column reads; `shared` keeps the states of task groups."""
        if label.decode_from is not None and label.decode_from >= hidden.shape[1]:
            raise ValueError(
                f"label column {label.name} decodes from position {label.decode_from}; the batch is {hidden.shape[1]} tokens long"
            )
        state = pooled if label.decode_from is None else hidden[:, label.decode_from]
        if not label.task_group:
            return state
        slot = (label.task_group, label.decode_from)
        if slot not in shared:
            shared[slot] = self.task_groups[module_name(label.task_group)](state)
        return shared[slot]


class _Predictions(nn.Module):
    """A level of nesting that the published parameter names have."""

    def __init__(self, predictions: nn.Module):
        super().__init__()
        self.predictions = predictions


class Heads(nn.Module):
    """`cls`: field heads under `predictions`, label heads under `label_predictions`, each there only when there are any."""

    def __init__(self, config: MultitaskConfig):
        super().__init__()
        rate = config.classifier_dropout if config.classifier_dropout is not None else config.hidden_dropout_prob
        self.dropout = Dropout(rate)
        self.predictions = (
            _Predictions(FieldHeads(config)) if any(x.decode_modes for x in config.model_fields) else None
        )
        self.label_predictions = _Predictions(LabelHeads(config, rate)) if config.model_labels else None

    def forward(
        self,
        state: MultitaskOutput,
        input_ids: Tensor | None,
        embeddings: FieldEmbeddings,
        positions: dict[str, Tensor] | None,
    ) -> dict[str, Tensor]:
        """Scores by head, the fields' first."""
        hidden = state.head_states
        scores: dict[str, Tensor] = {}
        if self.predictions is not None:
            scores |= self.predictions.predictions(hidden, state.embeddings, input_ids, embeddings, positions)
        if self.label_predictions is not None:
            scores |= self.label_predictions.predictions(self.dropout(state.embeddings), hidden, input_ids)
        return scores
