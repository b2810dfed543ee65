"""How files that are no h5ad are read, and a table that says something of each of several files."""

import string
from typing import Any, Literal

from pydantic import Field, field_validator

from bmfm_pipeline.config.strict import Section

PLACE = "data_module.transform_kwargs"
# What each kind of file reads of `reading`; an h5ad reads nothing of it.
READS: dict[str, tuple[str, ...]] = {
    "h5ad": (),
    "h5": ("feature_type", "cell_table"),
    "tenx": ("cell_table",),
    "loom": ("cell_table",),
    "h5mu": ("modality", "cell_table"),
    "table": ("rows", "obs_columns", "cell_table"),
    "rdata": ("r_object", "cell_table"),
    "soma": ("modality", "soma_layer", "cell_filter"),
}


class Reading(Section):
    """How a file that is no h5ad becomes one; each kind of file reads its own keys, and others are refused.

    `rows`: what the rows of a csv or tsv file are; auto looks at the names. `obs_columns`: its columns that describe cells and are no
    genes, beside those that hold text. `cell_table`: a csv or tsv file that describes cells, their names in its first column.
    `modality`: of an h5mu file (default rna), or the measurement of a SOMA experiment (default RNA). `feature_type`: the features of a
    10x h5 file that are genes. `r_object`: the object of an RData file that holds the matrix; null takes sm, else sm2, spliced, or
    the only sparse matrix. `soma_layer`: the layer of X of a SOMA experiment; `cell_filter`: which of its cells, in SOMA's own words.
    """

    rows: Literal["auto", "cells", "genes"] = "auto"
    obs_columns: list[str] = Field(default_factory=list)
    cell_table: str | None = None
    modality: str | None = None
    feature_type: str = "Gene Expression"
    r_object: str | None = None
    soma_layer: str = "raw"
    cell_filter: str | None = None

    def chosen(self) -> dict[str, Any]:
        """The keys that were changed."""
        default = Reading()
        return {name: value for name, value in self.model_dump().items() if value != getattr(default, name)}


class FileTable(Section):
    """A csv or tsv file with a row for each of several files: which of them are used, and columns for obs.

    `table`: its path. `name`: how the name of a file, without its ending, is made of the columns. `query`: which rows, as in pandas:
    columns, comparisons, in, and, or, not; null is all.
    """

    table: str
    name: str = "{SRA Accession}_{SRS Accession}"
    query: str | None = None

    @field_validator("name")
    @classmethod
    def _of_columns(cls, value: str) -> str:
        try:
            parts = list(string.Formatter().parse(value))
        except ValueError as error:
            raise ValueError(f"{value!r} is no pattern: {error}; write columns between braces") from None
        if not any(column for _, column, _, _ in parts):
            raise ValueError(f"{value!r} names no column; write columns between braces, such as '{{SRS Accession}}'")
        if any(rest or kind for _, _, rest, kind in parts):
            raise ValueError(f"{value!r}: only names of columns may stand between braces")
        return value

    @property
    def columns(self) -> list[str]:
        """The columns that make the name."""
        return [column for _, column, _, _ in string.Formatter().parse(self.name) if column]

    def name_of(self, row: dict[str, Any]) -> str | None:
        """The name of the file of a row; None where one of its columns is empty."""
        if any(row[column] is None for column in self.columns):
            return None
        return "".join(
            text + (str(row[column]) if column else "") for text, column, _, _ in string.Formatter().parse(self.name)
        )
