"""The loss functions: each returns a sum and a count, so that batches and processes can be pooled exactly.

A loss value is sum / (count + epsilon); where classes are weighted the count is the sum of the weights, as in torch's weighted mean.
Everything is computed in float32 whatever precision the model runs in. A target of -100 (or NaN) is ignored everywhere. Nothing
here waits for an accelerator: no value is read, and masks select by `where`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bmfm_pipeline.config.losses import IGNORED_LABEL
from bmfm_pipeline.objectives import many_classes

# What (sum, count) a loss has; `count` is a float tensor without gradient.
SumAndCount = tuple[Tensor, Tensor]


def valid_mask(targets: Tensor) -> Tensor:
    """True where a target counts."""
    mask = targets != IGNORED_LABEL
    return mask & ~torch.isnan(targets) if targets.is_floating_point() else mask


def _count(mask: Tensor) -> Tensor:
    return mask.sum().to(torch.float32)


def _class_weight(targets: Tensor, weights: Tensor | None) -> Tensor:
    """(N,) the weight of each target's class, 0 where it is ignored."""
    mask = (targets != IGNORED_LABEL).to(torch.float32)
    return mask if weights is None else mask * weights[targets.clamp(min=0)]


def _zero_where(mask: Tensor, values: Tensor) -> Tensor:
    return torch.where(mask, values, torch.zeros_like(values))


def cross_entropy(
    scores: Tensor, targets: Tensor, label_smoothing: float = 0.0, weights: Tensor | None = None
) -> SumAndCount:
    """(N, C) scores, (N,) class ids, (C,) weights of classes."""
    if weights is None and not label_smoothing and many_classes.is_worth_it(scores):
        return many_classes.summed_cross_entropy(scores, targets), _class_weight(targets, None).sum()
    total = F.cross_entropy(
        scores,
        targets,
        weight=weights,
        ignore_index=IGNORED_LABEL,
        reduction="sum",
        label_smoothing=label_smoothing,
    )
    return total, _class_weight(targets, weights).sum()


def _focal_terms(log_true: Tensor, gamma: float) -> Tensor:
    """-(1 - p)^gamma ln(p + eps) for the log-probability of the truth (Lin et al. 2017, Focal Loss)."""
    eps = torch.finfo(log_true.dtype).eps
    true = log_true.exp()
    # At p = 1 the derivative of a power below 1 is infinite; the floor keeps it finite where the term is zero anyway.
    return -((1 - true).clamp(min=eps) ** gamma) * torch.log(true + eps)


def _true_log_probability(scores: Tensor, targets: Tensor) -> Tensor:
    """(N,) log-probability of the target's class; of class 0 where the target is ignored."""
    return F.log_softmax(scores, dim=-1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)


def focal(scores: Tensor, targets: Tensor, focal_gamma: float = 2.0, weights: Tensor | None = None) -> SumAndCount:
    """(N, C) scores, (N,) class ids, (C,) weights of classes."""
    weight = _class_weight(targets, weights)
    terms = _focal_terms(_true_log_probability(scores, targets), focal_gamma) * weight
    return _zero_where(targets != IGNORED_LABEL, terms).sum(), weight.sum()


def ldam(
    scores: Tensor, targets: Tensor, margins: Tensor, scale: float = 1.0, weights: Tensor | None = None
) -> SumAndCount:
    """(N, C) scores, (N,) class ids: cross-entropy of scale * scores with the true class's score lowered by its margin (C,).

    Rare classes have the larger margins (Cao et al. 2019, Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss).
    """
    known = targets.clamp(min=0)
    lowered = scores.scatter_add(-1, known.unsqueeze(-1), -margins[known].unsqueeze(-1))
    weight = _class_weight(targets, weights)
    terms = -_true_log_probability(scale * lowered, targets) * weight
    return _zero_where(targets != IGNORED_LABEL, terms).sum(), weight.sum()


def token_value(scores: Tensor, targets: Tensor, token_ids: Tensor, token_values: Tensor) -> SumAndCount:
    """(N, V) scores of tokens, (N,) true VALUES: squared error of the expected value under the scores of the numeric tokens.

    `token_ids` (n,) are the tokens that stand for a number, `token_values` (n,) those numbers.
    """
    shares = torch.softmax(scores.index_select(1, token_ids), dim=-1)
    mask = valid_mask(targets)
    error = _zero_where(mask, shares @ token_values.to(scores.dtype) - targets) ** 2
    return error.sum(), _count(mask)


def _regression(
    scores: Tensor,
    targets: Tensor,
    power: int,
    ignore_zero: bool,
    link_function: str | None,
    shrinkage: float,
    unit: float,
) -> SumAndCount:
    mask = valid_mask(targets)
    if ignore_zero:
        mask = mask & (targets != 0)
    # Masked twice: an ignored score must neither overflow in the link function nor count afterwards.
    predicted = _zero_where(mask, linked(_zero_where(mask, scores), link_function))
    error = ((predicted - _zero_where(mask, targets.to(scores.dtype))) / unit).abs() ** power
    total = error.sum()
    if shrinkage:
        total = total + shrinkage * ((predicted / unit).abs() ** power).sum()
    return total, _count(mask)


