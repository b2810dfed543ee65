"""The section of nucleotide sequences: where they lie, how they are cut into tokens, what is done to them in training."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from bmfm_pipeline.config.strict import Section
from bmfm_pipeline.errors import ConfigError

if TYPE_CHECKING:
    from bmfm_pipeline.config.run_config import RunConfig

PLACE = "data_module.sequences"
FIELD = "dna_chunks"
FASTA = (".fa", ".fasta", ".fna", ".fa.gz", ".fasta.gz", ".fna.gz")
ENDINGS = (".csv", ".tsv", ".txt", ".csv.gz", ".tsv.gz", ".parquet")
# Keys of the data module that speak of genes and their values: unset for sequences.
_OF_GENES = (
    "max_mfi_data_len", "gene_positions", "sequence_dropout_factor", "selective_dropout", "pad_zero_expression_strategy",
    "log_normalize_transform", "sqrt_normalize_transform", "median_normalization", "rda_transform", "masking_strategy",
    "map_orthologs", "prevent_attention_to_masked", "comask_across_fields", "perturbation",
)  # fmt: skip


class SequenceVocabulary(Section):
    """How sequences are cut where tokenizer.identifier is 'data'.

    `kind` bpe learns pieces from the training sequences, at most `size` with the special tokens; kmer cuts `k` letters each, nucleotide
    single ones.
    """

    kind: Literal["bpe", "kmer", "nucleotide"] = "bpe"
    size: int = Field(4096, ge=32)
    k: int = Field(6, ge=1, le=8)


class Windows(Section):
    """How a FASTA file is cut into sequences, in letters.

    A window of `size` begins every `step` letters (null: one after the other), within the intervals of the BED file `bed` or on whole
    records. Windows of fewer than `least` letters, and those with more than the share `most_unknown` of other letters than A, C, G and
    T, are left out and counted. `dev` and `test` name records that are held out; without them stretches of 100 windows are split at random.
    `variants`: a VCF file, or a table with chrom, pos, ref and alt, of variants that a population has: each is written into the windows as
    one sign for its pair of alleles. `least_frequency`: rarer alternatives (AF) are left out.
    """

    size: int = Field(1000, ge=16)
    step: int | None = Field(None, ge=1)
    least: int = Field(50, ge=1)
    most_unknown: float = Field(0.1, ge=0, le=1)
    bed: str | None = None
    variants: str | None = None
    least_frequency: float | None = Field(None, ge=0, le=1)
    dev: list[str] = Field(default_factory=list)
    test: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _held_out_once(self) -> "Windows":
        if both := sorted(set(self.dev) & set(self.test)):
            raise ValueError(f"{both[0]} is both dev and test; keep one")
        return self


class SequencesConfig(Section):
    """Sequences of nucleotides.

    `source`: a folder with train, dev and test as csv, tsv or parquet, one such table, or a FASTA file, which `windows` cuts. `part`: which of the parts of a dataset of the catalogue. `column`: its column with the sequences, null is
    the first. `leakage`: test and dev sequences that training has too are reported, or refused. `reverse_complement`: in training each
    sequence is read on the other strand in half of the epochs. `upper_case`: lower-case letters, as genomes mark repeats, are read as
    capitals.
    """

    source: str | None = None
    part: str | None = None
    column: str | None = None
    vocabulary: SequenceVocabulary = Field(default_factory=SequenceVocabulary)
    windows: Windows = Field(default_factory=Windows)
    leakage: Literal["report", "refuse", "off"] = "report"
    reverse_complement: bool = False
    upper_case: bool = True

    @model_validator(mode="before")
    @classmethod
    def _sections_or_defaults(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return {
                name: entry
                for name, entry in value.items()
                if entry is not None or name not in ("vocabulary", "windows")
            }
        return value

    def preprocess_view(self) -> dict[str, Any]:
        """What of it enters the key of processed sequences; files enter by content."""
        plain = self.model_dump(mode="json")
        plain["windows"].pop("bed")
        plain["windows"].pop("variants")
        return {name: value for name, value in plain.items() if name not in ("source", "part")}

    def batching_view(self) -> dict[str, Any]:
        """What of it enters the key of a training."""
        return {"reverse_complement": self.reverse_complement}


def sequence_fields(masked: bool) -> list[dict[str, Any]]:
    return [{"field_name": FIELD, "is_masked": masked}]


def written_sequences(section: Any) -> dict[str, Any] | None:
    """The section without keys that are unset; None where nothing is left, which means cells."""
    if not isinstance(section, dict):
        return section
    found = {name: _set(value) if isinstance(value, dict) else value for name, value in section.items()}
    return {name: value for name, value in found.items() if value is not None and value != {}} or None


def _set(section: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in section.items() if value is not None}


def settle_sequences(values: dict[str, Any], entry: Any, wrote: Callable[[str], bool]) -> None:
    """The field of sequences and where they lie, in place, for a run on the catalogue's `entry` (or none); what is written wins."""
    module = values["data_module"]
    transform = module["transform_kwargs"]
    own = entry.sequences.model_dump(exclude_unset=True) if entry is not None and entry.sequences is not None else {}
    written = module.get("sequences") or {}
    both = {name: {**value, **written.get(name, {})} for name, value in own.items() if isinstance(value, dict)}
    module["sequences"] = {**own, **written, **both}
    if entry is not None and not entry.source.env and not written.get("source"):
        module["sequences"]["source"] = entry.source.file
    transform["transforms"] = []
    part = module["sequences"].get("part")
    if part is not None and (entry is None or part not in entry.parts):
        known = (
            f"{entry.name} has {', '.join(entry.parts) or 'none'}"
            if entry is not None
            else "only datasets of the catalogue have parts"
        )
        raise ConfigError(f"{PLACE}.part: there is no part '{part}'; {known}")
    if not wrote("fields"):
        masks = module.get("mlm")
        values["fields"] = sequence_fields(
            module.get("collation_strategy") != "sequence_classification" if masks is None else masks
        )
    # A folder of tables says by itself which are for training: a table alone is split as cells are.
    named = module["sequences"].get("source") or (entry.source.file if entry is not None else None)
    given = {name for name, value in (transform.get("split") or {}).items() if value is not None}
    if not named or given or transform.get("split_column_name") or wrote("data_module.transform_kwargs.split"):
        return
    if str(named).lower().endswith(FASTA):
        held_out = {name for name, value in (module["sequences"].get("windows") or {}).items() if value} & {
            "dev",
            "test",
        }
        transform["split"] = {"column": "split"} if held_out else {"group": "stretch"}
    elif not str(named).endswith(ENDINGS):
        transform["split"] = {"column": "split"}


