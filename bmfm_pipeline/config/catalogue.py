"""Named datasets: one YAML file each, in `bmfm_pipeline/datasets`."""

import functools
import re
import zoneinfo
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator

from bmfm_pipeline.config.data_module import TransformStep
from bmfm_pipeline.config.sections import LabelColumnInfo
from bmfm_pipeline.config.strict import Section, readable
from bmfm_pipeline.errors import ConfigError

FOLDER = Path(__file__).resolve().parents[1] / "datasets"


class DatasetSource(Section):
    """Where the cells come from: `file` below the folder that the variable `env` names, or a `builder` of ours."""

    env: str | None = None
    file: str | None = None
    builder: Literal["zheng68k_mini"] | None = None


class Schedule(Section):
    """When a deployment re-evaluates: five-field cron in a named time zone."""

    cron: str
    timezone: str = "UTC"
    active: bool = False

    @field_validator("cron")
    @classmethod
    def _five_fields(cls, value: str) -> str:
        if not re.fullmatch(r"[\d*/,A-Za-z?#-]+( [\d*/,A-Za-z?#-]+){4}", value):
            raise ValueError(f"a cron line has five fields (minute hour day month weekday), found {value!r}")
        return value

    @field_validator("timezone")
    @classmethod
    def _known_zone(cls, value: str) -> str:
        if value not in zoneinfo.available_timezones():
            raise ValueError(f"{value!r} is no time zone; write one like UTC or Europe/Berlin")
        return value


class DatasetEntry(Section):
    """One dataset of the catalogue."""

    name: str
    title: str
    kind: Literal["h5ad"] = "h5ad"
    source: DatasetSource
    label_columns: list[LabelColumnInfo] = Field(default_factory=list)
    transforms: list[TransformStep]
    expected_labels: dict[str, list[str]] = Field(default_factory=dict)
    cells: int | None = None
    genes: int | None = None
    citation: str = ""
    homepage: str = ""
    evaluate_schedule: Schedule | None = None


@functools.cache
def _read(path: Path) -> DatasetEntry:
    try:
        return DatasetEntry.model_validate(yaml.safe_load(path.read_text()))
    except ValidationError as error:
        raise readable(error, str(path)) from None


def list_entries() -> list[DatasetEntry]:
    return [_read(path) for path in sorted(FOLDER.glob("*.yaml"))]


def load_entry(name: str) -> DatasetEntry:
    """The entry called `name`; ConfigError with a suggestion when there is none."""
    path = FOLDER / f"{name}.yaml"
    if path.name == f"{name}.yaml" and path.is_file() and path.parent == FOLDER:
        return _read(path)
    import difflib

    names = [entry.name for entry in list_entries()]
    close = difflib.get_close_matches(str(name), names, 1)
    raise ConfigError(
        f"dataset: '{name}' is not in the catalogue ({', '.join(names)})"
        + (f"; did you mean '{close[0]}'?" if close else "")
    )


def default_transforms() -> list[dict[str, Any]]:
    """The chain of a dataset that brings none of its own: names cleaned, normalised to 10,000, log2, ten bins, empty rows out."""
    steps: list[tuple[str, dict[str, Any]]] = [
        ("RenameGenesTransform", {"gene_map": None}),
        ("KeepGenesTransform", {"genes_to_keep": None}),
        ("NormalizeTotalTransform", {"target_sum": 10000.0, "exclude_highly_expressed": False, "max_fraction": 0.05}),
        ("LogTransform", {"base": 2}),
        ("BinTransform", {"num_bins": 10, "binning_method": "int_cast"}),
        ("FilterCellsTransform", {"min_counts": 2}),
        ("FilterGenesTransform", {"min_counts": 1}),
    ]
    return [{"transform_name": name, "transform_args": arguments} for name, arguments in steps]
