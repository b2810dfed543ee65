"""Profiles that a model predicts for perturbations: means over its pairs of control and perturbed cells, gene by gene."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from bmfm_pipeline.errors import ConfigError
from bmfm_pipeline.evaluation.inference import outputs_of

FILE = "perturbation_predictions.parquet"
# Fields that a profile can be made of, the first that a model predicts, and what its predictions are added to.
SOURCES = {"label_expressions": None, "delta_baseline_expressions": "train_mean", "delta_expressions": "control"}


@dataclass(frozen=True)
class ProfilePredictions:
    """Predicted means (P, G) of `perturbations` at `genes`, and over how many cells (P, G); nan where there was none."""

    perturbations: list[str]
    genes: list[str]
    means: np.ndarray
    counts: np.ndarray

    def filled(self, fill: np.ndarray) -> tuple[np.ndarray, int]:
        """((P, G) with `fill` (G,) where nothing was predicted, how many of the numbers that were)."""
        missing = self.counts == 0
        return np.where(missing, fill, self.means), int(missing.sum())


def source_of(objectives) -> str:
    """The field whose predictions make the profiles. Raises ConfigError where the losses predict none."""
    predicted = {task.source for task in objectives.tasks if task.is_field}
    for name in SOURCES:
        if name in predicted:
            return name
    raise ConfigError(f"trainer.losses: profiles are made of one of {', '.join(SOURCES)}, and none has a loss")


@torch.inference_mode()
def predict_profiles(
    model: torch.nn.Module,
    loader,
    objectives,
    gene_ids: np.ndarray,
    genes: Sequence[str],
    fields: Mapping[str, int],
    baselines: Mapping[str, np.ndarray],
    *,
    on_batch: Callable[[int], None] | None = None,
    precision: str = "32-true",
    device: str = "cpu",
) -> ProfilePredictions:
    """One pass over the pairs of `loader`, which name their perturbation in batch["perturbed_genes"].

    gene_ids (G,): the token of each measured gene; `fields` {input field: its row in input_ids}; `baselines` {train_mean: (G,)}. A
    prediction of a difference is added to what it is a difference from: the mean, or the value of the control cell in the pair.
    """
    source = source_of(objectives)
    keys = [task.metric_key for task in objectives.tasks if task.source == source]
    column = np.full(int(gene_ids.max(initial=0)) + 2, -1, np.int64)
    column[gene_ids[gene_ids > 0]] = np.flatnonzero(gene_ids > 0)
    names: dict[str, int] = {}
    sums, counts = np.zeros((0, len(genes))), np.zeros((0, len(genes)))
    model = model.to(device).eval()
    dtype = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}.get(precision)
    done = 0
    for batch, positions, output in outputs_of(model, loader, objectives, device, dtype, {}):
        predicted = objectives.predict(keys[0], output.logits).float().cpu().numpy().reshape(-1)
        places = positions[source].cpu().numpy()
        ids = batch["input_ids"]
        length = ids.shape[2]
        tokens = ids[:, fields["genes"]].reshape(-1)[places].to(torch.int64).numpy()
        at = column[np.minimum(tokens, len(column) - 1)]
        if SOURCES[source] == "control":
            predicted = predicted + ids[:, fields["expressions"]].reshape(-1)[places].float().numpy()
        of_cell = np.array([names.setdefault(name, len(names)) for name in batch["perturbed_genes"]], dtype=np.int64)
        if len(names) > len(sums):
            more = np.zeros((len(names) - len(sums), len(genes)))
            sums, counts = np.vstack([sums, more]), np.vstack([counts, more])
        known = at >= 0
        where = of_cell[places[known] // length], at[known]
        np.add.at(sums, where, predicted[known])
        np.add.at(counts, where, 1)
        done += len(of_cell)
        if on_batch:
            on_batch(done)
    means = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
    if SOURCES[source] == "train_mean":
        means = means + baselines["train_mean"]
    order = sorted(range(len(names)), key=list(names).__getitem__)
    return ProfilePredictions(
        [list(names)[place] for place in order], list(genes), means[order], counts[order].astype(np.int64)
    )


def write_profiles(path: Path, found: ProfilePredictions, means=None) -> None:
    """One row per perturbation and gene: predicted, cells, and, with GroupMeans of the same, measured and control."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = len(found.genes)
    table = {
        "perturbation": pa.DictionaryArray.from_arrays(
            np.repeat(np.arange(len(found.perturbations), dtype=np.int32), number), found.perturbations
        ),
        "gene": pa.DictionaryArray.from_arrays(
            np.tile(np.arange(number, dtype=np.int32), len(found.perturbations)), found.genes
        ),
        "predicted": pa.array(found.means.ravel(), pa.float32(), from_pandas=True),
        "cells": pa.array(found.counts.ravel(), pa.int32()),
    }
    if means is not None:
        place = {name: row for row, name in enumerate(means.perturbations)}
        profiles = (
            np.stack([means.profiles[place[name]] for name in found.perturbations])
            if found.perturbations
            else np.zeros((0, number))
        )
        table["measured"] = pa.array(profiles.ravel(), pa.float32())
        table["control"] = pa.array(np.tile(means.control, len(found.perturbations)), pa.float32())
    pq.write_table(pa.table(table), path)


def read_profile_predictions(path: Path) -> ProfilePredictions:
    """What write_profiles wrote."""
    import pyarrow.parquet as pq

    table = pq.read_table(path, columns=["perturbation", "gene", "predicted", "cells"]).combine_chunks()
    names, genes = (list(dict.fromkeys(table[name].to_pylist())) for name in ("perturbation", "gene"))
    shape = (len(names), len(genes))
    means = table["predicted"].to_numpy(zero_copy_only=False).astype(np.float64).reshape(shape)
    return ProfilePredictions(names, genes, means, table["cells"].to_numpy().reshape(shape))
