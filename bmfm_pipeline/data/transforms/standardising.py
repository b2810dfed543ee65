"""One naming for all genes: names of any kind become those of a vocabulary, and columns of one gene are added up."""

from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator
from scipy import sparse

from bmfm_pipeline.config.gene_names import GeneNames
from bmfm_pipeline.data.transforms.columns import ColumnMap
from bmfm_pipeline.data.transforms.renaming import read_map
from bmfm_pipeline.data.transforms.steps import Step, added
from bmfm_pipeline.errors import ConfigError, DataError
from bmfm_pipeline.storage import read_json
from bmfm_pipeline.vocabulary.gene_table import GeneTable, read_hgnc
from bmfm_pipeline.vocabulary.harmonising import GeneNameMapper, Resolution
from bmfm_pipeline.vocabulary.orthologs import read_orthologs

# Spellings of configs of bmfm_targets.
_OLDER = {"aggregate": "sum", "remove": "highest"}


class StandardizeGeneNames(Step):
    """Give genes the names of a vocabulary (null: approved symbols), through a gene table or `gene_map`.

    `gene_map`: {other name: symbol}, or a csv, tsv or JSON file of that; names it does not have are dropped unless `unmapped` is
    keep. Without it `table` (a complete set of HGNC) is used, and names that stay unknown are kept. `dup_gene_strategy`: genes
    that get one name are added up (sum), the one with the highest total over the cells to fit on is kept (highest), or refused.
    What was used is stored with the chain: prediction needs no file, and maps names of other kinds too.
    """

    gives_names: ClassVar[bool] = True

    gene_map: dict[str, str] | str | None = None
    dup_gene_strategy: Literal["sum", "highest", "refuse"] = "sum"
    unmapped: Literal["keep", "drop"] | None = None
    map_orthologs: Literal["mouse_to_human", "human_to_mouse"] | None = None
    one_to_many: Literal["drop", "first"] = "drop"
    # Files enter the key of an artefact by content; their places are not stored.
    table: str | None = Field(None, exclude=True)
    orthologs: str | None = Field(None, exclude=True)
    ortholog_columns: list[str] | None = Field(None, exclude=True)
    vocabulary: list[str] | None = Field(None, exclude=True)
    mapper_: Any = Field(None, exclude=True)
    kept_: dict[str, tuple[str, int]] | None = Field(None, exclude=True)
    totals_: Any = Field(None, exclude=True)
    last_: Any = Field(None, exclude=True)

    @field_validator("dup_gene_strategy", mode="before")
    @classmethod
    def _older_spelling(cls, value: Any) -> Any:
        word = value.lower() if isinstance(value, str) else value
        if word == "rename":
            raise ValueError("rename would give genes names that no vocabulary knows; use sum, highest or refuse")
        return _OLDER.get(word, word)

    @model_validator(mode="after")
    def _one_source(self) -> "StandardizeGeneNames":
        if self.gene_map is not None and self.table is not None:
            raise ValueError("give gene_map or table, not both")
        return self

    @property
    def needs_pass(self) -> bool:  # type: ignore[override]
        return self.dup_gene_strategy == "highest"

    @property
    def mapper(self) -> GeneNameMapper:
        """What maps names; files are read when it is first needed."""
        if self.mapper_ is None:
            if self.gene_map is not None:
                mapping = self.gene_map if isinstance(self.gene_map, dict) else read_map(Path(self.gene_map), _NAME)
                table: GeneTable | None = GeneTable.from_map(mapping)
            else:
                table = None if self.table is None else read_hgnc(self.table)
            if table is None and self.vocabulary is None and self.orthologs is None:
                raise ConfigError(
                    f"{_NAME}: nothing to map names with; run `bmfm genes download` and set "
                    "data_module.transform_kwargs.gene_names.table=hgnc, or give the step a gene_map"
                )
            backwards = self.map_orthologs == "human_to_mouse"
            orthologs = None if self.orthologs is None else read_orthologs(self.orthologs, self.ortholog_columns)
            self.mapper_ = GeneNameMapper(
                table,
                self.vocabulary,
                orthologs,
                "human_to_mouse" if backwards else "mouse_to_human",
                self.one_to_many,
                self.unmapped or ("keep" if self.gene_map is None else "drop"),
            )
        return self.mapper_

    @property
    def merges_repeated(self) -> bool:
        """Whether the input may have a name twice: where names are only compared with a vocabulary, that is a fault of the data."""
        return self.mapper.table is not None or self.mapper.orthologs is not None

    def resolve(self, names: list[str]) -> list[Resolution]:
        """What becomes of each name, in order."""
        if self.last_ is None or self.last_[0] != names:
            self.last_ = (list(names), self.mapper.resolve(names))
        return self.last_[1]

    def genes(self, names: list[str]) -> tuple[list[str], np.ndarray | ColumnMap | None]:
        columns = self._columns(names)
        several = [name for name, found in columns.items() if len(found) > 1]
        if several and self.dup_gene_strategy == "refuse":
            shown = "; ".join(f"{name}: {', '.join(names[at] for at in columns[name])}" for name in several[:5])
            raise DataError(
                f"{_NAME}: {len(several)} genes have several columns ({shown}); set "
                "data_module.transform_kwargs.gene_names.duplicates to sum or highest, or remove columns from the data"
            )
        target = np.full(len(names), -1, dtype=np.int32)
        for position, (name, found) in enumerate(columns.items()):
            target[found if self.dup_gene_strategy == "sum" else self._chosen(name, found, names)] = position
        return list(columns), ColumnMap(target, len(columns)).simplified()

    def _columns(self, names: list[str]) -> dict[str, list[int]]:
        """{new name: columns that get it}, in order of first appearance."""
        columns: dict[str, list[int]] = {}
        for index, entry in enumerate(self.resolve(names)):
            if entry.target is not None:
                columns.setdefault(entry.target, []).append(index)
        return columns

    def _chosen(self, target: str, found: list[int], names: list[str]) -> int:
        """The column to keep: the one with the highest total when fitting; where names differ, the one that has the gene's own."""
        if len(found) == 1:
            return found[0]
        name, occurrence = (self.kept_ or {}).get(target, (target, 0))
        same = [at for at in found if names[at] == name] or [at for at in found if names[at] == target] or found
        return same[min(occurrence, len(same) - 1)]

    def choose(self, names: list[str], totals: np.ndarray) -> None:
        """Settle which of several columns of a gene is kept, by their `totals` (one per name)."""
        self.kept_ = {}
        for target, found in self._columns(names).items():
            if len(found) > 1:
                best = max(found, key=lambda at: totals[at])
                same = [at for at in found if names[at] == names[best]]
                self.kept_[target] = (names[best], same.index(best))

    def observe(self, chunk: sparse.csr_matrix, names: list[str]) -> None:
        totals = np.bincount(chunk.indices, weights=chunk.data, minlength=len(names))
        self.add(totals)

    def seen(self) -> np.ndarray | None:
        totals, self.totals_ = self.totals_, None
        return totals

    def add(self, seen: np.ndarray | None) -> None:
        self.totals_ = added(self.totals_, seen)

    def finish(self, names: list[str]) -> None:
        self.choose(names, np.zeros(len(names)) if self.totals_ is None else self.totals_)
        self.totals_ = None

    def fitted(self) -> dict[str, Any]:
        coding = self.mapper.protein_coding
        return {"mapper": self.mapper.to_plain(), "kept": self.kept_, "protein_coding": coding}

    def restore(self, fitted: dict[str, Any]) -> None:
        if fitted.get("mapper") is not None:
            self.mapper_ = GeneNameMapper.from_plain(fitted["mapper"])
        self.kept_ = fitted.get("kept")


