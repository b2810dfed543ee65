"""The data module section: which cells, how they are prepared, split, cut, masked and batched."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from bmfm_pipeline.config.gene_names import GeneNames, MapOrthologs, check_gene_names
from bmfm_pipeline.config.perturbation import PerturbationConfig, gather_flat_keys
from bmfm_pipeline.config.reading import FileTable, Reading
from bmfm_pipeline.config.reshaping import (
    MaskingStrategy,
    SelectiveDropout,
    ZeroExposureConfig,
    check_reshaping,
    off_is_none,
    zero_exposure,
)
from bmfm_pipeline.config.schedule import BatchScheduleEntry, settle_scheduled
from bmfm_pipeline.config.sequences import SequencesConfig
from bmfm_pipeline.config.splits import SplitConfig, SplitWeights
from bmfm_pipeline.config.strict import Absent, Section

CollationStrategy = Literal["language_modeling", "sequence_classification", "multitask", "sequence_labeling"]
# Steps that make of counts what log-normalised values are already.
NORMALISING = ("NormalizeTotalTransform", "TPMNormalizationTransform", "LogTransform")
InputValues = Literal["counts", "log_normalised", "any"]
SPLITS = ("train", "dev", "test")


class TransformStep(Section):
    """One step of the transform chain, by name."""

    transform_name: str
    transform_args: dict[str, Any] = Field(default_factory=dict)

    @field_validator("transform_args", mode="before")
    @classmethod
    def _none_is_empty(cls, value: Any) -> Any:
        return {} if value is None else value


class TransformKwargs(Section):
    """How raw cells become processed ones. `transforms: null` is the dataset's own chain, [] is none.

    `source_h5ad_file_name`: an h5ad file, or several: a list, a folder, or a pattern such as /data/*.h5ad. `cell_names`: a cell name
    that several files have is refused, or all cells get the name of their file as a prefix. Of several files at most the share
    `max_share_of_files_set_aside` may be left out because they cannot be used. `input_values`: what the matrix holds; of log-normalised
    values nothing is normalised again, and controls read them as they are. `reading`: how a file that is no h5ad is read. `files`: a
    table of several files, from which some are chosen. `num_workers`: processes that several files are converted, checked and transformed in.
    """

    legacy: ClassVar[dict[str, str]] = {
        "processed_h5ad_file_name": "processed_data_source",
        "split_random_state": "random_state",
    }

    source_h5ad_file_name: str | list[str] | None = None
    processed_data_source: str | None = None
    transforms: list[TransformStep] | None = None
    split: SplitConfig = Field(default_factory=SplitConfig)
    split_column_name: str | None = None
    split_weights: SplitWeights = Field(default_factory=SplitWeights)
    random_state: int | None = None
    stratifying_label: str | None = None
    fit_on: Literal["train", "all"] = "train"
    layer: str | None = None
    duplicate_genes: Literal["refuse", "sum", "first"] = "refuse"
    input_values: InputValues = "counts"
    gene_names: GeneNames = Field(default_factory=GeneNames)
    cell_names: Literal["refuse", "prefix"] = "refuse"
    max_share_of_files_set_aside: float = Field(0.1, ge=0, lt=1)
    reading: Reading = Field(default_factory=Reading)
    files: FileTable | None = None
    num_workers: int = Field(0, ge=0)

    @field_validator("source_h5ad_file_name")
    @classmethod
    def _names_a_file(cls, value: Any) -> Any:
        if isinstance(value, list) and not value:
            raise ValueError("the list is empty; name at least one h5ad file, a folder or a pattern")
        return value


class DatasetKwargs(Section):
    """The processed data and its labels."""

    absent: ClassVar[dict[str, Absent]] = {
        "filter_query": Absent(instead="select the cells in the h5ad file before preprocessing"),
        "limit_samples": Absent(instead="set data_module.limit_dataset_samples"),
        "limit_samples_shuffle": Absent((None, True, False)),
        "sort_genes_var": Absent(),
        "backed": Absent((None, False, True, "r")),  # cells are always read from the file by row
        # PanglaoDB, a dataset of studies.
        "data_dir": Absent(),
        "data_info_path": Absent(),
        "num_workers": Absent(instead="set data_module.num_workers"),
        "convert_rdata_to_h5ad": Absent((None, False)),
        "transform_datasets": Absent(instead="set data_module.transform_datasets"),
        "processed_dir_name": Absent(),
        "pre_transforms": Absent(instead="set data_module.transform_kwargs.transforms"),
        "post_transforms": Absent(instead="set data_module.transform_kwargs.transforms"),
    }

    processed_data_source: str | None = None
    expose_zeros: Literal["all", "no_zeros", "label_nonzeros"] | None = None
    label_columns: list[str] | None = None
    regression_label_columns: list[str] | None = None
    label_dict_path: str | None = None
    stratifying_label: str | None = None
    split_column_name: str | None = None


class DataModuleConfig(Section):
    """Keys and defaults of the data module; lengths are in tokens, ratios in 0..1.

    `train_fraction`: the share of the training cells that fine-tuning, and the controls of its evaluation, learn from; null or 1 is
    all. Pretraining, which reads no labels, takes all training cells.
    """

    absent: ClassVar[dict[str, Absent]] = {
        "processed_name": Absent((None, "processed"), "set data_module.dataset_kwargs.processed_data_source"),
        "tokenize_kwargs": Absent((None, {})),
        "bootstrap_test_dataloader": Absent((None, False)),
    }

    data_dir: str | None = None
    dataset_kwargs: DatasetKwargs = Field(default_factory=DatasetKwargs)
    transform_kwargs: TransformKwargs = Field(default_factory=TransformKwargs)
    transform_datasets: bool = True
    collation_strategy: CollationStrategy = "multitask"
    mlm: bool | None = None
    batch_size: int = Field(32, gt=0)
    num_workers: int = Field(0, ge=0)
    shuffle: bool = True
    max_length: int = Field(512, gt=2)
    max_mfi_data_len: int | None = Field(None, gt=0)
    padding: Literal["max_length", "longest"] | bool = "max_length"
    truncation: bool = True
    pad_to_multiple_of: int | None = Field(16, gt=0)
    sequence_order: Literal["random", "sorted", "chromosomal"] | None = None
    gene_positions: str | None = None
    sequence_dropout_factor: Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0)] | None = None
    selective_dropout: SelectiveDropout | None = None
    pad_zero_expression_strategy: ZeroExposureConfig | None = None
    log_normalize_transform: bool = False
    sqrt_normalize_transform: bool = False
    median_normalization: str | None = None
    rda_transform: (
        Literal["downsample", "poisson_downsample", "equal", "auto_align"] | Annotated[int, Field(ge=1)] | None
    ) = None
    masking_strategy: MaskingStrategy | None = None
    change_ratio: float = Field(0.15, ge=0, le=1)
    mask_ratio: float = Field(1.0, ge=0, le=1)
    switch_ratio: float = Field(0.0, ge=0, le=1)
    comask_across_fields: bool = False
    prevent_attention_to_masked: bool = False
    limit_dataset_samples: int | dict[str, int] | None = None
    train_fraction: float | None = Field(None, gt=0, le=1)
    limit_genes: list[str] | str | None = "tokenizer"
    map_orthologs: MapOrthologs | None = None
    balancing_label_column: str | None = None
    batch_schedule: list[BatchScheduleEntry] | None = Field(None, min_length=1)
    test_batch_size: int | None = Field(None, gt=0)
    test_max_length: int | None = Field(None, gt=2)
    perturbation: PerturbationConfig | None = None
    sequences: SequencesConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def _scheduled(cls, values: Any) -> Any:
        return settle_scheduled(gather_flat_keys(values)) if isinstance(values, dict) else values

    @field_validator("dataset_kwargs", "transform_kwargs", mode="before")
    @classmethod
    def _none_is_empty(cls, value: Any) -> Any:
        return {} if value is None else value

    _zero_exposure = field_validator("pad_zero_expression_strategy", mode="before")(zero_exposure)
    _off_is_none = field_validator("median_normalization", "rda_transform", mode="before")(off_is_none)

    @field_validator("sequence_order", mode="before")
    @classmethod
    def _older_name(cls, value: Any) -> Any:
        return "chromosomal" if value == "chromosomal_uce" else value

    @field_validator("log_normalize_transform", mode="before")
    @classmethod
    def _none_is_off(cls, value: Any) -> Any:
        return False if value is None else value

    @field_validator("median_normalization", mode="before")
    @classmethod
    def _a_table(cls, value: Any) -> Any:
        if value is True:
            raise ValueError("needs a table: name a csv or tsv file with the columns gene and median")
        return value

    @field_validator("train_fraction")
    @classmethod
    def _all_is_none(cls, value: float | None) -> float | None:
        return None if value == 1 else value

    @field_validator("limit_dataset_samples")
    @classmethod
    def _split_names(cls, value: Any) -> Any:
        if isinstance(value, dict):
            renamed = {"dev" if name == "val" else name: count for name, count in value.items()}
            if unknown := set(renamed) - {*SPLITS, "predict"}:
                raise ValueError(f"unknown split {sorted(unknown)}; splits are train, dev, test, predict")
            return renamed
        return value

    @model_validator(mode="after")
    def _consistent(self) -> "DataModuleConfig":
        if self.mask_ratio + self.switch_ratio > 1 + 1e-9:
            raise ValueError(f"mask_ratio {self.mask_ratio:g} + switch_ratio {self.switch_ratio:g} must not exceed 1")
        if self.switch_ratio > 0 and self.comask_across_fields:
            raise ValueError(
                "switch_ratio > 0 cannot be combined with comask_across_fields=true; set one of them to its default"
            )
        for entry in self.batch_schedule or []:
            entry.max_length, entry.batch_size = (
                entry.max_length or self.max_length,
                entry.batch_size or self.batch_size,
            )
        for length in self.lengths:
            self._check_multiple(length)
        check_gene_names(self.transform_kwargs.gene_names, self.map_orthologs, self.limit_genes)
        check_reshaping(self)
        names = [self.transform_kwargs.processed_data_source, self.dataset_kwargs.processed_data_source]
        if all(names) and names[0] != names[1]:
            raise ValueError(
                f"transform_kwargs.processed_data_source ({names[0]}) and dataset_kwargs.processed_data_source ({names[1]}) must be the same file"
            )
        return self

    def _check_multiple(self, length: int) -> None:
        multiple = self.pad_to_multiple_of
        if multiple and self.truncation and self.padding is not False and length % multiple:
            lower = length // multiple * multiple
            near = f"{lower} or {lower + multiple}" if lower else str(multiple)
            raise ValueError(f"max_length {length} is not a multiple of pad_to_multiple_of {multiple}; use {near}")

    @property
    def lengths(self) -> list[int]:
        """Every length that cells are cut to in training or evaluation, the data module's own first."""
        scheduled = [entry.max_length for entry in self.batch_schedule or []]
        return list(dict.fromkeys([self.max_length, *scheduled, self.evaluation_length]))

    @property
    def evaluation_length(self) -> int:
        """Tokens of a cell wherever nothing is trained: in validation, test and prediction."""
        return self.test_max_length or self.max_length

    @property
    def evaluation_batch_size(self) -> int:
        """Cells of a batch wherever nothing is trained."""
        return self.test_batch_size or self.batch_size

    @property
    def masks(self) -> bool:
        """Whether tokens are masked: by `mlm`, and where it is unset by the collation strategy; never with whole-cell targets."""
        if self.masking_strategy is not None and self.masking_strategy.kind == "wced":
            return False
        if self.mlm is not None:
            return self.mlm
        return self.collation_strategy in ("language_modeling", "multitask")
