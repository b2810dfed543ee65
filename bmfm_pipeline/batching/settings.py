"""What a batch is made of: the fields, and how cells are ordered, cut, padded and masked. Checked before any cell is read."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bmfm_pipeline.errors import ConfigError

STRATEGIES = ("language_modeling", "sequence_classification", "multitask", "sequence_labeling")
ORDERS = (None, "random", "sorted", "chromosomal")
PADDINGS = ("max_length", "longest", True, False)
DEPTHS = ("downsample", "poisson_downsample", "equal")
LABEL_SETS = ("input", "non_input", "all")


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
    signed: bool = False  # continuous label fields whose values may be negative


@dataclass(frozen=True)
class ZeroExposure:
    """Which of a cell's unexpressed genes stand beside the expressed ones.

    `strategy`: "batch_wise" shows first the zeros of genes that another cell of the batch expresses, then others (in training;
    elsewhere any, so that a cell does not depend on its neighbours); "random" any zeros.
    `interleave_zero_ratio` is the share of expressed genes where they take turns with zeros, in cycles of `granularity` genes
    (batch_wise only); None puts all expressed genes first. With probability `expressed_sample_ratio` a cell is shown without zeros.
    """

    strategy: str = "batch_wise"
    interleave_zero_ratio: float | None = None
    expressed_sample_ratio: float = 0.0
    granularity: int = 10

    @property
    def cycle(self) -> tuple[int, int]:
        """How many expressed genes and how many zeros take turns; (0, 0): expressed genes first."""
        share = self.interleave_zero_ratio
        if share is None or share >= 1:
            return 0, 0
        if share <= 0:
            return 0, 1
        return max(1, int(share * self.granularity)), max(1, int((1 - share) * self.granularity))


@dataclass(frozen=True)
class BatchingConfig:
    """How cells become a batch. Lengths in tokens, special ones included; ratios in 0..1.

    `padding`: "max_length", "longest" (also True), or False: no rounding up to `pad_to_multiple_of`, cells still padded to the
    longest of the batch. `max_mfi_data_len` cuts the genes of a cell before special tokens are added. `limit_genes=None` keeps
    genes without a token, as [UNK]. `prefix_ids` stand before the genes ([CLS] alone by default). `log_normalize_transform`:
    x -> ln(1 + log_normalize_sum x / (sum(x) + 1)), the sum over the genes kept by `max_mfi_data_len`. `sqrt_normalize_transform`:
    x -> sqrt(log_normalize_sum x / sum(x)), which gives counts about the same variance whatever their mean.

    `values_from` names the matrix of the store that cells are read from (None: X). `sequence_dropout_factor`: a share in [0, 1) drops
    genes independently, a whole number one block of as many. `selective_dropout` is the share f of genes dropped by weight: with
    r = weight / mean weight, a gene goes with probability f r / (1 + f (r - 1)). Both apply in training only. `expose_zeros` shows
    unexpressed genes too, as `zeros` says or all of them in the order of the columns.
    `rda_transform`: a read-depth mode of `DEPTHS`, or the number of reads asked for; `depth_ids` are the ids of [S] and [T].
    Modes that reduce cells do so in training and wherever fields are masked; elsewhere all reads are shown.
    `wced_targets` names the label sets of whole-cell targets, which take the place of masking; `wced_normalize` puts them on the scale
    of the model's input. `weigh_evaluation`: whether masking weights hold in evaluation too.
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
    log_normalize_sum: float = 10000.0
    sqrt_normalize_transform: bool = False
    values_from: str | None = None
    sequence_dropout_factor: float | int | None = None
    selective_dropout: float = 0.0
    expose_zeros: bool = False
    zeros: ZeroExposure | None = None
    rda_transform: str | int | None = None
    depth_ids: tuple[int, int] | None = None
    wced_targets: tuple[str, ...] = ()
    wced_normalize: bool = True
    weigh_evaluation: bool = True

    @property
    def masks(self) -> bool:
        """Whether masked fields are masked and labelled."""
        return self.mlm and self.collation_strategy in ("language_modeling", "multitask") and not self.wced_targets

    @property
    def lead(self) -> int:
        """How many entries stand before a cell's genes to tell its read depth."""
        return 0 if self.rda_transform is None else 2

    @property
    def with_label_columns(self) -> bool:
        """Whether batches carry the labels of label columns."""
        return self.collation_strategy in ("sequence_classification", "multitask")


