"""Named datasets: one YAML file each, in `bmfm_pipeline/datasets` and in the folders that BMFM_DATASETS names."""

import functools
import os
import re
import zoneinfo
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from bmfm_pipeline.config.data_module import NORMALISING, InputValues, TransformStep
from bmfm_pipeline.config.gene_names import GeneNames
from bmfm_pipeline.config.perturbation import PerturbationConfig
from bmfm_pipeline.config.promotion import PromotionConfig
from bmfm_pipeline.config.reading import FileTable
from bmfm_pipeline.config.sections import LabelColumnInfo
from bmfm_pipeline.config.sequences import SequencesConfig
from bmfm_pipeline.config.splits import SplitConfig
from bmfm_pipeline.config.strict import Section, readable
from bmfm_pipeline.config.yaml_files import named_yaml, not_yaml
from bmfm_pipeline.errors import ConfigError, did_you_mean
from bmfm_pipeline.storage import is_pattern, is_remote, local_path

FOLDER = Path(__file__).resolve().parents[1] / "datasets"


# Files that each kind of download is made of.
DOWNLOAD_FILES = {"h5ad": ("h5ad",), "tenx_labels": ("matrix", "labels")}


class RemoteFile(Section):
    """A file on the web. Without `sha256` the sum of the first download is recorded, and another one refused from then on."""

    url: str
    sha256: str | None = Field(None, pattern="^[0-9a-fA-F]{64}$")


class Download(Section):
    """What `bmfm datasets download` makes the source file of.

    `format` h5ad: the file itself (files.h5ad). tenx_labels: a 10x matrix archive (files.matrix: matrix.mtx, genes.tsv and
    barcodes.tsv in a tar) and a text file with one label a cell in the order of the barcodes (files.labels), which becomes
    obs[`label_column`].
    """

    format: Literal["h5ad", "tenx_labels"]
    files: dict[str, RemoteFile]
    label_column: str | None = None

    @model_validator(mode="after")
    def _files_of_its_format(self) -> "Download":
        wanted = DOWNLOAD_FILES[self.format]
        if set(self.files) != set(wanted):
            raise ValueError(
                f"format {self.format} needs files {', '.join(wanted)}; found {', '.join(self.files) or 'none'}"
            )
        if (self.format == "tenx_labels") != (self.label_column is not None):
            raise ValueError(
                "label_column names the column of the label file: format tenx_labels needs it, h5ad has none"
            )
        return self


class DatasetSource(Section):
    """Where the cells come from: `file` below the folder that the variable `env` names, or a `builder` of ours.

    Without `env`, `file` is a path (a relative one counts from the folder of the YAML file) or an s3:// address. A folder, or a
    pattern such as studies/*.h5ad, stands for all its files as one dataset; `converted` is a pattern of what is read where no file fits
    the first.
    """

    env: str | None = Field(None, pattern="^[A-Za-z_][A-Za-z0-9_]*$")
    file: str | None = None
    converted: str | None = None
    builder: Literal["zheng68k_mini"] | None = None
    download: Download | None = None

    @model_validator(mode="after")
    def _one_source(self) -> "DatasetSource":
        if (self.builder is None) == (self.file is None) or (self.builder and (self.env or self.download)):
            raise ValueError("give either `file` (with `env`, `download` where they apply) or `builder`")
        if self.download and self.file and not self.env and is_remote(self.file):
            raise ValueError(f"a download goes to a local file, found {self.file}")
        if self.download and self.file and is_pattern(self.file):
            raise ValueError(f"a download makes one file, and {self.file} is a pattern; name the file")
        return self


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


class Automations(Section):
    """What a Prefect server does by itself once a re-evaluation of the dataset has ended, or a run of it has failed.

    Empty lists, the default, are nothing at all. A notification is a POST to the address in the variable `webhook_env` of
    whoever runs `bmfm deploy`; the server keeps it encrypted.
    """

    finetune_on: list[Literal["regressed", "drifted"]] = Field(default_factory=list)
    notify_on: list[Literal["held", "improved", "regressed", "drifted", "failed"]] = Field(default_factory=list)
    webhook_env: str = Field("BMFM_NOTIFY_URL", pattern="^[A-Za-z_][A-Za-z0-9_]*$")


