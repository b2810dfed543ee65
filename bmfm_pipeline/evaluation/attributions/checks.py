"""Can the attributions be believed? How much they change with fewer steps, and whether they depend on what was learned.

Adebayo et al. 2018, Sanity Checks for Saliency Maps: an attribution that stays the same when the weights are shuffled explains the input,
not the model.
"""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy import stats

from bmfm_pipeline.evaluation.attributions.cells import logits_of
from bmfm_pipeline.evaluation.attributions.integrate import FEWEST_STEPS, Attributor

CHECKED_CELLS = 32
TOP = 10
SHUFFLED = {
    "head": "weights of the label heads shuffled",
    "model": "all weights of the model shuffled",
    "another_class": "the score of another class",
}


def check_attributions(attributor: Attributor, loader, seed: int, sanity: bool) -> dict[str, Any]:
    """Compare attributions of the predicted classes of the cells of `loader` with others of the same cells.

    `steps`: with half as many steps; share of the TOP genes in common, and rank correlation. With `sanity`: the rank correlation of the
    sizes of scores with those of SHUFFLED, each {mean, low, high, n} over cells with their quartiles; close to 0 is sound, close to 1 is
    not. Cells with fewer than three genes are left out.
    """
    batches = list(loader)
    own = [_own_targets(attributor, batch) for batch in batches]
    plain = _scores(attributor, batches, own)
    fixed = attributor.n_steps
    attributor.n_steps = max(2, (fixed or FEWEST_STEPS) // 2)
    found: dict[str, Any] = {"cells": len(plain), "steps": _agreement(plain, _scores(attributor, batches, own))}
    found["steps"]["n_steps"] = attributor.n_steps
    attributor.n_steps = fixed
    if sanity:
        others = {name: _with(attributor, shuffled(attributor.model, name, seed)) for name in ("head", "model")}
        found["sanity"] = {name: _similarity(plain, _scores(one, batches, own)) for name, one in others.items()}
        # Of two classes one is the mirror of the other.
        if max((label.output_size for label in attributor.scores.labels), default=1) > 2:
            theirs = [_next_targets(attributor, targets) for targets in own]
            found["sanity"]["another_class"] = _similarity(plain, _scores(attributor, batches, theirs))
    return found


def shuffled(model: torch.nn.Module, part: str, seed: int) -> torch.nn.Module:
    """A copy whose weights, of the label heads (`head`) or all (`model`), stand in another order: the same numbers, nothing learned."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed & 0xFFFFFFFF)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if parameter.dim() < 2 or not (part == "model" or name.startswith("cls.label_predictions.")):
                continue
            order = torch.randperm(parameter.numel(), generator=generator)
            parameter.copy_(parameter.flatten()[order.to(parameter.device)].view_as(parameter))
    return other


def _with(attributor: Attributor, model: torch.nn.Module) -> Attributor:
    return Attributor(
        model,
        [label.name for label in attributor.scores.labels],
        attributor.baseline,
        n_steps=attributor.n_steps,
        method=attributor.method,
        internal_batch_size=attributor.at_once,
        device=attributor.device,
    )


def _own_targets(attributor: Attributor, batch: dict[str, Any]) -> torch.Tensor:
    """(B, columns): the predicted class of each label column."""
    logits = logits_of(attributor, batch["input_ids"], batch["attention_mask"])
    starts = attributor.scores.starts
    return torch.from_numpy(np.stack([starts[name] + values.argmax(axis=1) for name, values in logits.items()], axis=1))


def _next_targets(attributor: Attributor, targets: torch.Tensor) -> torch.Tensor:
    """The class after each, the first one after the last."""
    found = targets.clone()
    for place, label in enumerate(attributor.scores.labels):
        start = attributor.scores.starts[label.name]
        found[:, place] = start + (targets[:, place] - start + 1) % label.output_size
    return found


def _scores(
    attributor: Attributor, batches: Sequence[dict[str, Any]], targets: Sequence[torch.Tensor]
) -> list[np.ndarray]:
    """Of each cell (K, genes)."""
    found = []
    for batch, chosen in zip(batches, targets, strict=True):
        ids, mask = batch["input_ids"], batch["attention_mask"]
        genes = (attributor.baseline.genes(ids, attributor.scores.fields) & (mask > 0)).numpy()
        scores = attributor(ids, mask, chosen).scores
        found += [scores[row][:, genes[row]] for row in range(len(ids))]
    return found


def _pairs(ours: list[np.ndarray], theirs: list[np.ndarray]):
    for first, second in zip(ours, theirs, strict=True):
        yield from zip(first, second, strict=True)


def _rank_correlation(first: np.ndarray, second: np.ndarray) -> float:
    if len(first) < 3 or not np.ptp(first) or not np.ptp(second):
        return np.nan
    return float(stats.spearmanr(first, second).statistic)


def _similarity(ours: list[np.ndarray], theirs: list[np.ndarray]) -> dict[str, Any]:
    values = np.array([_rank_correlation(np.abs(one), np.abs(two)) for one, two in _pairs(ours, theirs)])
    values = values[np.isfinite(values)]
    if not len(values):
        return {"mean": None, "low": None, "high": None, "n": 0}
    low, high = np.quantile(values, [0.25, 0.75])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high), "n": len(values)}


def _agreement(ours: list[np.ndarray], theirs: list[np.ndarray]) -> dict[str, Any]:
    ranks, tops = [], []
    for one, two in _pairs(ours, theirs):
        ranks.append(_rank_correlation(one, two))
        size = min(TOP, len(one))
        if size:
            tops.append(len({*np.argsort(-one)[:size]} & {*np.argsort(-two)[:size]}) / size)
    finite = [rank for rank in ranks if np.isfinite(rank)]
    return {
        "rank_correlation": float(np.mean(finite)) if finite else None,
        "top_in_common": float(np.mean(tops)) if tops else None,
        "top": TOP,
    }
