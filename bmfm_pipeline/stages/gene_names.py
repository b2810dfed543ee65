"""Gene names in a stage: which tables are used, the steps that standardise names, and the report of what became of each."""

import logging
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from bmfm_pipeline.config import RunConfig, require_path
from bmfm_pipeline.data.gene_report import CATEGORIES, GeneReport, report_genes
from bmfm_pipeline.data.transforms import Chain
from bmfm_pipeline.data.transforms.standardising import StandardizeGeneNames, with_standard_names
from bmfm_pipeline.errors import DataError
from bmfm_pipeline.stages.gene_tables import KEY, gene_inputs, local_gene_table, orthologs_uri
from bmfm_pipeline.stages.vocabularies import fixed_vocabularies
from bmfm_pipeline.storage import localise, write_json_atomic

logger = logging.getLogger(__name__)
# Below this share of counts, going on with the genes that are known is no advice to give.
LEAST_SENSIBLE_SHARE = 0.1


def chain_steps(run: RunConfig) -> list[dict[str, Any]]:
    """The steps of the config, with gene names standardised where a table, orthologs or a fixed vocabulary is there."""
    settings = run.data_module.transform_kwargs
    steps = [step.model_dump() for step in settings.transforms or []]
    table, orthologs = local_gene_table(run), orthologs_uri(run)
    return with_standard_names(
        steps,
        settings.gene_names,
        vocabulary=_fixed_genes(run, table),
        table=None if table is None else str(table),
        orthologs=None if orthologs is None else str(localise(orthologs)),
        map_orthologs=run.data_module.map_orthologs,
    )


def _fixed_genes(run: RunConfig, table: Path | None) -> list[str] | None:
    """Gene names of a vocabulary that does not depend on the cells."""
    if run.tokenizer.identifier == "data":
        return None
    if not run.tokenizer.is_folder:
        return _genes(run, table)
    folder = localise(require_path(run.tokenizer.identifier, "tokenizer.identifier"))
    return _folder_genes(str(folder), folder.stat().st_mtime_ns if folder.exists() else 0)


@lru_cache(maxsize=1)
def _folder_genes(folder: str, changed: int) -> list[str] | None:
    from bmfm_pipeline.vocabulary import MultiFieldVocabulary

    genes = MultiFieldVocabulary.load(folder).get("genes")
    return None if genes is None else genes.tokens[genes.n_special :]


def _genes(run: RunConfig, table: Path | None) -> list[str]:
    genes = fixed_vocabularies(run, table=table)["genes"]
    return genes.tokens[genes.n_special :]


def merges_genes(chain: Chain) -> bool:
    """Whether columns of one name are dealt with by the chain, so that the input may have them."""
    return any(step.merges_repeated for _, step in _standardising(chain))


def _standardising(chain: Chain) -> list[tuple[str, StandardizeGeneNames]]:
    return [(name, step) for name, step in chain.steps if isinstance(step, StandardizeGeneNames)]


def check_gene_names(run: RunConfig, chain: Chain, cells, totals: np.ndarray, inputs: dict[str, Any]) -> GeneReport:
    """The gene report of opened `cells`, whose genes hold `totals` of counts.

    Raises DataError below the floor of counts in known genes: only where names are compared with something.
    """
    settings = run.data_module.transform_kwargs.gene_names
    for role, entry in gene_inputs(run, None).items():
        if role in inputs and inputs[role]["id"] != entry["id"]:
            raise DataError(f"{entry['uri']}: changed since the run began; run again, its new content makes other data")
    report = report_genes(
        chain,
        list(cells.var_names),
        totals,
        *compared_with(run),
        tables={role: entry["id"] for role, entry in inputs.items() if role in ("gene_table", "orthologs")},
        duplicates=settings.duplicates,
        min_share_of_counts=settings.min_share_of_counts,
    )
    if has_floor(run, chain):
        report.check(settings.min_share_of_counts, advice(run, report, cells))
    return report


def _grows(run: RunConfig) -> bool:
    return any(entry.field_name == "genes" and entry.vocab_update_strategy == "dynamic" for entry in run.fields)


def has_floor(run: RunConfig, chain: Chain) -> bool:
    """Whether names are compared with something, so that a share of counts in known genes can be asked for."""
    return bool(_standardising(chain)) and not _grows(run)


def compared_with(run: RunConfig) -> tuple[str, list[str] | None]:
    """(what gene names are compared with, in words, its genes or None where the data's own genes become the vocabulary)."""
    settings = run.data_module.transform_kwargs.gene_names
    fixed = _fixed_genes(run, local_gene_table(run))
    name = "the vocabulary of the data" if fixed is None else run.tokenizer.identifier
    if fixed is None and settings.table is not None:
        name = f"the gene table {Path(settings.table).name}"
    elif fixed is None and settings.orthologs is not None:
        name = f"the ortholog table {Path(settings.orthologs).name}"
    return name, None if _grows(run) else fixed


def write_gene_report(report: GeneReport, folder: Path, more: dict[str, Any] | None = None) -> dict[str, float]:
    """gene_report.json, with what is in `more`, and gene_names.csv in `folder`; what a person should know at once is logged.

    Returns the numbers.
    """
    found = report.to_dict() | (more or {})
    write_json_atomic(folder / "gene_report.json", found)
    report.write_csv(folder / "gene_names.csv")
    renamed, merged, ambiguous = (len(report.of(name)) for name in ("renamed", "merged", "ambiguous"))
    if renamed or merged or ambiguous:
        logger.info(
            "gene names: %d renamed, %d added to another column of their gene, %d ambiguous; %.1f%% of counts are in known genes "
            "(gene_report.json)",
            renamed, merged, ambiguous, 100 * report.share_of_counts,
        )  # fmt: skip
    if found["spreadsheet"]["names"]:
        examples = "; ".join(found["spreadsheet"]["examples"])
        logger.warning("%d gene names were made dates by a spreadsheet: %s", found["spreadsheet"]["names"], examples)
    return {name: found[name] for name in (*CATEGORIES, "share_of_counts_kept")}


def advice(run: RunConfig, report: GeneReport, cells) -> list[str]:
    """What to set, most likely first."""
    settings = run.data_module.transform_kwargs.gene_names
    lines = []
    if report.naming.species not in ("", "human") and settings.orthologs is None:
        lines.append(
            f"these are {report.naming.species} genes: name a table of orthologs, {KEY}.orthologs=FILE (columns: {report.naming.species} "
            "gene, human gene), or build the vocabulary from this data"
        )
    columns = [str(name) for name in cells.var.columns if _holds_names(cells.var[name])]
    if columns:
        lines.append(
            f"var has a column '{columns[0]}': begin the transforms with RenameGenesTransform, gene_map=var:{columns[0]}"
        )
    if settings.table is None:
        lines.append(
            f"run `bmfm genes download` and set {KEY}.table=hgnc: Ensembl ids, older symbols and aliases are then known"
        )
    if run.tokenizer.identifier != "data":
        lines.append("build the vocabulary from this data: tokenizer.identifier=data")
    lines.append("ask what a name resolves to with `bmfm genes show NAME`")
    if report.share_of_counts > LEAST_SENSIBLE_SHARE:
        lines.append(f"go on with what is known: {KEY}.min_share_of_counts={report.share_of_counts * 0.9:.2f}")
    return lines


def _holds_names(column) -> bool:
    values = [value for value in column.iloc[:200].tolist() if isinstance(value, str) and value]
    return len(values) > len(column.iloc[:200]) / 2 and len(set(values)) > len(values) / 2