class ExpectedScore(Section):
    """What somebody else measured on the dataset: scores by metric, each in 0..1, and where they are printed.

    `protocol` says on which cells: a score of another split is no target for this one.
    """

    method: str
    scores: dict[str, float] = Field(min_length=1)
    protocol: str = ""
    source: str = Field(min_length=1)


class DatasetEntry(Section):
    """One dataset of the catalogue.

    `split` is a split rule as in data_module.transform_kwargs.split, and `split_column_name` the short form for a column that says
    train, dev or test. `classes` {label column: number of classes} where these are not listed in `expected_labels`. `fetch` says how
    the file is got by hand, `accession` under which name archives have it.
    """

    name: str
    title: str
    kind: Literal["h5ad", "dna"] = "h5ad"
    source: DatasetSource
    label_columns: list[LabelColumnInfo] = Field(default_factory=list)
    transforms: list[TransformStep] = Field(default_factory=list)
    expected_labels: dict[str, list[str]] = Field(default_factory=dict)
    classes: dict[str, int] = Field(default_factory=dict)
    split: SplitConfig | None = None
    split_column_name: str | None = None
    batch_column: str | None = None
    files: FileTable | None = None  # a dataset of studies: a table with a row for each of its files
    gene_names: GeneNames | None = None
    perturbation: PerturbationConfig | None = None  # cells to pair with controls; then there is no label column
    input_values: InputValues = "counts"
    sequences: SequencesConfig | None = None  # of kind dna: how its sequences are read
    parts: list[str] = Field(default_factory=list)  # of kind dna: what may stand for {part} in source.file
    label_meaning: dict[str, dict[str, str]] = Field(
        default_factory=dict
    )  # {label column: {class, or value: what it is}}
    cells: int | None = None
    genes: int | None = None
    notes: str = ""
    fetch: str = ""
    accession: str = ""
    licence: str = ""
    citation: str = ""
    homepage: str = ""
    expected: list[ExpectedScore] = Field(default_factory=list)
    evaluate_schedule: Schedule | None = None
    promotion: PromotionConfig | None = None
    automations: Automations = Field(default_factory=Automations)
    deployed: bool = False  # whether deployments/prefect.yaml has a deployment of every flow for it

    @model_validator(mode="after")
    def _one_split(self) -> "DatasetEntry":
        if self.split is not None and self.split_column_name is not None:
            raise ValueError(
                "split and split_column_name both say how cells are split; keep split, with its key `column` for an obs column"
            )
        return self

    @model_validator(mode="after")
    def _of_its_kind(self) -> "DatasetEntry":
        if self.kind == "h5ad" and "transforms" not in self.model_fields_set:
            raise ValueError("transforms: name the steps that prepare the cells, [] for none")
        if self.kind == "dna" and self.transforms:
            raise ValueError("transforms are for cells; a dataset of kind dna has none")
        if self.kind != "dna" and self.sequences is not None:
            raise ValueError("sequences says how nucleotides are read: set kind: dna, or remove it")
        named = self.sequences.part if self.sequences is not None else None
        if ("{part}" in (self.source.file or "")) != bool(self.parts) or (self.parts and named not in self.parts):
            raise ValueError("parts, sequences.part (the usual one of them) and {part} in source.file go together")
        return self

    @model_validator(mode="after")
    def _classes_of_label_columns(self) -> "DatasetEntry":
        names = [column.label_column_name for column in self.label_columns]
        if unknown := [name for name in (*self.classes, *self.expected_labels) if name not in names]:
            raise ValueError(
                f"classes are given for {', '.join(unknown)}, which is none of label_columns ({', '.join(names) or 'none'})"
            )
        return self

    def n_classes(self, label: str) -> int | None:
        """How many classes a label column has, where the entry says so."""
        return len(self.expected_labels[label]) if label in self.expected_labels else self.classes.get(label)

    @model_validator(mode="after")
    def _automations_have_deployments(self) -> "DatasetEntry":
        if (self.automations.finetune_on or self.automations.notify_on) and not self.deployed:
            raise ValueError("automations watch deployments, and `deployed` is false; set deployed: true")
        return self

    @property
    def data_folder(self) -> Path | None:
        """The local folder below which `source.file` is looked for: the variable's, else where a download puts it.

        None where no variable is involved, or it names a remote place.
        """
        if not self.source.env:
            return None
        named = os.environ.get(self.source.env)
        if named and is_remote(named):
            return None
        return local_path(named) if named else downloads_folder() / self.name


