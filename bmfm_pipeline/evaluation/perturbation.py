"""Predicted effects of perturbations against measured ones: profiles of means over cells, perturbation by perturbation.

Intervals resample perturbations: what is claimed is about other perturbations, not about other cells of these. Beside a model stand
baselines that know nothing of the perturbation (control_mean, train_mean) or only its parts (additive).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bmfm_pipeline.errors import DataError
from bmfm_pipeline.evaluation.metric_kinds.classes import divided
from bmfm_pipeline.evaluation.metric_kinds.sums import Sums, mean_of
from bmfm_pipeline.evaluation.resampling import resampled
from bmfm_pipeline.evaluation.rows import Evaluation, Settings, add_score
from bmfm_pipeline.evaluation.verdicts import difference_of
from bmfm_pipeline.evaluation.wording import verdict

CONTROL, TRAIN_MEAN = "Control", "Average_Perturbation_Train"
TOP_GENES = 20
BASELINES = ("control_mean", "train_mean", "additive", "ridge")
RIDGE_PENALTY = 1.0  # a gene in n training perturbations keeps n / (n + 1) of its effect
METRICS = ("agg_pcc", "delta_agg_pcc", "train_delta_agg_pcc", "agg_mae", "agg_mse", "discrimination_score")
OTHERS = {"train_mean": "the mean of the training perturbations", "ridge": "ridge regression on the perturbed genes"}
TOLD = ("agg_mae", "delta_agg_pcc", "discrimination_score")


@dataclass(frozen=True)
class GroupMeans:
    """Measured means over cells: `profiles` (P, G) of each of the P perturbations, `control` (G,) of control cells, `train_mean` (G,) of
    the perturbations in training, for G genes."""

    genes: list[str]
    perturbations: list[str]
    profiles: np.ndarray
    control: np.ndarray
    train_mean: np.ndarray

    def __post_init__(self):
        for what, values in (("profiles", self.profiles), ("control", self.control), ("train_mean", self.train_mean)):
            if values.shape[-1] != len(self.genes) or not np.isfinite(values).all():
                raise DataError(
                    f"group means: {what} must hold a number for each of the {len(self.genes)} genes; found shape {values.shape} with "
                    f"{int((~np.isfinite(values)).sum())} that are none"
                )

    @classmethod
    def from_table(cls, table) -> "GroupMeans":
        """From a data frame with genes as rows and the columns Control, Average_Perturbation_Train and one per perturbation."""
        missing = [name for name in (CONTROL, TRAIN_MEAN) if name not in table.columns]
        if missing:
            raise DataError(
                f"group means: no column {', '.join(missing)}; columns: {', '.join(map(str, table.columns))}"
            )
        names = [name for name in table.columns if name not in (CONTROL, TRAIN_MEAN)]
        values = table.to_numpy(dtype=np.float64)
        column = {name: values[:, place] for place, name in enumerate(table.columns)}
        profiles = np.stack([column[name] for name in names]) if names else np.zeros((0, len(table)))
        return cls([str(gene) for gene in table.index], list(names), profiles, column[CONTROL], column[TRAIN_MEAN])

    def of(self, perturbations: Sequence[str]) -> "GroupMeans":
        """The same for these perturbations, in this order."""
        place = {name: index for index, name in enumerate(self.perturbations)}
        return replace(
            self, perturbations=list(perturbations), profiles=self.profiles[[place[name] for name in perturbations]]
        )


@dataclass(frozen=True)
class Grouped:
    """Predictions averaged per perturbation and gene: `predicted` (P, G), and `filled` (P,) how many genes had none. Perturbations in
    `unknown` were not measured, and `unknown_genes` are not among the measured genes: both are left out."""

    perturbations: list[str]
    predicted: np.ndarray
    filled: np.ndarray
    unknown: list[str]
    unknown_genes: list[str]


def group_predictions(
    perturbations: Sequence[str],
    genes: Sequence[str],
    values: Sequence[float],
    means: GroupMeans,
    *,
    fill: str = "train_mean",
    added_to: str | None = None,
) -> Grouped:
    """Means of predictions (n,) by perturbation and gene; the genes of a perturbation that have none are taken from `fill`.

    `fill` and `added_to` are control or train_mean; `added_to` says what predictions are differences from, None that they are values.
    """
    baseline = {"control": means.control, "train_mean": means.train_mean}
    if fill not in baseline or added_to not in (None, *baseline):
        raise DataError(f"fill and added_to are control or train_mean, found {fill} and {added_to}")
    values = np.asarray(values, dtype=np.float64)
    if not len(perturbations) == len(genes) == len(values):
        raise DataError(
            f"{len(perturbations)} perturbations, {len(genes)} genes and {len(values)} values are not of the same predictions"
        )
    if not np.isfinite(values).all():
        raise DataError(f"{int((~np.isfinite(values)).sum())} of {len(values)} predictions are no numbers")
    names, name = np.unique(np.asarray(perturbations, dtype=str), return_inverse=True)
    place = {gene: index for index, gene in enumerate(means.genes)}
    named, code = np.unique(np.asarray(genes, dtype=str), return_inverse=True)
    column = np.array([place.get(gene, -1) for gene in named], dtype=np.int64)[code]
    known = column >= 0
    shape = (len(names), len(means.genes))
    flat = (name * shape[1] + column)[known]
    count = np.bincount(flat, minlength=shape[0] * shape[1]).reshape(shape)
    total = np.bincount(flat, values[known], minlength=shape[0] * shape[1]).reshape(shape)
    found = divided(total, count) + (0 if added_to is None else baseline[added_to])
    found = np.where(count > 0, found, baseline[fill])
    measured = np.isin(names, means.perturbations)
    return Grouped(
        names[measured].tolist(),
        found[measured],
        (count == 0).sum(axis=1)[measured],
        names[~measured].tolist(),
        [str(gene) for gene in named if gene not in place],
    )


def target_genes(perturbation: str) -> list[str]:
    """The genes that a perturbation is named after: G2_G5 and G2+G5 are of both."""
    return [name for name in re.split(r"[_+]", perturbation) if name]


def additive_profiles(
    perturbations: Sequence[str], control: np.ndarray, singles: Mapping[str, np.ndarray]
) -> np.ndarray:
    """(P, G) control plus the effects of the single perturbations that each combines; nan where it is none, or a single was not
    measured in training. `singles` {gene: its profile (G,) in training}."""
    found = np.full((len(perturbations), len(control)), np.nan)
    for row, name in enumerate(perturbations):
        parts = target_genes(name)
        if len(parts) > 1 and all(part in singles for part in parts):
            found[row] = control + sum(np.asarray(singles[part]) - control for part in parts)
    return found


def ridge_profiles(
    perturbations: Sequence[Sequence[str]],
    trained: Sequence[Sequence[str]],
    profiles: np.ndarray,
    train_mean: np.ndarray,
) -> np.ndarray:
    """(P, G) of the linear model that gives each target gene, and each further gene of a combination, an effect of its own.

    `trained` are the target genes of the training perturbations, `profiles` (n, G) theirs; effects are from `train_mean`, shrunk towards
    none. A gene without a training perturbation has no effect: what is predicted for it is close to the mean.
    """
    genes = {gene: place for place, gene in enumerate(sorted({gene for own in trained for gene in own}))}

    def features(names: Sequence[Sequence[str]]) -> np.ndarray:
        found = np.zeros((len(names), len(genes) + 1))
        for row, own in enumerate(names):
            found[row, [genes[gene] for gene in own if gene in genes]] = 1
            found[row, -1] = len(own) - 1
        return found

    known = features(trained)
    middle = known.mean(axis=0)
    left = (known - middle).T @ (known - middle) + RIDGE_PENALTY * np.eye(known.shape[1])
    effects = np.linalg.solve(left, (known - middle).T @ (profiles - train_mean))
    return train_mean + (features(perturbations) - middle) @ effects


def perturbation_scores(
    predicted: np.ndarray, means: GroupMeans, de_genes: Mapping[str, Sequence[str]] | None = None, top: int = TOP_GENES
) -> dict[str, np.ndarray]:
    """{metric: (P,)} of predicted profiles (P, G), in the order of means.perturbations; nan where a metric is not defined.

    agg_pcc: correlation of predicted and measured profile over genes; delta_agg_pcc: after taking the control mean from both, and
    train_delta_agg_pcc the training mean, which leaves what is special to the perturbation; agg_mae, agg_mse: errors over genes;
    discrimination_score: 1 - (number of other perturbations whose measured profile is strictly closer to the prediction, in L1) / P,
    over all genes but the perturbation's own. With `de_genes` {perturbation: genes by falling evidence}, the first four also over the
    first `top` of them, as top20_de_agg_pcc; nan where the list has fewer than two of the genes.
    """
    everywhere = np.ones(predicted.shape, dtype=bool)
    found = _over_genes(predicted, means, everywhere)
    found["discrimination_score"] = discrimination(predicted, means)
    if de_genes is not None:
        chosen = np.zeros(predicted.shape, dtype=bool)
        place = {gene: index for index, gene in enumerate(means.genes)}
        for row, name in enumerate(means.perturbations):
            own = [place[gene] for gene in de_genes.get(name, ()) if gene in place][:top]
            chosen[row, own] = len(own) > 1
        listed = _over_genes(predicted, means, chosen)
        found |= {f"top{top}_de_{name}": values for name, values in listed.items()}
    return found


def _over_genes(predicted: np.ndarray, means: GroupMeans, chosen: np.ndarray) -> dict[str, np.ndarray]:
    truth, count = means.profiles, chosen.sum(axis=1)
    error = np.where(chosen, predicted - truth, 0.0)
    undefined = (count == 0) | ~np.isfinite(predicted).all(axis=1)
    found = {
        "agg_pcc": _correlations(predicted, truth, chosen),
        "delta_agg_pcc": _correlations(predicted - means.control, truth - means.control, chosen),
        "train_delta_agg_pcc": _correlations(predicted - means.train_mean, truth - means.train_mean, chosen),
        "agg_mae": divided(np.abs(error).sum(axis=1), count, np.nan),
        "agg_mse": divided((error**2).sum(axis=1), count, np.nan),
    }
    return {name: np.where(undefined, np.nan, values) for name, values in found.items()}


def _correlations(x: np.ndarray, y: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """(P,) Pearson correlation of each row over its chosen genes; nan where a side is constant up to rounding."""
    count = np.maximum(chosen.sum(axis=1, keepdims=True), 1)
    sides = []
    for values in (x, y):
        own = np.where(chosen, values, 0.0)
        centred = np.where(chosen, values - own.sum(axis=1, keepdims=True) / count, 0.0)
        spread = (centred**2).sum(axis=1)
        rounding = count[:, 0] * (8 * np.finfo(np.float64).eps * np.abs(own).max(axis=1)) ** 2
        sides.append((centred, np.where(spread > rounding, spread, 0.0)))
    (x, x2), (y, y2) = sides
    return np.clip(divided((x * y).sum(axis=1), np.sqrt(x2) * np.sqrt(y2), np.nan), -1, 1)


def discrimination(predicted: np.ndarray, means: GroupMeans) -> np.ndarray:
    """(P,) discrimination scores, see perturbation_scores; the genes that a perturbation is named after are left out."""
    place = {gene: index for index, gene in enumerate(means.genes)}
    found = np.full(len(predicted), np.nan)
    for row, (name, profile) in enumerate(zip(means.perturbations, predicted, strict=True)):
        if not np.isfinite(profile).all():
            continue
        kept = np.ones(len(profile), dtype=bool)
        kept[[place[gene] for gene in target_genes(name) if gene in place]] = False
        distance = np.abs(means.profiles[:, kept] - profile[kept]).sum(axis=1)
        found[row] = 1 - (distance < distance[row]).sum() / len(predicted)
    return found


def evaluate_perturbations(
    result: Evaluation,
    predicted: np.ndarray,
    means: GroupMeans,
    settings: Settings,
    *,
    singles: Mapping[str, np.ndarray] | None = None,
    de_genes: Mapping[str, Sequence[str]] | None = None,
    others: Mapping[str, np.ndarray] | None = None,
    target: str = "perturbation",
) -> list[dict[str, Any]]:
    """Add rows, verdicts and notes of a model's predicted profiles (P, G) and of the baselines; return one entry per perturbation and
    contender with its scores.

    `means` holds the measured profiles of the same perturbations; `singles` {gene: profile in training} is what additive is made of,
    `others` {baseline: predicted profiles (P, G)} stand beside it.
    """
    names = means.perturbations
    if not names:
        result.notes.append(f"{target}: no perturbation of the {settings.split} split was measured; nothing to score")
        return []
    contenders = {
        "model": predicted,
        "control_mean": np.tile(means.control, (len(names), 1)),
        "train_mean": np.tile(means.train_mean, (len(names), 1)),
        "additive": additive_profiles(names, means.control, singles or {}),
        **(others or {}),
    }
    sums = int(np.isfinite(contenders["additive"]).all(axis=1).sum())
    if not sums:
        del contenders["additive"]
    elif sums < len(names):
        result.notes.append(
            f"{target}: additive is defined for {sums} of {len(names)} perturbations, those that combine singles seen in training"
        )
    if len(names) < 10:
        result.notes.append(f"{target}: intervals come from {len(names)} perturbations; with so few, they are rough")
    scores = {name: perturbation_scores(values, means, de_genes) for name, values in contenders.items()}
    listed = [name for name in scores["model"] if name.startswith("top")]
    if de_genes is None or not np.isfinite(scores["model"][listed[3]]).any():
        result.notes.append(
            f"{target}: no list of differentially expressed genes was usable, so there are no scores over them"
        )
        listed = []
    chosen = [*METRICS, *listed]
    note = "mean over perturbations, which are resampled"
    for model, of_model in scores.items():
        for metric in chosen:
            values = of_model[metric]
            if defined := int(np.isfinite(values).sum()):
                left = f"; not defined for {len(names) - defined}" if defined < len(names) else ""
                prepared = mean_of(metric, values[np.isfinite(values)])
                add_score(result, prepared, target, model, settings, None, note=note + left)
    result.verdicts += _verdicts(target, scores, settings)
    return [
        {"perturbation": name, "model": model, **{metric: _plain(of_model[metric][row]) for metric in chosen}}
        for model, of_model in scores.items()
        for row, name in enumerate(names)
    ]


def _verdicts(target: str, scores: Mapping[str, Mapping[str, np.ndarray]], settings: Settings) -> list[str]:
    sentences = []
    for name in [other for other in BASELINES if other in scores]:
        differences = []
        for metric in TOLD:
            ours, theirs = scores["model"][metric], scores[name][metric]
            both = np.isfinite(ours) & np.isfinite(theirs)
            if both.any():
                sums = Sums(np.stack([ours[both], theirs[both], np.ones(both.sum())], axis=1))
                drawn = resampled(sums, settings.resamples, settings.seed)
                means = drawn[:, :2] / drawn[:, 2:]
                point = sums.rows[:, :2].mean(axis=0)
                differences.append(difference_of(metric, point[0], means[:, 0], point[1], means[:, 1], settings.level))
        if differences:
            remark = f"{int(np.isfinite(scores[name]['agg_mae']).sum())} perturbations, which are resampled"
            other = OTHERS.get(name, name)
            sentences.append(verdict(target, other, differences, level=settings.level, remarks=[remark]))
    return sentences


def _plain(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
