"""Keys of the data module that say how a cell becomes a sequence: zeros, dropout, normalisation, read depth, masking strategies."""

import re
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from bmfm_pipeline.config.strict import Section
from bmfm_pipeline.errors import ConfigError

if TYPE_CHECKING:
    from bmfm_pipeline.config.data_module import DataModuleConfig
    from bmfm_pipeline.config.run_config import RunConfig

LABEL_SETS = ("input", "non_input", "all")
PatternWeights = list[tuple[str, float]]
# Keys whose value is the path of a table by gene: the table enters a key by content, and travels with the model.
TABLES = ("limit_genes", "median_normalization", "gene_positions", "selective_dropout")
LISTED = ("tokenizer", "protein_coding")


def _checked_patterns(value: PatternWeights | None) -> PatternWeights | None:
    for pattern, weight in value or []:
        if weight < 0:
            raise ValueError(f"the weight of {pattern!r} must not be negative, found {weight:g}")
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
    return value


class ZeroExposureConfig(Section):
    """Which genes that a cell does not express are shown beside those that it does; needs dataset_kwargs.expose_zeros=all.

    `strategy`: batch_wise shows first genes that another cell of the batch expresses, random any. `interleave_zero_ratio` is the
    share of expressed genes where these take turns with zeros, in cycles of `granularity`; null puts expressed genes first. With
    probability `expressed_sample_ratio` a cell is shown without zeros.
    """

    strategy: Literal["batch_wise", "random"] = "batch_wise"
    interleave_zero_ratio: float | None = Field(None, ge=0, le=1)
    expressed_sample_ratio: float = Field(0.0, ge=0, le=1)
    granularity: int = Field(10, ge=1)

    @model_validator(mode="after")
    def _turns_in_batches(self) -> "ZeroExposureConfig":
        if self.strategy == "random" and self.interleave_zero_ratio is not None:
            raise ValueError("interleave_zero_ratio belongs to strategy batch_wise; random puts expressed genes first")
        return self


class SelectiveDropout(Section):
    """Genes left out of training cells by weight: a `fraction` on average, those of greater weight more often.

    Weights are 1, times those of all `pattern_weights` whose pattern matches the start of the gene, times those of the file
    `weights` (csv or tsv with the columns gene and weight), and with `adaptive` times those that follow from the gene's error in the
    latest validation, as in an adaptive masking strategy: what is predicted badly is shown less. `temperature` and `decreasing` as there.
    """

    fraction: float = Field(gt=0, lt=1)
    pattern_weights: PatternWeights | None = None
    weights: str | None = None
    adaptive: bool = False
    temperature: float | None = Field(None, gt=0)
    decreasing: bool = False

    @model_validator(mode="after")
    def _keys_of_adaptive(self) -> "SelectiveDropout":
        if not self.adaptive and (self.temperature is not None or self.decreasing):
            raise ValueError("temperature and decreasing belong to adaptive weights; set adaptive=true")
        return self

    _patterns = field_validator("pattern_weights")(_checked_patterns)


class MaskingStrategy(Section):
    """How positions to predict are chosen, where not all alike.

    `pattern`: the masking rate of a gene is that of all others times the weights of the patterns that match its start; 0 keeps it from
    being masked. `adaptive`: genes that are predicted badly are masked more often, by their error after each validation;
    `temperature` sharpens (small) or evens out (large) the weights, `decreasing` turns them round. `wced`: nothing is masked, the
    whole cell is predicted from the part that the model sees, for the genes of `label_sets`; `normalize` gives the targets the scale
    of the input. Weights hold in validation and test only with `use_for_validation`: validation losses then no longer compare.
    """

    kind: Literal["pattern", "adaptive", "wced"]
    pattern_weights: PatternWeights | None = None
    use_for_validation: bool = False
    temperature: float | None = Field(None, gt=0)
    decreasing: bool = False
    label_sets: list[Literal["input", "non_input", "all"]] = Field(default_factory=lambda: list(LABEL_SETS))
    normalize: bool = True

    _patterns = field_validator("pattern_weights")(_checked_patterns)

    @model_validator(mode="after")
    def _own_keys(self) -> "MaskingStrategy":
        own = {
            "pattern": {"pattern_weights", "use_for_validation"},
            "adaptive": {"pattern_weights", "use_for_validation", "temperature", "decreasing"},
            "wced": {"label_sets", "normalize"},
        }[self.kind] | {"kind"}
        defaults = type(self).model_construct(kind=self.kind)
        if other := sorted(
            name for name in self.model_fields_set - own if getattr(self, name) != getattr(defaults, name)
        ):
            raise ValueError(f"a {self.kind} strategy has no {', '.join(other)}; its keys are {', '.join(sorted(own))}")
        if self.kind == "pattern" and not self.pattern_weights:
            raise ValueError("a pattern strategy needs pattern_weights, such as [['^RP', 0.0]]")
        if self.kind == "wced" and not self.label_sets:
            raise ValueError(f"a wced strategy needs label_sets; there are {', '.join(LABEL_SETS)}")
        return self