def linked(scores: Tensor, link_function: str | None) -> Tensor:
    """A regression score on the scale of its target."""
    return scores.exp() if link_function == "exp" else scores


def mse(
    scores: Tensor,
    targets: Tensor,
    ignore_zero: bool = False,
    link_function: str | None = None,
    shrinkage: float = 0.0,
    unit: float = 1.0,
) -> SumAndCount:
    """Scores and targets of one shape; `shrinkage` adds the mean square of the predictions. Both are measured in `unit`s."""
    return _regression(scores, targets, 2, ignore_zero, link_function, shrinkage, unit)


def mae(
    scores: Tensor,
    targets: Tensor,
    ignore_zero: bool = False,
    link_function: str | None = None,
    shrinkage: float = 0.0,
    unit: float = 1.0,
) -> SumAndCount:
    """As mse with absolute values."""
    return _regression(scores, targets, 1, ignore_zero, link_function, shrinkage, unit)


def is_zero_bce(scores: Tensor, targets: Tensor) -> SumAndCount:
    """Logit of "the value is zero" against values."""
    mask = valid_mask(targets)
    terms = F.binary_cross_entropy_with_logits(scores, (targets == 0).to(scores.dtype), reduction="none")
    return _zero_where(mask, terms).sum(), _count(mask)


def is_zero_focal(scores: Tensor, targets: Tensor, focal_gamma: float = 2.0) -> SumAndCount:
    """Focal form of is_zero_bce."""
    mask = valid_mask(targets)
    log_true = F.logsigmoid(torch.where(targets == 0, scores, -scores))
    return _zero_where(mask, _focal_terms(log_true, focal_gamma)).sum(), _count(mask)


def bce_with_logits(scores: Tensor, targets: Tensor, pos_weight: Tensor | None = None) -> SumAndCount:
    """(B, C) scores, (B, C) 0/1 targets; mean over the elements that are not ignored, so an unlabelled row has no influence.

    `pos_weight` (C,) or (1,) multiplies the terms of the targets that are 1.
    """
    mask = valid_mask(targets)
    terms = F.binary_cross_entropy_with_logits(
        scores, _zero_where(mask, targets.to(scores.dtype)), reduction="none", pos_weight=pos_weight
    )
    return _zero_where(mask, terms).sum(), _count(mask)


def hce(scores: Tensor, targets: Tensor, allowed: Tensor | None = None) -> SumAndCount:
    """-log of the probability of landing on a class that the label allows; (B, C) scores.

    Targets are class ids (B,), `allowed` (C, C) saying by row which classes a label stands for; or rows (B, C + 1) with 1 at what is
    allowed and a last column that is 1 when anything is. Rows whose label allows nothing add zero and count; ignored rows do neither.
    """
    if targets.dim() == 1:
        known = targets != IGNORED_LABEL
        inside = allowed[targets.clamp(min=0)]
        counted = known & inside.any(dim=-1)
    else:
        known = valid_mask(targets).all(dim=-1)
        inside = (targets[:, :-1] > 0) & known.unsqueeze(-1)
        counted = known & (targets[:, -1] > 0) & inside.any(dim=-1)
    # Rows without an allowed class are computed over all classes (which gives zero) and then left out, so that no infinity arises.
    reachable = torch.where(counted.unsqueeze(-1), inside, torch.ones_like(inside))
    within = torch.logsumexp(scores.masked_fill(~reachable, -torch.inf), dim=-1)
    highest = scores.detach().amax(dim=-1, keepdim=True)
    everywhere = (scores - highest).exp().sum(dim=-1).log() + highest.squeeze(-1)
    return _zero_where(counted, everywhere - within).sum(), _count(known)


@dataclass(frozen=True)
class LossFunction:
    """How a loss is evaluated. `shape`: classes (N, C) with ids, values (same shape), or rows (B, C) with targets by row.

    `epsilon` is added to the count; `zero_when_empty`: without any valid target the loss is 0 and its weight counts, where the
    others are left out of the total.
    """

    compute: Callable[..., SumAndCount]
    shape: str
    epsilon: float = 0.0
    zero_when_empty: bool = False


FUNCTIONS: dict[str, LossFunction] = {
    "cross_entropy": LossFunction(cross_entropy, "classes"),
    "focal": LossFunction(focal, "classes"),
    "ldam": LossFunction(ldam, "classes"),
    "token_value": LossFunction(token_value, "token_values"),
    "mse": LossFunction(mse, "values", 1e-6, True),
    "mae": LossFunction(mae, "values", 1e-6, True),
    "is_zero_bce": LossFunction(is_zero_bce, "values", 1e-6, True),
    "is_zero_focal": LossFunction(is_zero_focal, "values"),
    "bce_with_logits": LossFunction(bce_with_logits, "rows"),
    "hce": LossFunction(hce, "rows"),
}


def count_targets(objective: str, targets: Tensor, options: Mapping[str, Any]) -> Tensor:
    """The count that a loss function returns, from its targets alone."""
    if objective in ("cross_entropy", "focal", "ldam"):
        return _class_weight(targets, options.get("weights")).sum()
    mask = valid_mask(targets)
    if objective == "hce" and targets.dim() == 2:
        mask = mask.all(dim=-1)
    return _count(mask & (targets != 0) if options.get("ignore_zero") else mask)