def check_sequences(run: "RunConfig") -> None:
    """Raise ConfigError where a run on sequences has fields or settings of genes, or a run on cells the field of sequences."""
    module, names = run.data_module, [field.field_name for field in run.fields]
    if module.sequences is None:
        if FIELD in names:
            raise ConfigError(
                f"fields: '{FIELD}' holds pieces of sequences, and {PLACE} is not set; name the data with {PLACE}.source, or use the fields "
                "genes and expressions"
            )
        return
    if names != [FIELD]:
        raise ConfigError(f"fields: sequences have the one field {FIELD}; found {', '.join(names)}")
    kind = type(module)
    if wrong := [name for name in _OF_GENES if getattr(module, name) != kind.model_fields[name].get_default()]:
        raise ConfigError(f"data_module.{wrong[0]}: is about genes, and sequences have none; remove it")
    windows, vocabulary = module.sequences.windows, module.sequences.vocabulary
    if windows.variants and vocabulary.kind == "kmer" and not run.tokenizer.is_folder:
        raise ConfigError(
            f"{PLACE}.windows.variants: pieces of {vocabulary.k} letters have no room for pairs of alleles; set "
            f"{PLACE}.vocabulary.kind to bpe or nucleotide"
        )
    if windows.least_frequency is not None and not windows.variants:
        raise ConfigError(f"{PLACE}.windows.least_frequency: is of variants, and {PLACE}.windows.variants names none")
    if run.fields[0].continuous:
        raise ConfigError(
            f"fields.0: pieces of sequences are tokens; tokenization_strategy must be tokenize, found {run.fields[0].tokenization_strategy}"
        )
