"""The data module section: which cells, how they are prepared, split, cut, masked and batched."""

from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from bmfm_pipeline.config.strict import Absent, Section

CollationStrategy = Literal["language_modeling", "sequence_classification", "multitask", "sequence_labeling"]
SPLITS = ("train", "dev", "test")


class SplitWeights(Section):
    """Shares of train, dev and test; 20 % test and 10 % of the rest for dev unless set."""

    train: float = Field(0.72, ge=0)
    dev: float = Field(0.08, ge=0)
    test: float = Field(0.20, ge=0)

    @model_validator(mode="after")
    def _sum_to_one(self) -> "SplitWeights":
        total = self.train + self.dev + self.test
        if abs(total - 1) > 1e-6:
            raise ValueError(f"train + dev + test must be 1, found {total:g}")
        return self


class TransformStep(Section):
    """One step of the transform chain, by name."""

    transform_name: str
    transform_args: dict[str, Any] = Field(default_factory=dict)

    @field_validator("transform_args", mode="before")
    @classmethod
    def _none_is_empty(cls, value: Any) -> Any:
        return {} if value is None else value


class TransformKwargs(Section):
    """How raw cells become processed ones. `transforms: null` is the dataset's own chain, [] is none."""

    legacy: ClassVar[dict[str, str]] = {
        "processed_h5ad_file_name": "processed_data_source",
        "split_random_state": "random_state",
    }

    source_h5ad_file_name: str | None = None
    processed_data_source: str | None = None
    transforms: list[TransformStep] | None = None
    split_column_name: str | None = None
    split_weights: SplitWeights = Field(default_factory=SplitWeights)
    random_state: int | None = None
    stratifying_label: str | None = None
    fit_on: Literal["train", "all"] = "train"
    layer: str | None = None
    duplicate_genes: Literal["refuse", "sum", "first"] = "refuse"
    input_values: Literal["counts", "any"] = "counts"


class DatasetKwargs(Section):
    """The processed data and its labels."""

    absent: ClassVar[dict[str, Absent]] = {
        "filter_query": Absent(instead="select the cells in the h5ad file before preprocessing"),
        "limit_samples": Absent(instead="set data_module.limit_dataset_samples"),
        "limit_samples_shuffle": Absent((None, True, False)),
        "expose_zeros": Absent(),
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
    label_columns: list[str] | None = None
    regression_label_columns: list[str] | None = None
    label_dict_path: str | None = None
    stratifying_label: str | None = None
    split_column_name: str | None = None


class DataModuleConfig(Section):
    """Keys and defaults of the data module; lengths are in tokens, ratios in 0..1."""

    absent: ClassVar[dict[str, Absent]] = {
        "processed_name": Absent((None, "processed"), "set data_module.dataset_kwargs.processed_data_source"),
        "sequence_dropout_factor": Absent(),
        "pad_zero_expression_strategy": Absent(),
        "masking_strategy": Absent(),
        "log_normalize_transform": Absent((None, False), "set transform_kwargs.transforms to a chain that normalises"),
        "median_normalization": Absent((None, False)),
        "rda_transform": Absent(),
        "map_orthologs": Absent(),
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
    sequence_order: Literal["random", "sorted"] | None = None
    change_ratio: float = Field(0.15, ge=0, le=1)
    mask_ratio: float = Field(1.0, ge=0, le=1)
    switch_ratio: float = Field(0.0, ge=0, le=1)
    comask_across_fields: bool = False
    prevent_attention_to_masked: bool = False
    limit_dataset_samples: int | dict[str, int] | None = None
    limit_genes: Literal["tokenizer"] | None = "tokenizer"
    balancing_label_column: str | None = None

    @field_validator("dataset_kwargs", "transform_kwargs", mode="before")
    @classmethod
    def _none_is_empty(cls, value: Any) -> Any:
        return {} if value is None else value

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
        multiple = self.pad_to_multiple_of
        if multiple and self.truncation and self.padding is not False and self.max_length % multiple:
            lower = self.max_length // multiple * multiple
            near = f"{lower} or {lower + multiple}" if lower else str(multiple)
            raise ValueError(
                f"max_length {self.max_length} is not a multiple of pad_to_multiple_of {multiple}; use {near}"
            )
        names = [self.transform_kwargs.processed_data_source, self.dataset_kwargs.processed_data_source]
        if all(names) and names[0] != names[1]:
            raise ValueError(
                f"transform_kwargs.processed_data_source ({names[0]}) and dataset_kwargs.processed_data_source ({names[1]}) must be the same file"
            )
        return self

    @property
    def masks(self) -> bool:
        """Whether tokens are masked: by `mlm`, and where it is unset by the collation strategy."""
        if self.mlm is not None:
            return self.mlm
        return self.collation_strategy in ("language_modeling", "multitask")
