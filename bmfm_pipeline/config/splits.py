"""The split section: how cells become train, dev and test, in today's spelling and the older ones."""

import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from bmfm_pipeline.config.strict import Section
from bmfm_pipeline.errors import ConfigError

if TYPE_CHECKING:
    from bmfm_pipeline.config.run_config import RunConfig

PLACE = "data_module.transform_kwargs.split"
Method = Literal["random", "stratified", "group", "stratified_group", "kfold", "column", "file", "perturbation"]
# Which perturbations are held out, see data/perturbations/splitting.py.
HeldOutPerturbations = Literal["single_only", "single", "combo_seen0", "combo_seen1", "combo_seen2", "simulation"]
# What each way of splitting reads, beside the keys that all of them read.
READS: dict[str, tuple[str, ...]] = {
    "random": ("weights",),
    "stratified": ("weights", "stratify", "rare_classes"),
    "group": ("weights", "group"),
    "stratified_group": ("weights", "group", "stratify"),
    "kfold": ("n_folds", "fold", "dev_fraction", "stratify", "group", "rare_classes"),
    "column": ("column", "mapping", "dev_fraction", "stratify", "group"),
    "file": ("file", "mapping", "dev_fraction", "stratify", "group"),
    "reuse": ("reuse", "group"),
    "perturbation": ("weights", "perturbations"),
}
ALWAYS_READ = ("method", "name", "train_fraction", "cells_per_class")


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


class SplitConfig(Section):
    """How cells are split. `method: null` follows from what else is given.

    `stratify`, `group` and `column` name columns of obs. Shares and fractions lie in 0..1, `fold` in 0..n_folds - 1.
    """

    method: Method | None = None
    weights: SplitWeights | None = None
    stratify: str | None = None
    group: str | None = None
    column: str | None = None
    file: str | None = None
    mapping: dict[str, Literal["train", "dev", "test", "unused"]] | None = None
    n_folds: int | None = Field(None, ge=2)
    fold: int | None = Field(None, ge=0)
    dev_fraction: float | None = Field(None, ge=0, lt=1)
    train_fraction: float | None = Field(None, gt=0, le=1)
    cells_per_class: int | None = Field(None, ge=1)
    rare_classes: Literal["error", "train"] | None = None
    perturbations: HeldOutPerturbations | None = None
    name: str | None = None
    reuse: str | None = None

    @field_validator("mapping", mode="before")
    @classmethod
    def _texts(cls, value: Any) -> Any:
        """Values of obs are compared as text, so `{0: train}` means "0"; val is a common word for dev."""
        if not isinstance(value, dict):
            return value
        return {str(name): "dev" if meant in ("val", "valid", "validation") else meant for name, meant in value.items()}

    @field_validator("name")
    @classmethod
    def _plain_name(cls, value: str | None) -> str | None:
        if value is not None and (not re.fullmatch(r"[A-Za-z0-9][\w.-]*", value) or value.endswith(".csv")):
            raise ValueError("a name has letters, digits, '-', '_' and '.', and does not end in .csv")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> "SplitConfig":
        if self.fold is not None and self.n_folds is None:
            raise ValueError("fold needs n_folds, the number of folds")
        if self.n_folds is not None and (self.fold or 0) >= self.n_folds:
            raise ValueError(
                f"fold {self.fold} does not exist: folds are 0..{self.n_folds - 1} with n_folds {self.n_folds}"
            )
        if self.train_fraction is not None and self.cells_per_class is not None:
            raise ValueError("train_fraction and cells_per_class both reduce the training cells; keep one")
        return self


@dataclass(frozen=True)
class SplitPlan:
    """A split section with every default settled: what is read, and nothing that is not.

    `weights` are shares of the cells by split; `dev_fraction` the share of the cells outside test that become dev;
    `classes` the label column that a reduction of the training cells keeps balanced. `column`, `file` and `reuse` say
    where a given split lies.
    """

    method: str
    seed: int
    weights: dict[str, float] | None = None
    stratify: str | None = None
    group: str | None = None
    column: str | None = None
    mapping: dict[str, str] | None = None
    n_folds: int | None = None
    fold: int | None = None
    dev_fraction: float | None = None
    train_fraction: float | None = None
    cells_per_class: int | None = None
    classes: str | None = None
    rare_classes: str = "error"
    name: str | None = None
    file: str | None = None
    reuse: str | None = None
    perturbations: str | None = None

    def made_with(self) -> dict[str, Any]:
        """What was set, for the record of the split."""
        found = {name: value for name, value in asdict(self).items() if value is not None}
        if self.column is not None:  # `column` is where the processed cells say their split
            found["from_column"] = found.pop("column")
        if "rare_classes" not in READS.get(self.method, ()):
            found.pop("rare_classes")
        return found

    def key_view(self) -> dict[str, Any]:
        """What names the result; files and splits that are used again enter as inputs, by content."""
        return {name: value for name, value in self.made_with().items() if name not in ("file", "reuse", "seed")}