_NAME = "StandardizeGeneNamesTransform"


def protein_coding_genes(transforms_file: str | Path) -> list[str] | None:
    """Protein-coding genes as the processed cells call them, from the stored chain of an artefact or model (transforms.json).

    None where the chain had no gene table.
    """
    path = Path(transforms_file)
    return _protein_coding(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=2)
def _protein_coding(path: Path, changed: int) -> list[str] | None:
    stored = [entry for entry in read_json(path) if entry["transform_name"] == _NAME]
    return next((entry["fitted"]["protein_coding"] for entry in stored if entry["fitted"].get("protein_coding")), None)


def with_standard_names(
    steps: list[dict[str, Any]],
    settings: GeneNames,
    *,
    vocabulary: list[str] | None,
    table: str | None,
    orthologs: str | None,
    map_orthologs: str | None,
) -> list[dict[str, Any]]:
    """A chain's steps with gene names standardised where that can be done: a table, orthologs or a fixed vocabulary is there.

    The step stands where the config puts it, else first, after steps that rename genes by a map of the user. `vocabulary`: the
    gene names of a tokenizer folder, or None when the vocabulary is made from the data. Paths are local files.
    """
    direction = None if orthologs is None else (map_orthologs or "mouse_to_human").removesuffix("_orthologs")
    own = {
        "table": table,
        "vocabulary": vocabulary,
        "orthologs": orthologs,
        "ortholog_columns": settings.ortholog_columns,
        "map_orthologs": direction,
        "one_to_many": settings.one_to_many,
        "dup_gene_strategy": settings.duplicates,
    }
    if any(step["transform_name"] == _NAME for step in steps):
        return [
            step
            if step["transform_name"] != _NAME
            else {**step, "transform_args": _filled(step["transform_args"], own)}
            for step in steps
        ]
    if table is None and orthologs is None and vocabulary is None:
        return steps
    first = 0
    while first < len(steps) and _renames_by_map(steps[first]):
        first += 1
    return [*steps[:first], {"transform_name": _NAME, "transform_args": own}, *steps[first:]]


def _filled(arguments: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    filled = {**own, **arguments}
    if arguments.get("gene_map") is not None:
        filled["table"] = arguments.get("table")
    return filled


def _renames_by_map(step: dict[str, Any]) -> bool:
    arguments = step.get("transform_args") or {}
    renames = arguments.get("gene_map") is not None or arguments.get("upper_case")
    return step["transform_name"] == "RenameGenesTransform" and bool(renames)
