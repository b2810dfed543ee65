"""Integrated gradients (Sundararajan et al. 2017, Axiomatic Attribution for Deep Networks) of the scores of label columns, by captum."""

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bmfm_pipeline.errors import ConfigError, ResourceError, is_out_of_memory
from bmfm_pipeline.evaluation.attributions.paths import Baseline, LabelScores, plain_gradients

logger = logging.getLogger(__name__)
NOT_INSTALLED = "interpret needs captum, which is not installed; run `pip install 'bmfm-pipeline[interpret]'` (or `pip install captum==0.9.0`)"
FEWEST_STEPS, MOST_STEPS = 16, 256
TOLERANCE = 0.01


def require_captum() -> None:
    """Raise ConfigError that says what to install."""
    import importlib.util

    if importlib.util.find_spec("captum") is None:
        raise ConfigError(NOT_INSTALLED)


@dataclass
class Attributed:
    """Of a batch of B cells and K targets each.

    scores (B, K, L) : what each position adds to the target's score; zero at special tokens and padding.
    paths (B, K, 3) : the sum over positions by way: through their own states, the cell summary, the linear path.
    start, end (B, K) : the score of the baseline and of the cell. delta (B, K) : sum of scores less (end - start).
    steps (B,) : points of the line that were computed.
    """

    scores: np.ndarray
    paths: np.ndarray
    start: np.ndarray
    end: np.ndarray
    delta: np.ndarray
    steps: np.ndarray

    @property
    def error(self) -> np.ndarray:
        """(B,) the largest |delta| of a cell, as a share of the largest change of a score in that cell."""
        change = np.abs(self.end - self.start).max(axis=1)
        return np.abs(self.delta).max(axis=1) / np.maximum(change, 1e-6)

    def put(self, rows: np.ndarray, other: "Attributed") -> None:
        """Take what `other` found for these cells."""
        for part in fields(self):
            getattr(self, part.name)[rows] = getattr(other, part.name)


class Attributor:
    """Attributes scores of a model's label columns to positions.

    n_steps : points of the line; None starts at 16 and doubles them, cell by cell, until the error is within 1 % of the change or 256
        are computed. method : captum's rule of integration. internal_batch_size : cells times points that are computed at once; halved
        where memory runs out. Raises ConfigError when captum is not installed or knows no such method.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        labels: Sequence[str],
        baseline: Baseline,
        *,
        n_steps: int | None = None,
        method: str = "gausslegendre",
        internal_batch_size: int = 32,
        device: str = "cpu",
    ):
        require_captum()
        from captum.attr import IntegratedGradients

        self.model = model.to(device).eval()
        self.device, self.baseline = device, baseline
        self.scores = LabelScores(self.model, labels)
        self.n_steps, self.method, self.at_once = n_steps, method, internal_batch_size
        # What is found is already multiplied by the length of the line, and summed over the hidden size: captum only adds the steps up.
        self._captum = IntegratedGradients(self.scores.between, multiply_by_inputs=False)
        self._captum.gradient_func = _along_the_line

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, targets: Tensor) -> Attributed:
        """(B, F, L) tokens, (B, L) mask, and (B, K) numbers among the outputs of the label columns."""
        input_ids, attention_mask, targets = (one.to(self.device) for one in (input_ids, attention_mask, targets))
        with plain_gradients(self.model):
            steps = self.n_steps or FEWEST_STEPS
            found = self._fitting(input_ids, attention_mask, targets, steps)
            while self.n_steps is None and steps < MOST_STEPS:
                rough = np.flatnonzero(found.error > TOLERANCE)
                if not len(rough):
                    break
                steps *= 2
                rows = torch.from_numpy(rough).to(self.device)
                found.put(rough, self._fitting(input_ids[rows], attention_mask[rows], targets[rows], steps))
        return found

    def _fitting(self, *batch: Any) -> Attributed:
        while True:
            try:
                return self._integrate(*batch)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if self.at_once == 1:
                    raise ResourceError(
                        "out of memory for a single cell; use a machine or GPU with more memory"
                    ) from error
            self.at_once = max(1, self.at_once // 2)
            logger.warning("points do not fit into memory: going on with %d at once", self.at_once)
            if self.device == "cuda":
                torch.cuda.empty_cache()

    def _integrate(self, input_ids: Tensor, mask: Tensor, targets: Tensor, steps: int) -> Attributed:
        if len(input_ids) > self.at_once:
            half = len(input_ids) // 2
            halves = [
                self._integrate(*(one[where] for one in (input_ids, mask, targets)), steps)
                for where in (slice(0, half), slice(half, None))
            ]
            return Attributed(
                **{
                    part.name: np.concatenate([getattr(one, part.name) for one in halves])
                    for part in fields(Attributed)
                }
            )
        ends = self.scores.ends(input_ids, mask, self.baseline)
        extras = ends.extras(targets)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ways = self._captum.attribute(
                ends.inputs, ends.baselines, additional_forward_args=extras, n_steps=steps, method=self.method,
                internal_batch_size=self.at_once,
            )  # fmt: skip
        ways = [way.double() for way in ways]
        ways += [torch.zeros_like(ways[0])] * (2 - len(ways))
        with torch.no_grad():
            start, end = (self.scores.between(*point, *extras).double() for point in (ends.baselines, ends.inputs))
            linear = self.scores.linear_parts(input_ids)
            if linear is None:
                ways.append(torch.zeros_like(ways[0]))
            else:
                chosen = targets.unsqueeze(1).expand(-1, input_ids.shape[2], -1)
                ways.append(linear.gather(2, chosen).transpose(1, 2).double())
                end = end + ways[-1].sum(dim=2)
        total = sum(ways)
        total = total * (mask > 0).unsqueeze(1)
        paths = torch.stack([way.sum(dim=2) for way in ways], dim=2)
        delta = paths.sum(dim=2) - (end - start)
        plain = [one.cpu().numpy() for one in (total, paths, start, end, delta)]
        return Attributed(*plain, np.full(len(input_ids), steps))


def _along_the_line(forward_fn, inputs, target_ind=None, additional_forward_args=None) -> tuple[Tensor, ...]:
    """How fast each target's score changes along the line by way of each position, at points (N, ...): (N, K, L) for each input.

    One pass of the model serves all targets, and no gradient of the size (N, K, L, H) is kept.
    """
    _, targets, difference, _, parts = additional_forward_args
    found: list[list[Tensor]] = [[] for _ in inputs]
    with torch.enable_grad():
        scores = forward_fn(*inputs, *additional_forward_args)
        last = targets.shape[1] - 1
        for number in range(targets.shape[1]):
            slopes = torch.autograd.grad(
                scores[:, number].sum(), inputs, retain_graph=number < last, allow_unused=True, materialize_grads=True
            )
            found[0].append((slopes[0] * difference).sum(dim=-1))
            if len(inputs) > 1:
                found[1].append(torch.einsum("nh,nlh->nl", slopes[1], parts))
    return tuple(torch.stack(way, dim=1) for way in found)
