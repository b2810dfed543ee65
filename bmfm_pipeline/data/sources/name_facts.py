"""What the gene names of a file are: symbols or ids, whose, damaged or repeated; and where other names lie in var."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from bmfm_pipeline.vocabulary.gene_table import ENSEMBL
from bmfm_pipeline.vocabulary.harmonising import describe_names
from bmfm_pipeline.vocabulary.spreadsheet import readings

SHOWN = 5
LONGEST_READ = 200_000  # names of a var column that are looked at


def name_facts(names: Sequence[str], var=None) -> dict[str, Any]:
    """Kind, species and share of `names` that fit it, with counts and examples of repeats, dates and Ensembl versions.

    "columns" lists the columns of `var` (DataFrame) that hold gene names too: {"name", "kind", "species"}.
    """
    naming = describe_names(names)
    repeated = [name for name, count in Counter(names).items() if count > 1]
    dates = [name for name in names if readings(name)]
    versions = sum(bool(match and match[2]) for match in map(ENSEMBL.match, names))
    stems = Counter(str(name).split("_ENSG")[0] for name in names)
    return {
        "kind": naming.kind,
        "species": naming.species,
        "share": round(naming.share, 3),
        "examples": [str(name) for name in names[:SHOWN]],
        "repeated": len(repeated),
        "repeated_examples": repeated[:SHOWN],
        "repeated_once_cut": sum(count > 1 for count in stems.values()) - len(repeated),
        "dates": len(dates),
        "dates_examples": dates[:SHOWN],
        "with_version": versions,
        "columns": _columns(var),
    }


def _columns(var) -> list[dict[str, str]]:
    found = []
    for name in var.columns if var is not None else ():
        values = var[name]
        if values.dtype.kind in "fiub" or values.nunique() < len(values) / 2:
            continue
        naming = describe_names([str(value) for value in values.dropna().head(LONGEST_READ)])
        if naming.kind in ("Ensembl ids", "gene symbols") and naming.share > 0.5:
            found.append({"name": str(name), "kind": naming.kind, "species": naming.species})
    return found


def name_problems(facts: dict[str, Any]) -> list[str]:
    """What of it stands in the way, each with what to do."""
    problems = []
    place = "data_module.transform_kwargs"
    symbols = [entry["name"] for entry in facts["columns"] if entry["kind"] == "gene symbols"]
    if facts["repeated"]:
        shown = ", ".join(facts["repeated_examples"])
        problems.append(
            f"{facts['repeated']:,} gene names repeat (e.g. {shown}): add {place}.duplicate_genes=sum (or first)"
        )
    if facts["kind"] == "Ensembl ids":
        from_var = f", or by RenameGenesTransform with gene_map=var:{symbols[0]}" if symbols else ""
        problems.append(
            "genes are Ensembl ids, which a vocabulary of symbols does not know: they are mapped by `bmfm genes download` and "
            f"{place}.gene_names.table=hgnc{from_var}; a vocabulary built from this data needs neither"
        )
    if facts["kind"] == "numbers":
        problems.append(
            "gene names are numbers: give genes their names"
            + (f"; var['{symbols[0]}'] holds symbols" if symbols else "")
        )
    if facts["dates"]:
        problems.append(
            f"{facts['dates']:,} gene names were made dates by a spreadsheet (e.g. {', '.join(facts['dates_examples'])}): "
            f"`bmfm genes download` and {place}.gene_names.table=hgnc bring most back"
        )
    if facts["species"] not in ("", "human"):
        problems.append(
            f"genes are those of {facts['species']}: a vocabulary or model of human genes needs them mapped (data_module.map_orthologs)"
        )
    return problems
