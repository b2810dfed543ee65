"""Running metrics of a pass over the data, beside what a constant guess would have scored.

Everything is a sum, so passes over parts of the data (and processes) are pooled exactly by adding states. A masked-token accuracy
means little alone: where one expression bin is common, guessing it always scores high. So every score of a field comes with the
score of the best constant at the same positions, fitted to training cells: the commonest token, the mean, the median.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from bmfm_pipeline.config.losses import IGNORED_LABEL, SCORE_METRICS
from bmfm_pipeline.objectives.compute import Objectives
from bmfm_pipeline.objectives.constants import (
    Constant,
    class_task,
    counted_values,
    tasks_by_key,
    token_targets,
    value_tasks,
)
from bmfm_pipeline.objectives.losses import FUNCTIONS, linked, valid_mask
from bmfm_pipeline.objectives.tasks import LossTask

# Above this many classes only counts per class are kept, not the confusion matrix: accuracy, no macro averages.
LARGEST_MATRIX = 512

Constants = Mapping[str, Constant]


class RunningMetrics:
    """Metrics per metric key of some objectives: `update` per batch, `compute` at the end, `reset` for the next pass.

    `states` maps names to float64 tensors that may be all-reduced (summed) before `compute`. Every process then has the same names as
    long as each saw at least one batch. They stay on the device of the scores, and nothing waits for it before `compute`.
    `constants`, or a function that is asked for them once, are what fields' scores are compared with. `left_out` lists metrics that
    were asked for and are made from stored predictions instead.
    """

    def __init__(self, objectives: Objectives, constants: Constants | Callable[[], Constants] | None = None):
        self.objectives = objectives
        self.states: dict[str, Tensor] = {}
        self.asked: dict[str, dict[str, dict[str, Any]]] = {}
        self._tasks = tasks_by_key(objectives)
        self._constants = constants if constants is not None else {}
        for task in objectives.tasks:
            names = self.asked.setdefault(task.metric_key, {})
            names.update({metric["name"]: metric for metric in task.metrics})
        self.left_out = sorted(
            {f"{key}_{name}" for key, names in self.asked.items() for name in names if name in SCORE_METRICS}
        )

    @property
    def constants(self) -> Constants:
        """The constant guesses by metric key."""
        if callable(self._constants):
            self._constants = self._constants()
        return self._constants

    def reset(self) -> None:
        self.states = {}

    def _add(self, name: str, value: Tensor) -> None:
        # Devices without float64 (mps) hand it to the host.
        device = "cpu" if value.device.type == "mps" else value.device
        value = value.detach().to(device=device, dtype=torch.float64)
        self.states[name] = self.states[name] + value if name in self.states else value

    @torch.no_grad()
    def update(
        self, logits: Mapping[str, Tensor], labels: Mapping[str, Any], positions: Mapping[str, Tensor] | None = None
    ) -> None:
        """Add one batch; the arguments are those of Objectives.compute."""
        for key, tasks in self._tasks.items():
            leading = class_task(tasks)
            by_class = leading is not None
            if leading is not None:
                scores, _ = self.objectives.select(leading, logits, labels, positions)
                self._update_classes(key, scores, token_targets(self.objectives, leading, labels, positions))
            if rows := [task for task in tasks if FUNCTIONS[task.objective].shape == "rows"]:
                self._update_rows(key, rows[0], logits, labels, by_class)
            if any(value_tasks(tasks)):
                self._update_values(key, tasks, logits, labels, positions)

    def _update_classes(self, key: str, scores: Tensor, targets: Tensor) -> None:
        """(N, C) scores, (N,) class ids."""
        size = scores.shape[-1]
        mask, known = targets != IGNORED_LABEL, targets.clamp(min=0)
        predicted = scores.argmax(dim=-1)
        self._add(f"{key}/support", _tally(known, mask, size))
        self._add(f"{key}/hits", ((predicted == targets) & mask).sum())
        if size <= LARGEST_MATRIX:
            self._add(f"{key}/matrix", _tally(known * size + predicted, mask, size * size).reshape(size, size))
        if "perplexity" in self.asked[key]:
            nll = torch.nn.functional.cross_entropy(scores, targets, reduction="sum", ignore_index=IGNORED_LABEL)
            self._add(f"{key}/nll", nll)

    def _update_rows(self, key: str, task: LossTask, logits, labels, by_class: bool) -> None:
        """Losses on whole rows of scores; `by_class`: another loss of the key has already been scored by class."""
        scores, targets = self.objectives.select(task, logits, labels)
        if task.objective != "hce":
            mask = valid_mask(targets)
            self._add(f"{key}/elements", mask.sum())
            self._add(f"{key}/hits", (((scores > 0) == (targets > 0)) & mask).sum())
            return
        if targets.dim() == 1:
            known = targets != IGNORED_LABEL
            allowed = self.objectives.options(task, targets.device)["allowed"][targets.clamp(min=0)]
            if not by_class:
                self._update_classes(key, scores, targets)
        else:
            known = valid_mask(targets).all(dim=-1) & (targets[:, -1] > 0)
            allowed = targets[:, :-1] > 0
        # A class is right when the label allows it.
        right = allowed.gather(-1, scores.argmax(dim=-1, keepdim=True)).squeeze(-1)
        self._add(f"{key}/labelled", known.sum())
        self._add(f"{key}/allowed", (right & known).sum())

    def _update_values(self, key: str, tasks: list[LossTask], logits, labels, positions) -> None:
        number, zero = value_tasks(tasks)
        said_zero = None
        if zero is not None:
            scores, targets = self.objectives.select(zero, logits, labels, positions)
            said_zero = scores > 0
        if number is not None:
            scores, targets = self.objectives.select(number, logits, labels, positions)
            values = linked(scores, number.arguments["link_function"])
            values = torch.where(said_zero, torch.zeros_like(values), values) if said_zero is not None else values
            counted = counted_values(targets, number, zero)
            truth, guess = (_double(torch.where(counted, x, torch.zeros_like(x))) for x in (targets, values))
            products = [truth, truth**2, guess, guess**2, truth * guess, (truth - guess).abs(), (truth - guess) ** 2]
            self._add(f"{key}/moments", torch.stack([_double(counted).sum(), *(x.sum() for x in products)]))
            constant = self.constants.get(key)
            if constant is not None and constant.median is not None:
                away = torch.where(counted, (truth - constant.median).abs(), torch.zeros_like(truth))
                self._add(f"{key}/median_error", away.sum())
        mask = valid_mask(targets)
        says = said_zero if said_zero is not None else values.round() == 0
        kinds = (targets == 0).to(torch.int64) * 2 + says.to(torch.int64)
        self._add(f"{key}/zeros", _tally(kinds.reshape(-1), mask.reshape(-1), 4).reshape(2, 2))

    def compute(self) -> dict[str, float]:
        """`{metric_key}_{metric}`, and for fields `{metric_key}_constant_{metric}`, of everything added since the last reset.

        A constant has no correlation with anything: its pcc and mcc are 0.
        """
        values: dict[str, float] = {}
        states = {name: state.cpu() for name, state in self.states.items()}
        for key, asked in self.asked.items():
            own = {name.removeprefix(f"{key}/"): state for name, state in states.items() if name.startswith(f"{key}/")}
            model = {
                name: value for name, value in model_scores(own).items() if name in asked or name == "zero_accuracy"
            }
            values |= {f"{key}_{name}": value for name, value in model.items()}
            if model and self._tasks[key][0].is_field and key in self.constants:
                constant = constant_scores(own, self.constants[key])
                values |= {f"{key}_constant_{name}": constant[name] for name in model if name in constant}
        return values

    def matrices(self) -> dict[str, Tensor]:
        """Confusion matrices by metric key, rows the truth; `{key}_zero` is 2 x 2 over not zero, zero."""
        found = {
            name.removesuffix("/matrix"): state.cpu() for name, state in self.states.items() if name.endswith("/matrix")
        }
        return found | {
            name.removesuffix("/zeros") + "_zero": state.cpu()
            for name, state in self.states.items()
            if name.endswith("/zeros")
        }


def _double(values: Tensor) -> Tensor:
    return values.to(torch.float32 if values.device.type == "mps" else torch.float64)


def _tally(ids: Tensor, mask: Tensor, size: int) -> Tensor:
    """(size,) how often each id occurs where the mask is true; unlike bincount it waits for no device."""
    ones = _double(mask)
    return torch.zeros(size, dtype=ones.dtype, device=ids.device).scatter_add_(0, ids, ones)


def model_scores(state: Mapping[str, Tensor]) -> dict[str, float]:
    """The metrics of one key from its sums; those of no target are left out."""
    found: dict[str, float] = {}
    if "support" in state and (total := state["support"].sum()) > 0:
        found["accuracy"] = float(state["hits"] / total)
        if "matrix" in state:
            found |= matrix_scores(state["matrix"])
        if "nll" in state:
            found["perplexity"] = float(torch.exp(state["nll"] / total))
    if "elements" in state and state["elements"] > 0:
        found["accuracy"] = float(state["hits"] / state["elements"])
    if "labelled" in state and state["labelled"] > 0:
        found["hierarchical_accuracy"] = float(state["allowed"] / state["labelled"])
    if "moments" in state and state["moments"][0] > 0:
        count, *sums = state["moments"].tolist()
        truth, truth2, guess, guess2, both, absolute, squared = (value / count for value in sums)
        found |= {"mse": squared, "mae": absolute}
        spread = max(truth2 - truth**2, 0.0), max(guess2 - guess**2, 0.0)
        found["pcc"] = (both - truth * guess) / (spread[0] * spread[1]) ** 0.5 if min(spread) > 0 else float("nan")
    if "zeros" in state and state["zeros"].sum() > 0:
        found["zero_accuracy"] = float(state["zeros"].diagonal().sum() / state["zeros"].sum())
    return found


def constant_scores(state: Mapping[str, Tensor], constant: Constant) -> dict[str, float]:
    """The metrics that always guessing `constant` gets on the targets behind the sums."""
    found: dict[str, float] = {}
    if constant.token is not None and "support" in state and state["support"].sum() > 0:
        support, size = state["support"], len(state["support"])
        total = float(support.sum())
        hits = float(support[constant.token]) if constant.token < size else 0.0
        present = int((support > 0).sum()) + (hits == 0)
        found |= {"accuracy": hits / total, "mcc": 0.0, "f1": 2 * hits / (hits + total) / present}
        found |= {"precision": hits / total / present, "recall": float(hits > 0) / present}
        shares = torch.nn.functional.pad(constant.shares, (0, max(0, size - len(constant.shares))))[:size] + 1
        found["perplexity"] = float(torch.exp(-(support * (shares / shares.sum()).log()).sum() / total))
    if constant.mean is not None and "moments" in state and state["moments"][0] > 0:
        count, truth, truth2 = state["moments"].tolist()[:3]
        found |= {"mse": (truth2 - 2 * constant.mean * truth) / count + constant.mean**2, "pcc": 0.0}
        if "median_error" in state:
            found["mae"] = float(state["median_error"] / count)
    if constant.zero is not None and "zeros" in state and state["zeros"].sum() > 0:
        found["zero_accuracy"] = float(state["zeros"].sum(dim=1)[int(constant.zero)] / state["zeros"].sum())
    return found


def matrix_scores(matrix: Tensor) -> dict[str, float]:
    """Macro f1, precision, recall (over classes that were there or predicted) and mcc of a confusion matrix, rows the truth."""
    hits, truth, guess = matrix.diagonal(), matrix.sum(dim=1), matrix.sum(dim=0)
    present = (truth + guess) > 0
    precision, recall = hits / guess.clamp(min=1), hits / truth.clamp(min=1)
    f1 = 2 * hits / (truth + guess).clamp(min=1)
    total = matrix.sum()
    covariance = hits.sum() * total - (truth * guess).sum()
    spread = torch.sqrt((total**2 - (guess**2).sum()) * (total**2 - (truth**2).sum()))
    return {
        "f1": float(f1[present].mean()),
        "precision": float(precision[present].mean()),
        "recall": float(recall[present].mean()),
        "mcc": float(covariance / spread) if spread > 0 else 0.0,
    }
