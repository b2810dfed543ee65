"""What a batch is made of: the fields, and how cells are ordered, cut, padded and masked. Checked before any cell is read."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bmfm_pipeline.errors import ConfigError

STRATEGIES = ("language_modeling", "sequence_classification", "multitask")
ORDERS = (None, "random", "sorted")
PADDINGS = ("max_length", "longest", True, False)


@dataclass(frozen=True)
class FieldSpec:
    """One field of the batch.

    `column_ids` (genes) is the token id of each gene column, 0 where unknown; `value_ids` (tokenised values) the token id of each
    whole value 0, 1, 2, ... Continuous values need neither. `layer` names the matrix of the store that values come from (None: X;
    "counts": `store.counts`). A field `label_<field>` that is no input gives the labels of the masked field `<field>`.
    `never_switch` are ids that switching may not draw beside the special ones, such as [S] and [T].
    """

    name: str
    role: str  # "genes" or "values"
    tokenized: bool = True
    is_masked: bool = False
    is_input: bool = True
    vocab_size: int = 0
    num_special_tokens: int = 5
    column_ids: np.ndarray | None = None
    value_ids: np.ndarray | None = None
    layer: str | None = None
    never_switch: tuple[int, ...] = ()


@dataclass(frozen=True)
class BatchingConfig:
    """How cells become a batch. Lengths in tokens, special ones included; ratios in 0..1.

    `padding`: "max_length", "longest" (also True), or False: no rounding up to `pad_to_multiple_of`, cells still padded to the
    longest of the batch. `max_mfi_data_len` cuts the genes of a cell before special tokens are added. `limit_genes=None` keeps
    genes without a token, as [UNK]. `prefix_ids` stand before the genes ([CLS] alone by default). `log_normalize_transform`:
    x -> ln(1 + 10000 x / (sum(x) + 1)), the sum over the genes kept by `max_mfi_data_len`.
    """

    collation_strategy: str = "multitask"
    mlm: bool = True
    max_length: int = 512
    max_mfi_data_len: int | None = None
    padding: str | bool = "max_length"
    truncation: bool = True
    pad_to_multiple_of: int | None = 16
    sequence_order: str | None = None
    change_ratio: float = 0.15
    mask_ratio: float = 1.0
    switch_ratio: float = 0.0
    comask_across_fields: bool = False
    prevent_attention_to_masked: bool = False
    seed: int = 1234
    limit_genes: str | None = "tokenizer"
    prefix_ids: tuple[int, ...] = (3,)
    log_normalize_transform: bool = False

    @property
    def masks(self) -> bool:
        """Whether masked fields are masked and labelled."""
        return self.mlm and self.collation_strategy != "sequence_classification"

    @property
    def with_label_columns(self) -> bool:
        """Whether batches carry the labels of label columns."""
        return self.collation_strategy != "language_modeling"


def check_settings(config: BatchingConfig, fields: Sequence[FieldSpec]) -> None:
    """Raise ConfigError, naming the key and a value that would do, where settings or fields cannot make a batch."""
    _check_lengths(config)
    _one_of("collation_strategy", config.collation_strategy, STRATEGIES)
    _one_of("sequence_order", config.sequence_order, ORDERS)
    _one_of("limit_genes", config.limit_genes, ("tokenizer", None))
    for key in ("change_ratio", "mask_ratio", "switch_ratio"):
        if not 0 <= getattr(config, key) <= 1:
            raise ConfigError(f"{key} must lie in 0..1, found {getattr(config, key)!r}")
    if config.mask_ratio + config.switch_ratio > 1 + 1e-9:
        raise ConfigError(
            f"mask_ratio {config.mask_ratio:g} + switch_ratio {config.switch_ratio:g} must not exceed 1; lower one of them"
        )
    _check_fields(config, fields)


def _one_of(key: str, value, known: Sequence) -> None:
    if not any(value is entry or (isinstance(value, str) and value == entry) for entry in known):
        raise ConfigError(f"{key} must be one of {', '.join(str(entry) for entry in known)}; found {value!r}")


def _check_lengths(config: BatchingConfig) -> None:
    _one_of("padding", config.padding, PADDINGS)
    if config.max_length < len(config.prefix_ids) + 2:
        raise ConfigError(f"max_length {config.max_length} leaves no room for a gene between [CLS] and [SEP]")
    if config.max_mfi_data_len is not None and config.max_mfi_data_len < 1:
        raise ConfigError(f"max_mfi_data_len must be at least 1 or null, found {config.max_mfi_data_len}")
    multiple = config.pad_to_multiple_of
    if multiple and config.truncation and config.padding is not False and config.max_length % multiple:
        lower = config.max_length // multiple * multiple
        near = f"{lower} or {lower + multiple}" if lower else str(multiple)
        raise ConfigError(
            f"max_length {config.max_length} is not a multiple of pad_to_multiple_of {multiple}; use max_length {near}"
        )


def _check_fields(config: BatchingConfig, fields: Sequence[FieldSpec]) -> None:
    inputs = [field for field in fields if field.is_input]
    if not any(field.role == "genes" and field.column_ids is not None for field in inputs):
        raise ConfigError(
            "fields: an input field of genes with column_ids is needed to choose which genes enter a batch"
        )
    for field in fields:
        _one_of(f"fields.{field.name}: role", field.role, ("genes", "values"))
        if field.role == "genes" and (not field.tokenized or field.column_ids is None):
            raise ConfigError(f"fields.{field.name}: genes are tokens and need column_ids")
        if field.role == "values" and field.tokenized and field.value_ids is None:
            raise ConfigError(f"fields.{field.name}: tokenised values need value_ids, the token id of each whole value")
        switchable = field.vocab_size - field.num_special_tokens - len(set(field.never_switch))
        if config.masks and config.switch_ratio > 0 and field.is_masked and field.tokenized and switchable < 1:
            raise ConfigError(
                f"fields.{field.name}: switch_ratio > 0 needs a vocabulary beyond the special tokens; vocab_size is {field.vocab_size}"
            )
    masked = [field.name for field in inputs if field.is_masked]
    if not config.masks:
        return
    if config.switch_ratio > 0 and config.comask_across_fields:
        raise ConfigError(
            "switch_ratio > 0 cannot be combined with comask_across_fields=true; set one of them to its default"
        )
    if config.prevent_attention_to_masked and len(masked) > 1 and not config.comask_across_fields:
        raise ConfigError(
            f"prevent_attention_to_masked with several masked fields ({', '.join(masked)}) needs comask_across_fields=true"
        )


def gene_mask_weights(names: Sequence[str], patterns: Sequence[tuple[str, float]]) -> np.ndarray:
    """Relative masking rate of each gene, float32 (genes,): the product of the weights of all patterns that match its start.

    A rate of 0 keeps a gene from ever being masked, e.g. ("^RP", 0.0).
    """
    weights = np.ones(len(names), dtype=np.float32)
    for pattern, weight in patterns:
        if weight < 0:
            raise ConfigError(f"masking weight of pattern {pattern!r} must not be negative, found {weight}")
        expression = re.compile(pattern)
        weights[[expression.match(name) is not None for name in names]] *= weight
    return weights