def downloads_folder() -> Path:
    """Where downloaded datasets lie unless told otherwise: $BMFM_DATA_HOME, else bmfm below the user's data folder."""
    if chosen := os.environ.get("BMFM_DATA_HOME"):
        return local_path(chosen)
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "bmfm"


@functools.cache
def _read(path: Path) -> DatasetEntry:
    try:
        entry = DatasetEntry.model_validate(yaml.safe_load(path.read_text()))
    except ValidationError as error:
        raise readable(error, str(path)) from None
    except yaml.YAMLError as error:
        raise not_yaml(error, path) from None
    if entry.name != path.stem:
        raise ConfigError(
            f"{path}: name is '{entry.name}', but the file is called {path.name}; give both the same name"
        )
    source = entry.source
    if source.file and not source.env and not is_remote(source.file):
        source.file = str(path.absolute().parent / Path(source.file).expanduser())
    return entry


def _files() -> dict[str, Path]:
    """{name: YAML file}; the packaged ones first."""
    return named_yaml(FOLDER, "BMFM_DATASETS", "dataset")


def list_entries() -> list[DatasetEntry]:
    """All datasets: the packaged ones by name, then those of BMFM_DATASETS."""
    return [_read(path) for path in _files().values()]


def load_entry(name: str) -> DatasetEntry:
    """The entry called `name`; ConfigError with a suggestion when there is none."""
    files = _files()
    if name in files:
        return _read(files[name])
    names = list(files)
    raise ConfigError(
        f"dataset: '{name}' is not in the catalogue ({', '.join(names)}){did_you_mean(name, names, before='; ')}"
    )


def without_filters(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A chain for cells that are predicted: none is left out, so only what changes values and names stays."""
    return [step for step in steps if not step["transform_name"].startswith("Filter")]


def default_transforms(input_values: str = "counts") -> list[dict[str, Any]]:
    """The chain of a dataset that brings none of its own: names cleaned, normalised to 10,000, log2, ten bins, empty rows out.

    Of log-normalised values neither a share nor a logarithm is taken again.
    """
    steps: list[tuple[str, dict[str, Any]]] = [
        ("RenameGenesTransform", {"gene_map": None}),
        ("KeepGenesTransform", {"genes_to_keep": None}),
        ("NormalizeTotalTransform", {"target_sum": 10000.0, "exclude_highly_expressed": False, "max_fraction": 0.05}),
        ("LogTransform", {"base": 2}),
        ("BinTransform", {"num_bins": 10, "binning_method": "int_cast"}),
        ("FilterCellsTransform", {"min_counts": 2}),
        ("FilterGenesTransform", {"min_counts": 1}),
    ]
    again = NORMALISING if input_values == "log_normalised" else ()
    return [{"transform_name": name, "transform_args": arguments} for name, arguments in steps if name not in again]


def perturbation_transforms(input_values: str = "counts") -> list[dict[str, Any]]:
    """The chain of perturbed cells: as every other, but values are not binned, for they are compared as numbers."""
    return [step for step in default_transforms(input_values) if step["transform_name"] != "BinTransform"]