def check_settings(config: BatchingConfig, fields: Sequence[FieldSpec]) -> None:
    """Raise ConfigError, naming the key and a value that would do, where settings or fields cannot make a batch."""
    check_lengths(config)
    _one_of("collation_strategy", config.collation_strategy, STRATEGIES)
    _one_of("sequence_order", config.sequence_order, ORDERS)
    _one_of("limit_genes", config.limit_genes, ("tokenizer", None))
    _check_reshaping(config)
    for key in ("change_ratio", "mask_ratio", "switch_ratio", "selective_dropout"):
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


def check_lengths(config: BatchingConfig) -> None:
    """Raise ConfigError where padding and lengths do not go together."""
    _one_of("padding", config.padding, PADDINGS)
    if config.max_length < len(config.prefix_ids) + config.lead + 2:
        raise ConfigError(f"max_length {config.max_length} leaves no room for a gene between [CLS] and [SEP]")
    least = 1 + config.lead
    if config.max_mfi_data_len is not None and config.max_mfi_data_len < least:
        raise ConfigError(f"max_mfi_data_len must be at least {least} or null, found {config.max_mfi_data_len}")
    multiple = config.pad_to_multiple_of
    if multiple and config.truncation and config.padding is not False and config.max_length % multiple:
        lower = config.max_length // multiple * multiple
        near = f"{lower} or {lower + multiple}" if lower else str(multiple)
        raise ConfigError(
            f"max_length {config.max_length} is not a multiple of pad_to_multiple_of {multiple}; use max_length {near}"
        )


def _check_reshaping(config: BatchingConfig) -> None:
    drop = config.sequence_dropout_factor
    if drop is not None and (isinstance(drop, bool) or drop < 0 or (isinstance(drop, float) and drop >= 1)):
        raise ConfigError(
            f"sequence_dropout_factor must be a share below 1, or a whole number of genes in one block; found {drop!r}"
        )
    if config.zeros is not None:
        zeros = config.zeros
        _one_of("pad_zero_expression_strategy.strategy", zeros.strategy, ("batch_wise", "random"))
        if not config.expose_zeros:
            raise ConfigError("pad_zero_expression_strategy has no zeros to show: set dataset_kwargs.expose_zeros=all")
        for key in ("interleave_zero_ratio", "expressed_sample_ratio"):
            if not 0 <= (getattr(zeros, key) or 0) <= 1:
                raise ConfigError(f"pad_zero_expression_strategy.{key} must lie in 0..1, found {getattr(zeros, key)!r}")
        if zeros.granularity < 1:
            raise ConfigError(f"pad_zero_expression_strategy.granularity must be at least 1, found {zeros.granularity}")
    depth = config.rda_transform
    if config.sqrt_normalize_transform and (config.log_normalize_transform or depth is not None):
        raise ConfigError(
            "sqrt_normalize_transform is one way to normalise, log_normalize_transform and rda_transform are others: keep one"
        )
    if depth is not None:
        if isinstance(depth, str):
            _one_of("rda_transform", depth, DEPTHS)
        elif isinstance(depth, bool) or depth < 1:
            raise ConfigError(f"rda_transform must be one of {', '.join(DEPTHS)} or a number of reads, found {depth!r}")
        if config.depth_ids is None:
            raise ConfigError("rda_transform needs the tokens [S] and [T]: give depth_ids, their ids")
        if config.log_normalize_transform:
            raise ConfigError("rda_transform normalises by itself: set log_normalize_transform=false")
        if config.masks and config.switch_ratio > 0:
            raise ConfigError("switch_ratio > 0 cannot be combined with rda_transform; set switch_ratio=0")
    for name in config.wced_targets:
        _one_of("wced label_sets", name, LABEL_SETS)


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