def resolve_split(run: "RunConfig") -> SplitPlan:
    """The split that a run asks for. Raises ConfigError for keys that contradict each other or would not be read."""
    settings = run.data_module
    split = settings.transform_kwargs.split
    column = _one_column(run)
    method = _method(run, column)
    _refuse_unread(split, method)
    reads = READS[method]
    stratify = _stratify(run) if "stratify" in reads else None
    if method in ("column", "file") and split.dev_fraction is None:
        stratify = None  # nothing is drawn
    weights = _weights(run)
    classes = None
    if split.train_fraction is not None or split.cells_per_class is not None:
        classes = stratify or _first_class_label(run)
        if split.cells_per_class is not None and classes is None:
            raise ConfigError(
                f"{PLACE}.cells_per_class: needs classes, but no label column has any; name one with {PLACE}.stratify, or use train_fraction"
            )
    dev_fraction = split.dev_fraction
    if method == "kfold" and dev_fraction is None:
        rest = weights["train"] + weights["dev"]
        dev_fraction = round(weights["dev"] / rest, 9) if rest else 0.0
    random_state = settings.transform_kwargs.random_state
    return SplitPlan(
        method=method,
        seed=run.seed.seed_value if random_state is None else random_state,
        weights=weights if "weights" in reads else None,
        stratify=stratify,
        group=split.group,
        column=column if method == "column" else None,
        mapping=split.mapping,
        n_folds=split.n_folds,
        fold=(split.fold or 0) if method == "kfold" else None,
        dev_fraction=dev_fraction,
        train_fraction=split.train_fraction,
        cells_per_class=split.cells_per_class,
        classes=classes,
        rare_classes=split.rare_classes or "error",
        name=split.name,
        file=split.file,
        reuse=split.reuse,
        perturbations=(split.perturbations or "simulation") if method == "perturbation" else None,
    )


def _one_column(run: "RunConfig") -> str | None:
    settings = run.data_module
    older = settings.transform_kwargs.split_column_name or settings.dataset_kwargs.split_column_name
    column = settings.transform_kwargs.split.column
    if column and older and column != older:
        raise ConfigError(f"{PLACE}.column is '{column}', split_column_name is '{older}'; keep one of them")
    return column or older


def _method(run: "RunConfig", column: str | None) -> str:
    split = run.data_module.transform_kwargs.split
    given = [name for name, value in (("reuse", split.reuse), ("file", split.file), ("column", column)) if value]
    if len(given) > 1:
        raise ConfigError(f"{PLACE}: {' and '.join(given)} each name a split; keep one of them")
    asked = split.method
    if given:
        if asked not in (None, given[0]):
            raise ConfigError(
                f"{PLACE}: method {asked} makes a new split, but {given[0]} names one that exists; keep one"
            )
        return given[0]
    if asked in ("column", "file"):
        raise ConfigError(f"{PLACE}: method {asked} needs {PLACE}.{asked}")
    if asked == "kfold" and split.n_folds is None:
        raise ConfigError(f"{PLACE}: method kfold needs n_folds, the number of folds")
    if asked in ("group", "stratified_group") and split.group is None:
        raise ConfigError(f"{PLACE}: method {asked} needs group, a column of obs such as the donor")
    if asked in ("stratified", "stratified_group") and _stratify(run) is None:
        raise ConfigError(f"{PLACE}: method {asked} needs stratify, a column of obs with classes")
    if asked == "perturbation" and run.data_module.perturbation is None:
        raise ConfigError(
            f"{PLACE}: method perturbation needs data_module.perturbation, which names the column of perturbations"
        )
    if asked is not None:
        return asked
    if run.data_module.perturbation is not None and split.n_folds is None and split.group is None:
        return "perturbation"
    if split.n_folds is not None:
        return "kfold"
    if split.group is not None:
        return "stratified_group" if _stratify(run) else "group"
    return "stratified" if _stratify(run) else "random"


def _refuse_unread(split: SplitConfig, method: str) -> None:
    given = [name for name in SplitConfig.model_fields if getattr(split, name) is not None]
    unread = [name for name in given if name not in (*ALWAYS_READ, *READS[method])]
    if unread:
        words = "a split that is used again" if method == "reuse" else f"method {method}"
        raise ConfigError(
            f"{PLACE}: {words} does not read {', '.join(unread)}; it reads {', '.join((*READS[method], *ALWAYS_READ[1:]))}"
        )


def _stratify(run: "RunConfig") -> str | None:
    """The column whose classes are spread evenly: named, or the first label column that is_stratification_label."""
    settings = run.data_module
    split = settings.transform_kwargs.split
    older = settings.transform_kwargs.stratifying_label or settings.dataset_kwargs.stratifying_label
    if split.stratify and older and split.stratify != older:
        raise ConfigError(f"{PLACE}.stratify is '{split.stratify}', stratifying_label is '{older}'; keep one of them")
    named = split.stratify or older
    for column in run.label_columns:
        if column.label_column_name == named and (column.is_regression_label or column.is_multilabel):
            kind = "numbers" if column.is_regression_label else "several classes a cell"
            raise ConfigError(f"{PLACE}.stratify: '{named}' holds {kind}; a column with one class a cell is needed")
    return named or next(
        (label.label_column_name for label in run.label_columns if label.is_stratification_label), None
    )


def _first_class_label(run: "RunConfig") -> str | None:
    classes = (label for label in run.label_columns if not label.is_regression_label and not label.is_multilabel)
    return next((label.label_column_name for label in classes), None)


def _weights(run: "RunConfig") -> dict[str, float]:
    settings = run.data_module.transform_kwargs
    older, weights = settings.split_weights, settings.split.weights
    if weights is not None and older not in (SplitWeights(), weights):
        raise ConfigError(f"{PLACE}.weights and split_weights are both set, to different shares; keep one of them")
    return (weights or older).model_dump()
