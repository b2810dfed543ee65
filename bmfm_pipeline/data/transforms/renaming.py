"""Gene names: cut, upper-cased, or mapped by a table, a file, or a column of the data's own var table."""

import csv
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from bmfm_pipeline.data.transforms.columns import ColumnMap
from bmfm_pipeline.data.transforms.steps import Step
from bmfm_pipeline.errors import ConfigError, DataError
from bmfm_pipeline.storage import read_json

_COLUMN = "var:"


class RenameGenes(Step):
    """Rename genes; genes that the map does not name are dropped, and of genes that get one name the first stays, or, with
    `duplicates` sum, all are added up: then several files come to the same genes in whatever order they are read.

    gene_map null cuts names at `_ENSG`; a mapping renames; "var:COLUMN" takes the new names from that column of var; any other
    text is a file: JSON {old: new}, or csv/tsv with the old name first and the new one second. `upper_case` then upper-cases.
    """

    gives_names: ClassVar[bool] = True
    gene_map: dict[str, str] | str | None = None
    upper_case: bool = False
    duplicates: Literal["first", "sum"] = "first"
    map_: dict[str, str] | None = Field(None, exclude=True)

    def look_at(self, source) -> None:
        if not (isinstance(self.gene_map, str) and self.gene_map.startswith(_COLUMN)):
            return
        column = self.gene_map.removeprefix(_COLUMN)
        if column not in source.var:
            raise DataError(
                f"{source.path}: RenameGenesTransform: var has no column '{column}' "
                f"(columns: {', '.join(map(str, source.var.columns)) or 'none'})"
            )
        new = source.var[column]
        self.map_ = {
            old: str(name) for old, name in zip(source.var_names, new, strict=True) if name == name and str(name)
        }

    def _mapping(self) -> dict[str, str] | None:
        if isinstance(self.gene_map, dict) or self.gene_map is None:
            return self.gene_map
        if self.map_ is None:
            if self.gene_map.startswith(_COLUMN):
                raise ConfigError(
                    f"RenameGenesTransform: gene_map {self.gene_map} needs the data's var table; fit the chain first"
                )
            self.map_ = read_map(Path(self.gene_map))
        return self.map_

    def renamed(self, names: list[str]) -> list[str | None]:
        """The new name of each gene, None where the map has none."""
        mapping = self._mapping()
        if mapping is None:
            new: list[str | None] = [name.split("_ENSG")[0] for name in names]
        else:
            new = [mapping.get(name) for name in names]
            if names and not any(new):
                raise DataError(
                    f"RenameGenesTransform: gene_map names none of the {len(names)} genes, e.g. {', '.join(names[:5])}; "
                    f"it maps from names such as {', '.join(list(mapping)[:5])}"
                )
        return [name and name.upper() for name in new] if self.upper_case else new

    def genes(self, names: list[str]) -> tuple[list[str], np.ndarray | ColumnMap | None]:
        renamed = self.renamed(names)
        if self.duplicates == "sum":
            place: dict[str, int] = {}
            target = [-1 if name is None else place.setdefault(name, len(place)) for name in renamed]
            return list(place), ColumnMap(np.array(target, dtype=np.int32), len(place)).simplified()
        first: dict[str, int] = {}
        for index, name in enumerate(renamed):
            if name is not None:
                first.setdefault(name, index)
        keep = np.fromiter(first.values(), dtype=np.int64, count=len(first))
        return list(first), None if len(keep) == len(names) else keep

    def fitted(self) -> dict[str, Any]:
        return {"map": self.map_}

    def restore(self, fitted: dict[str, Any]) -> None:
        self.map_ = fitted.get("map")


def read_map(path: Path, step: str = "RenameGenesTransform") -> dict[str, str]:
    """{old name: new name} of a JSON object, or of the first two columns of a csv or tsv file; errors name the `step`."""
    if not path.exists():
        raise DataError(
            f"{step}: gene_map {path}: no such file (RenameGenesTransform also takes a column of var: var:COLUMN)"
        )
    if path.suffix == ".json":
        stored = read_json(path)
        if not isinstance(stored, dict):
            raise DataError(f"{step}: gene_map {path}: expected a JSON object {{old name: new name}}")
        return {str(old): str(new) for old, new in stored.items() if new}
    with open(path, newline="") as lines:
        rows = list(csv.reader(lines, delimiter="\t" if path.suffix == ".tsv" else ","))
    if any(len(row) < 2 for row in rows if row):
        raise DataError(f"{step}: gene_map {path}: every line needs an old and a new name")
    return {row[0]: row[1] for row in rows if row and row[1]}
