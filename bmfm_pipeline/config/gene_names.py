"""How gene names are brought to one naming before anything else is done with the cells."""

from typing import Literal

from pydantic import Field, model_validator

from bmfm_pipeline.config.strict import Section

# The table that `bmfm genes download` fetched.
DOWNLOADED = "hgnc"
MapOrthologs = Literal["mouse_to_human_orthologs", "human_to_mouse_orthologs"]


class GeneNames(Section):
    """Gene names of the data and those of the vocabulary.

    `table`: null, `hgnc` (what `bmfm genes download` fetched), or the path of a complete set of HGNC. `duplicates`: what is done
    with genes that get one name: `sum` their counts, keep the one with the `highest` total, or `refuse`. `min_share_of_counts`: below
    this share of counts in recognised genes (0 to 1) preprocessing stops. `orthologs`: a csv or tsv file of two columns, the
    genes of the data's species and those of the other; `ortholog_columns` names them where they are not the first two;
    `one_to_many`: a gene with several orthologs is dropped, or mapped to the `first` in the file.
    """

    table: str | None = None
    duplicates: Literal["sum", "highest", "refuse"] = "sum"
    min_share_of_counts: float = Field(0.5, ge=0, le=1)
    orthologs: str | None = None
    ortholog_columns: list[str] | None = Field(None, min_length=2, max_length=2)
    one_to_many: Literal["drop", "first"] = "drop"

    @model_validator(mode="after")
    def _columns_of_a_table(self) -> "GeneNames":
        if self.ortholog_columns is not None and self.orthologs is None:
            raise ValueError("ortholog_columns names columns of a table, but orthologs is not set; name the file there")
        return self


def check_gene_names(settings: GeneNames, map_orthologs: str | None, limit_genes) -> None:
    """ValueError where a key of the data module asks for a table that is not named."""
    if map_orthologs is not None and settings.orthologs is None:
        source, target = map_orthologs.removesuffix("_orthologs").split("_to_")
        raise ValueError(
            f"map_orthologs: {map_orthologs} needs a table of {source} and {target} genes; set "
            "transform_kwargs.gene_names.orthologs to a csv or tsv file with these two columns"
        )
    if limit_genes == "protein_coding" and settings.table is None:
        raise ValueError(
            "limit_genes: protein_coding needs a gene table; run `bmfm genes download` and set "
            "transform_kwargs.gene_names.table=hgnc"
        )
