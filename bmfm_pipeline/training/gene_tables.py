"""Tables by gene that a run names by path: read for the batch builder, copied into the model folder, found there again."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from bmfm_pipeline.batching import (
    GeneTables,
    gene_mask_weights,
    genome_places,
    read_gene_list,
    read_gene_numbers,
    read_gene_positions,
)
from bmfm_pipeline.config import RunConfig, require_path
from bmfm_pipeline.config.reshaping import SelectiveDropout, table_paths, with_table_paths
from bmfm_pipeline.data.transforms.standardising import protein_coding_genes
from bmfm_pipeline.errors import DataError
from bmfm_pipeline.storage import localise

FOLDER = "gene_tables"


def builder_options(run: RunConfig, names: list[str], chain_file: Path) -> dict[str, Any]:
    """What `BatchBuilder` is given beside fields and settings, for cells whose gene columns are `names`.

    `chain_file`: the stored transforms of the data or model, which know the protein-coding genes.
    Raises DataError for a table that cannot be read or knows none of the genes.
    """
    module = run.data_module
    paths = {key: _local(path, key) for key, path in table_paths(module).items()}
    options: dict[str, Any] = {"tables": _tables(module, paths, names, chain_file)}
    strategy = module.masking_strategy
    if strategy is not None and strategy.pattern_weights:
        options["mask_weights"] = gene_mask_weights(names, strategy.pattern_weights)
    return options


def _tables(module, paths: dict[str, Path], names: list[str], chain_file: Path) -> GeneTables:
    medians = places = chromosomes = None
    if "median_normalization" in paths:
        known = read_gene_numbers(paths["median_normalization"], ("median",), "median_normalization")
        _some_known(known, names, "median_normalization", paths)
        medians = np.array([known.get(name, np.nan) for name in names], dtype=np.float32)
        medians[~(medians > 0)] = np.nan  # a gene whose median is 0 cannot be divided by it
    if "gene_positions" in paths:
        positions = read_gene_positions(paths["gene_positions"])
        _some_known(positions, names, "gene_positions", paths)
        places, chromosomes = genome_places(
            [positions[name][0] if name in positions else None for name in names],
            [positions[name][1] if name in positions else 0.0 for name in names],
        )
    weights = None
    if module.selective_dropout is not None:
        weights = _dropout_weights(module.selective_dropout, paths, names)
    return GeneTables(
        allowed=_allowed(module, paths, names, chain_file),
        medians=medians,
        places=places,
        chromosomes=chromosomes,
        dropout_weights=weights,
    )


def _allowed(module, paths: dict[str, Path], names: list[str], chain_file: Path) -> np.ndarray | None:
    if module.limit_genes in (None, "tokenizer"):
        return None
    if module.limit_genes == "protein_coding":
        listed = protein_coding_genes(chain_file)
        if listed is None:
            raise DataError(
                f"{chain_file.parent}: was prepared without a gene table, so data_module.limit_genes=protein_coding has no list; set "
                "data_module.transform_kwargs.gene_names.table=hgnc (after `bmfm genes download`) and preprocess again"
            )
    else:
        listed = module.limit_genes if isinstance(module.limit_genes, list) else read_gene_list(paths["limit_genes"])
    _some_known(listed, names, "limit_genes", paths)
    wanted = set(listed)
    return np.array([name in wanted for name in names])


def _dropout_weights(settings: SelectiveDropout, paths: dict[str, Path], names: list[str]) -> np.ndarray:
    weights = gene_mask_weights(names, settings.pattern_weights or [])
    if "selective_dropout" in paths:
        known = read_gene_numbers(paths["selective_dropout"], ("weight",), "selective_dropout.weights")
        _some_known(known, names, "selective_dropout", paths)
        weights *= np.array([known.get(name, 1.0) for name in names], dtype=np.float32)
    return weights


def _local(path: str, key: str) -> Path:
    found = Path(localise(require_path(path, f"data_module.{key}")))
    if not found.is_file():
        raise DataError(f"data_module.{key}: {found}: no such file")
    return found


def _some_known(genes, names: list[str], key: str, paths: dict[str, Path]) -> None:
    if not set(genes).intersection(names):
        raise DataError(
            f"data_module.{key}: none of the {len(set(genes))} genes of {paths.get(key, 'the list')} is a gene of the data "
            f"({', '.join(names[:5])}, ...); check that both name genes alike"
        )


def keep_tables(run: RunConfig, folder: Path) -> None:
    """Copy the tables of a run into a model folder, so that prediction needs no other file."""
    for key, path in table_paths(run.data_module).items():
        (folder / FOLDER).mkdir(exist_ok=True)
        shutil.copyfile(_local(path, key), folder / FOLDER / f"{key}.csv")


def with_kept_tables(module: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The plain data module section with the tables that lie in a model folder in place of the paths it was trained with."""
    kept = {path.stem: str(path) for path in sorted((folder / FOLDER).glob("*.csv"))}
    return with_table_paths(module, kept)
