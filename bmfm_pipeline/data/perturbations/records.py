"""What a processed artefact knows of its perturbations: perturbation.json, group_means.h5ad, de_genes.json."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bmfm_pipeline.data.perturbations.means import group_moments, ranked_genes, welch_scores
from bmfm_pipeline.data.perturbations.names import COLUMN, CONTROL, Perturbations
from bmfm_pipeline.errors import DataError
from bmfm_pipeline.storage import read_json, write_json_atomic

RECORD, MEANS, DE_GENES = "perturbation.json", "group_means.h5ad", "de_genes.json"
MODEL_RECORD = "perturbation_model.json"  # what a model folder carries of it
SPLITS = ("train", "dev", "test")


@dataclass(frozen=True)
class Profiles:
    """Mean profiles (P, G) of perturbations in a split, by `names`, over `cells` (P,) cells, for `genes`; `control` and `train_mean` (G,)."""

    genes: list[str]
    names: list[str]
    means: np.ndarray
    cells: np.ndarray
    control: np.ndarray
    train_mean: np.ndarray


def write_perturbations(
    folder: Path, store, split_column: str, found: Perturbations, settings: dict[str, Any]
) -> dict[str, Any]:
    """Compute and write the three files from the processed cells of `store`; returns the record.

    Means are of the processed values (as a rule log-normalised) over the cells of a perturbation in one split; the control profile is
    that of the control cells in training, of all where none is; the training mean is the mean of the profiles of the training
    perturbations, each counted once. Genes are ranked by Welch's t against all control cells.
    """
    names, splits = store.column(COLUMN), store.column(split_column)
    named = np.array([name if isinstance(name, str) else "" for name in names], dtype=object)
    is_control = named == CONTROL
    if not is_control.any():
        raise DataError(f"{store.name}: the transforms left no control cell; lower the thresholds of the filters")
    keys = sorted(
        {
            (split, name)
            for split, name in zip(splits, named, strict=True)
            if name not in ("", CONTROL) and split in SPLITS
        }
    )
    place = {key: number for number, key in enumerate(keys)}
    groups = np.array([place.get(key, -1) for key in zip(splits, named, strict=True)], dtype=np.int64)
    groups[is_control] = len(keys)
    moments = group_moments(store, groups, len(keys) + 1)
    in_training = is_control & (splits == "train")
    control = moments.means[-1]
    if 0 < in_training.sum() < is_control.sum():
        control = group_moments(store, np.where(in_training, 0, -1), 1).means[0]
    trained = [number for number, (split, _) in enumerate(keys) if split == "train"]
    train_mean = moments.means[trained].mean(axis=0) if trained else control
    _write_means(folder / MEANS, store.var_names, keys, moments, control, train_mean, int(is_control.sum()))
    ranked = ranked_genes(welch_scores(moments, len(keys)), settings["de_genes"])
    # Of a perturbation in several splits the list is that of the cells that are tested.
    order = sorted(range(len(keys)), key=lambda number: SPLITS.index(keys[number][0]))
    write_json_atomic(
        folder / DE_GENES, {keys[number][1]: [store.var_names[column] for column in ranked[number]] for number in order}
    )
    record = _record(store, keys, moments.cells, found, settings, is_control)
    write_json_atomic(folder / RECORD, record)
    return record


def _record(store, keys, cells, found: Perturbations, settings: dict[str, Any], is_control) -> dict[str, Any]:
    measured = set(store.var_names)
    present = sorted({name for _, name in keys})
    missing = sorted({gene for name in present for gene in found.targets[name]} - measured)
    entries: dict[str, Any] = {}
    for number, (split, name) in enumerate(keys):
        entry = entries.setdefault(name, {"targets": list(found.targets[name]), "cells": {}})
        entry["cells"][split] = int(cells[number])
    without = [name for name in present if set(found.targets[name]) & set(missing)]
    total = int(cells[:-1].sum())
    there = int(sum(sum(entries[name]["cells"].values()) for name in without))
    return {
        **settings,
        "dialect": found.dialect,
        "controls": found.controls,
        "control_cells": int(is_control.sum()),
        "perturbed_cells": total,
        "perturbations": entries,
        "singles": sum(len(entry["targets"]) == 1 for entry in entries.values()),
        "combinations": sum(len(entry["targets"]) > 1 for entry in entries.values()),
        "targets": sorted({gene for entry in entries.values() for gene in entry["targets"]}),
        "unmeasured": missing,
        "cells_with_unmeasured_target": there,
        "share_with_unmeasured_target": round(there / total, 4) if total else 0.0,
        "in_several_splits": sorted(name for name, entry in entries.items() if len(entry["cells"]) > 1),
    }


def _write_means(path: Path, genes, keys, moments, control, train_mean, controls: int) -> None:
    import anndata
    import pandas as pd

    trained = int(sum(count for count, (split, _) in zip(moments.cells[:-1], keys, strict=True) if split == "train"))
    obs = pd.DataFrame(
        {
            "perturbation": [*(name for _, name in keys), CONTROL, "Average_Perturbation_Train"],
            "split": [*(split for split, _ in keys), "train", "train"],
            "cells": [*moments.cells[:-1].tolist(), controls, trained],
        }
    )
    obs.index = [f"{split}/{name}" for split, name in zip(obs["split"], obs["perturbation"], strict=True)]
    values = np.vstack([moments.means[:-1], control, train_mean])
    anndata.AnnData(values, obs=obs, var=pd.DataFrame(index=list(genes))).write_h5ad(path)


def read_record(folder: Path) -> dict[str, Any]:
    """perturbation.json of a processed artefact. Raises DataError where there is none."""
    if not (Path(folder) / RECORD).exists():
        raise DataError(
            f"{folder}: was not made from perturbed cells; run `bmfm preprocess FILE -cn perturbation_train_config "
            "data_module.perturbation.column=COLUMN`"
        )
    return read_json(Path(folder) / RECORD)


def read_profiles(folder: Path, split: str) -> Profiles:
    """The mean profiles of the perturbations of one split."""
    import anndata

    table = anndata.read_h5ad(Path(folder) / MEANS)
    named, values = table.obs["perturbation"].astype(str).to_numpy(), np.asarray(table.X, dtype=np.float64)
    own = np.flatnonzero((table.obs["split"].astype(str).to_numpy() == split)[: len(named) - 2])
    return Profiles(
        table.var_names.astype(str).tolist(),
        named[own].tolist(),
        values[own],
        table.obs["cells"].to_numpy()[own],
        values[-2],
        values[-1],
    )


def read_de_genes(folder: Path) -> dict[str, list[str]]:
    """{perturbation: genes by falling evidence of a change}."""
    return read_json(Path(folder) / DE_GENES)
