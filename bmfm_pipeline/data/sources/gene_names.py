"""Do the gene names of a file mean anything to a vocabulary, and are they genes at all."""

import re
from collections.abc import Sequence

from bmfm_pipeline.errors import DataError
from bmfm_pipeline.vocabulary.harmonising import describe_names

SHOWN = 10
# Below this share of known names the wrong kind of name, species or vocabulary is more likely than a panel of rare genes.
MIN_KNOWN_SHARE = 0.1
_ENSEMBL = re.compile(r"^ENS[A-Z]*[GTP]\d{6,}(\.\d+)?$")
_BARCODE = re.compile(r"(^|[^A-Z])[ACGTN]{10,}([-_.x]|$)")
_GENE = re.compile(r"^(MT-[A-Z]|RP[LS]\d|ENS[A-Z]*G\d{6,}|HLA-|ACTB$|GAPDH$|CD\d|MALAT1$|B2M$)")


def check_genes(
    names: Sequence[str],
    known: Sequence[str] | set[str],
    vocabulary: str,
    min_share: float = MIN_KNOWN_SHARE,
    cure: str | None = None,
) -> dict:
    """How many of `names` the vocabulary (its tokens in `known`, its name for messages in `vocabulary`) knows.

    Returns {"genes", "known", "unknown", "unknown_examples"}. Raises DataError when it knows none, or less than `min_share` of
    them, and says what kind of name the file seems to hold; `cure` says what to do where that is not a matter of the config.
    """
    known = set(known)
    unknown = [name for name in names if name not in known]
    n_known = len(names) - len(unknown)
    report = {"genes": len(names), "known": n_known, "unknown": len(unknown), "unknown_examples": unknown[:SHOWN]}
    if names and n_known / len(names) >= min_share and n_known:
        return report
    found = (
        f"none of the {len(names)} gene names"
        if not n_known
        else f"only {n_known} of the {len(names)} gene names ({n_known / len(names):.1%})"
    )
    advice = f"They look like {describe_names(unknown)}. {cure}" if cure is not None else _advice(unknown, known)
    raise DataError(
        f"var: {vocabulary} knows {found}; not known are e.g. {', '.join(unknown[:SHOWN])}. {advice}"
        f"{'' if cure else ' Or build the vocabulary from this data (tokenizer.identifier=data)'}"
    )


def _advice(unknown: list[str], known: set[str]) -> str:
    ensembl = sum(bool(_ENSEMBL.match(name)) for name in unknown)
    if ensembl > len(unknown) / 2:
        return (
            "These are Ensembl ids and the vocabulary holds gene symbols: run `bmfm genes download` and set "
            "data_module.transform_kwargs.gene_names.table=hgnc, or map them with RenameGenesTransform, gene_map=var:COLUMN "
            "(a var column that holds symbols) or gene_map=FILE (csv or json of id and symbol)."
        )
    upper = sum(name.upper() in known for name in unknown)
    if upper > len(unknown) / 2:
        return f"{upper} of them are known in upper case: set upper_case=true in RenameGenesTransform (and check the species)."
    cut = sum(name.split("_ENSG")[0] in known or name.split(".")[0] in known for name in unknown)
    if cut > len(unknown) / 2:
        return f"{cut} of them are known without what follows `_ENSG` or the dot: add RenameGenesTransform to the transforms."
    return (
        f"They look like {describe_names(unknown)}. Check the species and the kind of gene name; a table of older and other names "
        "helps: `bmfm genes download`, then data_module.transform_kwargs.gene_names.table=hgnc."
    )


def looks_transposed(cell_names: Sequence[str], gene_names: Sequence[str]) -> str | None:
    """A sentence when rows look like genes and columns like cells, else None."""
    rows, columns = [str(name) for name in cell_names[:2000]], [str(name) for name in gene_names[:2000]]
    genes_in_rows = [name for name in rows if _GENE.match(name)]
    genes_in_columns = [name for name in columns if _GENE.match(name)]
    barcodes = [name for name in columns if _BARCODE.search(name)]
    if (genes_in_rows and len(genes_in_rows) > len(rows) / 100 and not genes_in_columns) or (
        len(barcodes) > len(columns) / 2 and not genes_in_columns and not any(_BARCODE.search(name) for name in rows)
    ):
        row, column = (genes_in_rows or rows)[0], (barcodes or columns)[0]
        return (
            f"cells and genes look swapped: obs names look like genes (e.g. {row}) and var names like cells (e.g. {column}); "
            "cells must be rows: write adata.T, or `adata.transpose()`, to a new file"
        )
    return None
