"""What preprocessing does about perturbed cells: read their names, hold perturbations out, give targets a token, write mean profiles."""

import logging
from pathlib import Path
from typing import Any

import pandas as pd

from bmfm_pipeline.config import RunConfig
from bmfm_pipeline.config.splits import SplitPlan
from bmfm_pipeline.data.perturbations import (
    COLUMN,
    CONTROL,
    Perturbations,
    read_perturbations,
    split_by_perturbation,
    write_perturbations,
)
from bmfm_pipeline.data.splits import Split, assign_split
from bmfm_pipeline.errors import DataError

logger = logging.getLogger(__name__)
_SHOWN = 8


def names_of_cells(run: RunConfig, obs: pd.DataFrame) -> Perturbations | None:
    """The perturbation of every cell; None for a run that is not about any. Raises DataError naming the columns that there are."""
    settings = run.data_module.perturbation
    if settings is None:
        return None
    if settings.column not in obs:
        raise DataError(
            f"obs has no column '{settings.column}', which data_module.perturbation.column names; columns: "
            f"{', '.join(sorted(map(str, obs.columns))) or 'none'}"
        )
    if settings.match_column is not None and settings.match_column not in obs:
        raise DataError(
            f"obs has no column '{settings.match_column}', which data_module.perturbation.match_column names; columns: "
            f"{', '.join(sorted(map(str, obs.columns)))}"
        )
    return read_perturbations(
        obs[settings.column].astype(object).to_numpy(), settings.column, settings.dialect, settings.control
    )


def look_at_perturbations(run: RunConfig, obs: pd.DataFrame, genes: list[str]) -> dict[str, Any]:
    """What the names say, for the check of the input."""
    found = names_of_cells(run, obs)
    if found is None:
        return {}
    unmeasured = not_measured(found, genes)
    logger.info(
        "obs['%s']: read as %s: %d perturbations, control cells are those of %s", run.data_module.perturbation.column, found.dialect,
        len(found.targets), ", ".join(f"{value} ({cells})" for value, cells in found.controls.items()),
    )  # fmt: skip
    if unmeasured:
        logger.warning(
            "%d of %d target genes are not among the measured genes, e.g. %s; cells of theirs are %s", len(unmeasured), len(found.genes),
            ", ".join(unmeasured[:_SHOWN]),
            "kept, and the target is shown without a value" if run.data_module.perturbation.unmeasured_targets == "keep" else "not used",
        )  # fmt: skip
    return {
        "perturbations": len(found.targets),
        "perturbation_dialect": found.dialect,
        "control_cells": int(found.is_control.sum()),
        "cells_without_perturbation": int(sum(name is None for name in found.names)),
        "target_genes": len(found.genes),
        "target_genes_not_measured": len(unmeasured),
    }


def not_measured(found: Perturbations, genes: list[str]) -> list[str]:
    """Target genes that are not among `genes`."""
    known = set(genes)
    return [gene for gene in found.genes if gene not in known]


def assign_perturbed(run: RunConfig, obs: pd.DataFrame, plan: SplitPlan, given: Path | None, genes: list[str]) -> Split:
    """The split of perturbed cells: of whole perturbations, or as it is given; control cells are training cells."""
    found = names_of_cells(run, obs)
    names = pd.Series(found.names, index=obs.index, dtype=object)
    notes: dict[str, Any] = {}
    if run.data_module.perturbation.unmeasured_targets == "drop":
        gone = set(not_measured(found, genes))
        out = names.map(lambda name: bool(gone & set(found.targets.get(name, ()))))
        notes["cells_of_unmeasured_targets_not_used"] = int(out.sum())
        logger.warning(
            "%d of %d cells have a target that was not measured and are not used", int(out.sum()), len(names)
        )
        names = names.mask(out, None)
    if plan.method == "perturbation":
        split = split_by_perturbation(names, found.targets, plan)
    else:
        split = assign_split(obs, plan, given)
        split.assigned[names.isna().to_numpy()] = "unused"
        tested = set(names[(split.assigned == "test").to_numpy()]) - {CONTROL}
        both = sorted(tested & set(names[(split.assigned == "train").to_numpy()]))
        if both:
            notes["perturbations_in_train_and_test"] = both
            logger.warning(
                "%d of %d tested perturbations also have training cells (e.g. %s): scores tell about new cells of known perturbations, not "
                "about new perturbations; for those leave the split to data_module.transform_kwargs.split.method=perturbation",
                len(both), len(tested), ", ".join(both[:_SHOWN]),
            )  # fmt: skip
    split.notes.update(notes)
    return split


def with_target_genes(run: RunConfig, obs: pd.DataFrame, genes: list[str]) -> list[str]:
    """The genes of the vocabulary, followed by the targets that were not measured: each perturbation needs a token.

    A tokenizer folder stays as it is: targets that it does not know are shown as [UNK].
    """
    found = names_of_cells(run, obs)
    if found is None or run.tokenizer.is_folder:
        return list(genes)
    return [*genes, *not_measured(found, genes)]


def names_column(run: RunConfig, obs: pd.DataFrame) -> dict[str, Any]:
    """{the obs column of the processed cells that names their perturbation: values (cells,)}."""
    found = names_of_cells(run, obs)
    return {} if found is None else {COLUMN: found.names}


def record_perturbations(run: RunConfig, obs: pd.DataFrame, folder: Path, split_column: str) -> dict[str, Any]:
    """Write what training and evaluation need to know of the processed cells in `folder`; returns numbers for the report."""
    found = names_of_cells(run, obs)
    if found is None:
        return {}
    from bmfm_pipeline.data.store import CellStore

    settings = run.data_module.perturbation
    record = write_perturbations(
        folder,
        CellStore(folder / "processed.h5ad"),
        split_column,
        found,
        {"column": settings.column, "de_genes": settings.de_genes},
    )
    told = (
        "dialect",
        "controls",
        "control_cells",
        "perturbed_cells",
        "singles",
        "combinations",
        "unmeasured",
        "share_with_unmeasured_target",
    )
    return {"perturbations": {name: record[name] for name in told}}