def zero_exposure(value: Any) -> Any:
    """The older spelling of a zero-exposure strategy, its name alone, as a section."""
    return {"strategy": value} if isinstance(value, str) else value


def off_is_none(value: Any) -> Any:
    """False as None, for keys that were switches before they named a table."""
    return None if value is False else value


def check_reshaping(module: "DataModuleConfig") -> None:
    """ValueError for keys that contradict each other."""
    drop = module.sequence_dropout_factor
    if isinstance(drop, float) and drop >= 1:
        raise ValueError(
            f"sequence_dropout_factor is a share below 1 or a whole number of genes in one block, found {drop:g}"
        )
    if module.sequence_order == "chromosomal" and not module.gene_positions:
        raise ValueError(
            "sequence_order: chromosomal needs gene_positions, a csv or tsv file with the columns gene, chromosome and start"
        )
    if module.gene_positions and module.sequence_order != "chromosomal":
        raise ValueError(
            "gene_positions is read for sequence_order=chromosomal only; set that, or remove gene_positions"
        )
    if module.pad_zero_expression_strategy is not None and module.dataset_kwargs.expose_zeros is None:
        raise ValueError(
            "pad_zero_expression_strategy has no zeros to show; set data_module.dataset_kwargs.expose_zeros=all too"
        )
    strategy = module.masking_strategy
    if strategy is not None and strategy.kind != "wced" and not module.masks:
        raise ValueError(
            f"masking_strategy: {strategy.kind} says which genes are masked, but none are (mlm is false, or collation_strategy is "
            f"{module.collation_strategy}); set mlm=true, or remove masking_strategy"
        )
    if module.rda_transform is None:
        return
    least = 2
    if module.max_mfi_data_len is not None and module.max_mfi_data_len <= least:
        raise ValueError(
            f"max_mfi_data_len: rda_transform takes {least} places, so more are needed; found {module.max_mfi_data_len}"
        )
    if module.masks and module.switch_ratio > 0:
        raise ValueError("switch_ratio > 0 cannot be combined with rda_transform; set switch_ratio=0")


def check_read_depth(run: "RunConfig") -> None:
    """ConfigError where cells are to be reduced to fewer reads, but nothing says what the values were before."""
    depth = run.data_module.rda_transform
    masked = any(field.field_name == "expressions" and field.is_masked for field in run.fields)
    labelled = any(field.field_name == "label_expressions" and not field.is_input for field in run.fields)
    if depth in ("downsample", "poisson_downsample") and run.predicts_fields and masked and not labelled:
        raise ConfigError(
            f"data_module.rda_transform: {depth} hides reads that masked expressions are to be predicted with; add the field that keeps "
            "them, `- {field_name: label_expressions, is_input: false, tokenization_strategy: continuous_value_encoder}`"
        )


def check_square_root(run: "RunConfig") -> None:
    """ConfigError where square roots would meet another normalisation, or a field that takes whole numbers."""
    module = run.data_module
    if not module.sqrt_normalize_transform:
        return
    others = ("log_normalize_transform", "rda_transform", "median_normalization")
    if found := [name for name in others if getattr(module, name)]:
        raise ConfigError(
            f"data_module.sqrt_normalize_transform: normalises by itself, so it does not go with {' and '.join(found)}; keep one of them"
        )
    for position, field in enumerate(run.fields):
        if field.field_name == "expressions" and field.is_input and not field.continuous:
            raise ConfigError(
                "data_module.sqrt_normalize_transform: gives numbers with fractions, but the field expressions takes tokens; set "
                f"fields.{position}.tokenization_strategy=continuous_value_encoder"
            )


def note_read_depth(run: "RunConfig") -> None:
    """Read depth brings its own normalisation: say once that the other is off."""
    module = run.data_module
    if module.rda_transform is not None and module.log_normalize_transform:
        run.note("data_module.log_normalize_transform is off, because rda_transform normalises by itself")
        module.log_normalize_transform = False


def table_paths(module: "DataModuleConfig") -> dict[str, str]:
    """{key of the data module: path of the table by gene that it names}."""
    paths = {
        "median_normalization": module.median_normalization,
        "gene_positions": module.gene_positions,
        "selective_dropout": module.selective_dropout.weights if module.selective_dropout else None,
        "limit_genes": module.limit_genes
        if isinstance(module.limit_genes, str) and module.limit_genes not in LISTED
        else None,
    }
    return {key: path for key, path in paths.items() if path}


def with_table_paths(module: dict[str, Any], paths: dict[str, Any]) -> dict[str, Any]:
    """The plain section with other paths for its tables, keys as `table_paths` has them."""
    module = dict(module)
    for key, path in paths.items():
        module[key] = {**module[key], "weights": path} if key == "selective_dropout" else path
    return module


def batching_view(module: "DataModuleConfig", plain: dict[str, Any]) -> dict[str, Any]:
    """What of the plain section enters a training key: tables as inputs, by content, and the zeros that dataset_kwargs exposes."""
    view = with_table_paths(plain, dict.fromkeys(table_paths(module), "a file"))
    sequences = None if module.sequences is None else module.sequences.batching_view()
    return {**view, "expose_zeros": module.dataset_kwargs.expose_zeros, "sequences": sequences}
