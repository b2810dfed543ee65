"""What an evaluation does about perturbations: one pass over the test pairs, then scores beside what knows nothing of the perturbation."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bmfm_pipeline.config import RunConfig
from bmfm_pipeline.data.perturbations import read_de_genes, read_profiles
from bmfm_pipeline.errors import DataError
from bmfm_pipeline.evaluation.pair_predictions import (
    FILE,
    predict_profiles,
    read_profile_predictions,
    write_profiles,
)
from bmfm_pipeline.evaluation.perturbation import GroupMeans, evaluate_perturbations, ridge_profiles
from bmfm_pipeline.evaluation.rows import Evaluation, Settings
from bmfm_pipeline.training.prepared import PreparedData

SCORES = "perturbations.csv"


def predict_perturbations(
    run: RunConfig, trained: RunConfig, model, data, folder: Path, on_batch: Callable[[int], None]
) -> list[str]:
    """Predict the test pairs of `data` and store the mean profiles in `folder`; returns the names of the cells."""
    from bmfm_pipeline.objectives import build_objectives

    prepared: PreparedData = data.prepared
    losses = [entry for entry in trained.trainer.losses or [] if "field_name" in entry]
    objectives = build_objectives(losses, prepared.field_dicts(trained), [], prepared.token_values(trained))
    genes = prepared.store.var_names
    found = predict_profiles(
        model,
        data.test_dataloader(),
        objectives,
        prepared.vocabularies["genes"].ids(genes),
        genes,
        input_rows(run),
        {"train_mean": prepared.perturbed.profiles("train").train_mean},
        on_batch=on_batch,
        device="cuda" if run.task.accelerator == "gpu" else "cpu",
        precision=run.task.precision,
    )
    write_profiles(folder / FILE, found, measured_means(prepared.folder, "test").of(found.perturbations))
    return [str(name) for name in prepared.store.obs_names[data.rows["test"]]]


def input_rows(run: RunConfig) -> dict[str, int]:
    """{input field: its row in input_ids}."""
    return {name: row for row, name in enumerate(entry.field_name for entry in run.fields if entry.is_input)}


def measured_means(folder: Path, split: str) -> GroupMeans:
    """The measured profiles of the perturbations of a split, with what they are compared with."""
    found = read_profiles(folder, split)
    return GroupMeans(found.genes, found.names, found.means, found.control, found.train_mean)


def score_perturbations(
    evaluation: Evaluation, run: RunConfig, prepared: PreparedData, folder: Path, settings: Settings
) -> None:
    """Add rows, verdicts and notes on the stored profiles of `folder`, and write perturbations.csv there."""
    file = folder / FILE
    if not file.exists():
        return
    found, perturbed = read_profile_predictions(file), prepared.perturbed
    means = measured_means(prepared.folder, "test")
    missing = sorted(set(means.perturbations) - set(found.perturbations))
    if missing:
        raise DataError(f"{file}: has no prediction for {', '.join(missing[:5])}; run the evaluation again")
    means = means.of(found.perturbations)
    predicted, filled = found.filled(means.train_mean)
    if filled:
        evaluation.notes.append(
            f"perturbation: {filled} of {predicted.size} predicted values are those of the training mean, for their genes did not fit into a "
            "batch (data_module.max_length) or were not shown (dataset_kwargs.expose_zeros)"
        )
    training = perturbed.profiles("train")
    targets = {name: entry["targets"] for name, entry in perturbed.perturbations.items()}
    singles = {
        targets[name][0]: training.means[row] for row, name in enumerate(training.names) if len(targets[name]) == 1
    }
    linear = ridge_profiles(
        [targets[name] for name in means.perturbations],
        [targets[name] for name in training.names],
        training.means,
        training.train_mean,
    )
    entries = evaluate_perturbations(
        evaluation,
        predicted,
        means,
        settings,
        singles=singles,
        de_genes=read_de_genes(prepared.folder),
        others={"ridge": linear},
    )
    evaluation.notes.append(f"perturbation: {perturbed.sentence()}")
    groups = _groups(prepared.folder)
    if counted := [
        f"{group} {sum(groups.get(name) == group for name in means.perturbations)}"
        for group in sorted(set(groups.values()))
        if group.endswith("_test")
    ]:
        evaluation.notes.append(f"perturbation: tested are {', '.join(counted)}")
    evaluation.notes.append(
        "perturbation: profiles are means of the processed values over cells; control cells are those of training, and stand beside the test "
        f"cells too; pairs are {'drawn within ' + run.data_module.perturbation.match_column if run.data_module.perturbation.match_column else 'drawn at random'}"
    )
    _write(folder / SCORES, entries, perturbed, groups)


def _groups(folder: Path) -> dict[str, str]:
    notes = json.loads((folder / "split.json").read_text()).get("notes") or {}
    return notes.get("perturbation_groups", {})


def _write(path: Path, entries: list[dict[str, Any]], perturbed, groups: dict[str, str]) -> None:
    if not entries:
        return
    about = perturbed.perturbations
    unmeasured = set(perturbed.unmeasured)
    with open(path, "w", newline="") as stream:
        writer = csv.DictWriter(
            stream, ["perturbation", "model", "group", "test_cells", "targets_not_measured", *list(entries[0])[2:]]
        )
        writer.writeheader()
        for entry in entries:
            own = about[entry["perturbation"]]
            writer.writerow(
                {
                    **entry,
                    "group": groups.get(entry["perturbation"], ""),
                    "test_cells": own["cells"].get("test", 0),
                    "targets_not_measured": len(unmeasured & set(own["targets"])),
                }
            )
