"""The split step of preprocessing: cells assigned, the record written, and what a person should know about it said."""

import logging
from collections.abc import Sequence
from typing import Any

import pandas as pd

from bmfm_pipeline.config import RunConfig
from bmfm_pipeline.config.splits import PLACE, SplitPlan
from bmfm_pipeline.data.splits import (
    Split,
    assign_split,
    describe_split,
    smallest_class,
    split_column,
    split_sentence,
    write_split,
)
from bmfm_pipeline.stages.fitted_chain import is_for_model
from bmfm_pipeline.stages.jobs import Job
from bmfm_pipeline.stages.perturbations import assign_perturbed
from bmfm_pipeline.stages.splits import refuse_other_split
from bmfm_pipeline.storage import exists, localise, read_json

logger = logging.getLogger(__name__)
# How far the share of a split may be from the one asked for before it is worth a warning.
TOLERANCE = 0.05


def stratified_classes(plan: SplitPlan) -> tuple[str | None, int]:
    """(the column whose classes must be large enough, the fewest cells a class may have) for the check of an input."""
    if plan.method not in ("stratified", "kfold") or plan.group or plan.rare_classes != "error":
        return None, 0
    weights = plan.weights or {}
    rounds = (weights.get("test", 0) > 0) + (weights.get("dev", 0) > 0) if plan.weights else bool(plan.dev_fraction)
    return plan.stratify, smallest_class(plan.n_folds, int(rounds)) if rounds or plan.n_folds else 0


def make_and_record(
    job: Job, plan: SplitPlan, obs, labels: list[str], run: RunConfig | None = None, genes: Sequence[str] = ()
) -> tuple[Split, dict[str, Any]]:
    """Split the cells of `obs` and write split.csv and split.json; `labels` are the columns with one class a cell.

    Perturbed cells are held out as `run` says, `genes` being the measured ones.
    """
    given, earlier = None, {}
    if "split" in job.inputs:
        uri = job.inputs["split"]["uri"]
        given = localise(uri)
        beside = f"{uri[: -len('.csv')]}.json"
        if plan.method == "reuse" and exists(beside):
            known = read_json(localise(beside))
            earlier = {"made_as": {name: value for name, value in known.items() if name not in ("counts_by", "groups")}}
    if is_for_model(job):  # cells to test a model on, and to learn nothing from
        split = Split(pd.Series("test", index=obs.index, dtype=object))
    elif run is not None and run.data_module.perturbation is not None:
        split = assign_perturbed(run, obs, plan, given, list(genes))
    else:
        split = assign_split(obs, plan, given)
    classes = [name for name in dict.fromkeys([*labels, plan.stratify, plan.classes]) if name]
    details = describe_split(obs, split.assigned, classes, plan.group)
    notes = split.notes | _noticed(plan, split, details)
    info = write_split(
        job.staging, split.assigned, split_column(plan), **plan.made_with(), **earlier, notes=notes, **details
    )
    if plan.name:
        refuse_other_split(plan.name, info["hash"], job.place)
    return split, info


def _noticed(plan: SplitPlan, split: Split, details: dict[str, Any]) -> dict[str, Any]:
    """What a person should know about a split, said in the log and returned for its record."""
    rare = split.notes.get("rare_classes_kept_in_train", {})
    if rare:
        logger.warning(
            "%d classes of obs['%s'] are too small for a stratified split and stay in train (%d cells): no score will be about them",
            len(rare), plan.stratify, sum(rare.values()),
        )  # fmt: skip
    if beyond := split.notes.get("names_not_in_data"):
        logger.warning("%s: %d of its cells are not in the data and were passed over", plan.file, beyond)
    if absent := split.notes.get("mapping_without_cells"):
        logger.warning("%s.mapping: no cell has the value %s", PLACE, ", ".join(map(str, absent[:10])))
    found: dict[str, Any] = {}
    if plan.group and plan.weights:
        shares = split.assigned.value_counts(normalize=True)
        off = {name: round(float(shares.get(name, 0)), 4) for name in plan.weights}
        if (
            plan.train_fraction is None
            and plan.cells_per_class is None
            and any(abs(off[name] - plan.weights[name]) > TOLERANCE for name in off)
        ):
            found["shares"] = off
            logger.warning(
                "groups of obs['%s'] stay whole, so that the splits hold %s of the cells, not the shares asked for",
                plan.group, ", ".join(f"{name} {share:.0%}" for name, share in off.items()),
            )  # fmt: skip
    mixed = {
        name: entry for name, entry in details["groups"].items() if name != plan.group and entry["in_train_and_test"]
    }
    for name, entry in mixed.items():
        logger.info(
            "%d values of obs['%s'] have cells in both train and test: scores tell about new cells of them, not about new ones; for those "
            "set %s.group=%s", entry["in_train_and_test"], name, PLACE, name,
        )  # fmt: skip
    return found


def split_summary(info: dict[str, Any]) -> dict[str, Any]:
    """The few lines of a split that are shown with the stage."""
    return {**info["counts"], "split_made": split_sentence(info)}


def split_rows(info: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per split: cells, and groups where there are any."""
    group = info["groups"].get(info.get("group"), {})
    return [
        {"split": name, "cells": count, **({"groups": group[name]} if name in group else {})}
        for name, count in info["counts"].items()
    ]
