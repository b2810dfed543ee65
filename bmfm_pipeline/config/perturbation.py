"""The section of paired control and perturbed cells: which column names the perturbation, how it is spelled, how cells are paired."""

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from bmfm_pipeline.config.strict import Section
from bmfm_pipeline.errors import ConfigError

if TYPE_CHECKING:
    from bmfm_pipeline.config.run_config import RunConfig

PLACE = "data_module.perturbation"
# Fields that say what the perturbed cell of a pair holds.
LABEL_FIELDS = ("label_expressions", "delta_expressions", "delta_baseline_expressions")
# Differences may be negative, so they have no tokens.
DIFFERENCES = LABEL_FIELDS[1:]
Dialect = Literal["auto", "plain", "gears", "scperturb", "adamson", "replogle", "vcc"]
# Settings that change what the model sees of the control cell and could not change the labels with it.
_ONE_CELL_ONLY = (
    "rda_transform",
    "log_normalize_transform",
    "sqrt_normalize_transform",
    "median_normalization",
    "masking_strategy",
    "selective_dropout",
    "sequence_dropout_factor",
    "balancing_label_column",
    "train_fraction",
)
# Older spellings, which stand in the data module itself.
_FLAT = {"perturbation_column_name": "column", "perturbation_dialect": "dialect"}


class PerturbationConfig(Section):
    """Cells with a perturbation, each beside a control cell.

    `column`: the obs column that names the perturbation. `dialect`: how it spells it; auto looks and says which. `control`: the value of
    unperturbed cells, null for the usual words. `pairing`: any control, or (matched) one with the same value of the obs column
    `match_column`; drawn anew in every epoch of training, fixed elsewhere. `labels`: what a pair is compared with, the values of its
    perturbed cell, or (means) the mean profile of that cell's perturbation, which is the same to expect and without its noise. `unmeasured_targets`: keep cells whose target gene is not
    among the measured genes, or drop them. `de_genes`: how many genes the lists of differentially expressed genes hold.
    """

    column: str = "perturbation"
    dialect: Dialect = "auto"
    control: str | None = None
    pairing: Literal["random", "matched"] | None = None
    match_column: str | None = None
    labels: Literal["cells", "means"] = "cells"
    unmeasured_targets: Literal["keep", "drop"] = "keep"
    de_genes: int = Field(50, ge=2)

    @field_validator("column", "dialect", mode="before")
    @classmethod
    def _none_is_default(cls, value: Any, info: ValidationInfo) -> Any:
        return cls.model_fields[info.field_name].default if value is None else value

    @model_validator(mode="after")
    def _matched_by_a_column(self) -> "PerturbationConfig":
        if self.pairing is None:
            self.pairing = "matched" if self.match_column else "random"
        if (self.pairing == "matched") != (self.match_column is not None):
            raise ValueError("pairing matched needs match_column, an obs column such as the batch; random reads none")
        return self

    def preprocessing(self) -> dict[str, Any]:
        """The part that preprocessing reads: pairs are made when batches are."""
        return self.model_dump(mode="json", include={"column", "dialect", "control", "unmeasured_targets", "de_genes"})


def gather_flat_keys(values: dict[str, Any]) -> dict[str, Any]:
    """The data module with `perturbation_column_name` and `perturbation_dialect` moved into its section `perturbation`."""
    given = {name: values[name] for name in _FLAT if values.get(name) is not None}
    values = {name: value for name, value in values.items() if name not in _FLAT}
    if given:
        section = dict(values.get("perturbation") or {})
        for name, value in given.items():
            if section.get(_FLAT[name]) not in (None, value):
                raise ValueError(
                    f"'{name}' is another spelling of perturbation.{_FLAT[name]}, and both are given; keep one"
                )
            section[_FLAT[name]] = value
        values["perturbation"] = section
    return values


def check_pairs(run: "RunConfig") -> None:
    """Raise ConfigError where a run on pairs lacks what they need, or a run on single cells has what only pairs read."""
    module = run.data_module
    named = [field.field_name for field in run.fields if field.field_name in LABEL_FIELDS and not field.is_input]
    if module.collation_strategy != "sequence_labeling":
        if module.perturbation is not None:
            raise ConfigError(
                f"{PLACE}: is read with data_module.collation_strategy=sequence_labeling alone, found "
                f"{module.collation_strategy}; set that, or remove {PLACE}"
            )
        if module.dataset_kwargs.expose_zeros in ("no_zeros", "label_nonzeros"):
            raise ConfigError(
                f"data_module.dataset_kwargs.expose_zeros: {module.dataset_kwargs.expose_zeros} is about pairs of cells; use all, or null to "
                "hide zeros"
            )
        return
    if module.perturbation is None:
        raise ConfigError(
            f"data_module.collation_strategy: sequence_labeling needs paired control and perturbed cells: name the obs column of the "
            f"perturbation with {PLACE}.column=COLUMN, or run `bmfm run FILE task=perturbation perturbation_column_name=COLUMN`"
        )
    if module.mlm:
        raise ConfigError("data_module.mlm: pairs are labelled at every gene and nothing is masked; set mlm=false")
    for name in _ONE_CELL_ONLY:
        if getattr(module, name):
            raise ConfigError(
                f"data_module.{name}: has no meaning for pairs of cells, whose values are compared as they are; remove it"
            )
    flags = [field for field in run.fields if field.field_name == "perturbations" and field.is_input]
    if not flags or not named:
        what = (
            "an input field perturbations"
            if not flags
            else f"a field with is_input=false among {', '.join(LABEL_FIELDS)}"
        )
        raise ConfigError(f"fields: sequence_labeling needs {what}; `fields=perturbation` brings the usual ones")
    for field in run.fields:
        if field.field_name in DIFFERENCES and (field.is_input or not field.continuous):
            raise ConfigError(
                f"fields: '{field.field_name}' is a difference, which may be negative: it needs is_input=false and "
                "tokenization_strategy=continuous_value_encoder"
            )
        if field.field_name in LABEL_FIELDS and field.is_input:
            raise ConfigError(f"fields: '{field.field_name}' is what is predicted; set its is_input=false")
