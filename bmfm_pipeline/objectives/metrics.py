"""Running metrics of a pass over the data, beside what a constant guess would have scored.

Everything is a sum, so passes over parts of the data (and processes) are pooled exactly by adding states. A masked-token accuracy
means little alone: where one expression bin is common, guessing it always scores high. So every score of a field comes with the
score of the best constant: the commonest token, or the mean.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bmfm_pipeline.config.losses import IGNORED_LABEL
from bmfm_pipeline.objectives.compute import Objectives
from bmfm_pipeline.objectives.losses import FUNCTIONS, linked, valid_mask
from bmfm_pipeline.objectives.tasks import LossTask

# Above this many classes only counts per class are kept, not the confusion matrix: accuracy, no macro averages.
LARGEST_MATRIX = 512
# The metrics that can be kept as sums.
RUNNING = (
    "accuracy",
    "f1",
    "precision",
    "recall",
    "mcc",
    "perplexity",
    "confusion_matrix",
    "mse",
    "mae",
    "pcc",
    "nonzero_confusion_matrix",
)


class RunningMetrics:
    """Metrics per metric key of some objectives: `update` per batch, `compute` at the end, `reset` for the next pass.

    `states` maps names to float64 tensors that may be all-reduced (summed) before `compute`. Every process then has the same names as
    long as each saw at least one batch. `left_out` lists metrics that were asked for and cannot be kept as sums.
    """

    def __init__(self, objectives: Objectives):
        self.objectives = objectives
        self.states: dict[str, Tensor] = {}
        self.asked: dict[str, dict[str, dict[str, Any]]] = {}
        for task in objectives.tasks:
            names = self.asked.setdefault(task.metric_key, {})
            names.update({metric["name"]: metric for metric in task.metrics})
        # Metrics that need every score (auc, auprc) are made from stored predictions; they are named here, not dropped silently.
        self.left_out = sorted(
            {f"{key}_{name}" for key, names in self.asked.items() for name in names if name not in RUNNING}
        )

    def reset(self) -> None:
        self.states = {}

    def _add(self, name: str, value: Tensor) -> None:
        value = value.detach().to(device="cpu", dtype=torch.float64)
        self.states[name] = self.states[name] + value if name in self.states else value

    @torch.no_grad()
    def update(
        self, logits: Mapping[str, Tensor], labels: Mapping[str, Any], positions: Mapping[str, Tensor] | None = None
    ) -> None:
        """Add one batch; the arguments are those of Objectives.compute."""
        for key in self.asked:
            tasks = [task for task in self.objectives.tasks if task.metric_key == key]
            shapes = {FUNCTIONS[task.objective].shape for task in tasks}
            leading = next(
                (task for task in tasks if FUNCTIONS[task.objective].shape in ("classes", "token_values")), None
            )
            if leading is not None:
                self._update_classes(key, leading, logits, labels, positions)
            elif "rows" in shapes:
                self._update_rows(key, tasks[0], logits, labels)
            if "values" in shapes and leading is None:
                self._update_values(key, tasks, logits, labels, positions)

    def _update_classes(self, key: str, task: LossTask, logits, labels, positions) -> None:
        scores, targets = self.objectives.select(task, logits, labels, positions)
        if task.objective == "token_value":
            # The true token is not the value: read the labels as they came.
            raw = labels[task.source].reshape(-1)
            targets = raw if positions is None else raw.index_select(0, positions[task.source].to(raw.device))
        mask = targets != IGNORED_LABEL
        scores, targets = scores[mask], targets[mask]
        size = scores.shape[-1]
        predicted = scores.argmax(dim=-1)
        self._add(f"{key}/support", torch.bincount(targets, minlength=size))
        self._add(f"{key}/hits", (predicted == targets).sum())
        if size <= LARGEST_MATRIX:
            self._add(
                f"{key}/matrix", torch.bincount(targets * size + predicted, minlength=size * size).reshape(size, size)
            )
        if "perplexity" in self.asked[key]:
            self._add(f"{key}/nll", torch.nn.functional.cross_entropy(scores, targets, reduction="sum"))

    def _update_rows(self, key: str, task: LossTask, logits, labels) -> None:
        scores, targets = self.objectives.select(task, logits, labels)
        mask = valid_mask(targets)
        if task.objective == "hce":
            # A leaf is right when the label allows it.
            rows = mask.all(dim=-1) & (targets[:, -1] > 0)
            right = targets[:, :-1].gather(-1, scores.argmax(dim=-1, keepdim=True)).squeeze(-1) > 0
            self._add(f"{key}/elements", rows.sum())
            self._add(f"{key}/hits", (right & rows).sum())
            return
        self._add(f"{key}/elements", mask.sum())
        self._add(f"{key}/hits", (((scores > 0) == (targets > 0)) & mask).sum())

    def _update_values(self, key: str, tasks: list[LossTask], logits, labels, positions) -> None:
        by_name = {task.objective: task for task in tasks}
        number = by_name.get("mse") or by_name.get("mae")
        zero = by_name.get("is_zero_bce") or by_name.get("is_zero_focal")
        said_zero = None
        if zero is not None:
            scores, targets = self.objectives.select(zero, logits, labels, positions)
            said_zero = scores > 0
        if number is not None:
            scores, targets = self.objectives.select(number, logits, labels, positions)
            values = linked(scores, number.arguments["link_function"])
        mask = valid_mask(targets)
        if number is not None:
            values = torch.where(said_zero, torch.zeros_like(values), values) if said_zero is not None else values
            counted = mask & (targets != 0) if number.arguments["ignore_zero"] and said_zero is None else mask
            truth, guess = targets[counted].double(), values[counted].double()
            products = [truth, truth**2, guess, guess**2, truth * guess, (truth - guess).abs(), (truth - guess) ** 2]
            self._add(
                f"{key}/moments",
                torch.stack([torch.as_tensor(float(truth.numel()), device=truth.device), *(x.sum() for x in products)]),
            )
        says = said_zero if said_zero is not None else values.round() == 0
        flat = (targets == 0)[mask].to(torch.int64) * 2 + says[mask].to(torch.int64)
        self._add(f"{key}/zeros", torch.bincount(flat, minlength=4).reshape(2, 2))

    def compute(self) -> dict[str, float]:
        """`{metric_key}_{metric}`, and for fields `{metric_key}_constant_{metric}`, of everything added since the last reset."""
        values: dict[str, float] = {}
        fields = {task.metric_key for task in self.objectives.tasks if task.is_field}
        for key, asked in self.asked.items():
            model, constant = self._scores_of(key)
            values |= {
                f"{key}_{name}": value for name, value in model.items() if name in asked or name == "zero_accuracy"
            }
            if key in fields:
                values |= {
                    f"{key}_constant_{name}": constant[name]
                    for name in model
                    if f"{key}_{name}" in values and name in constant
                }
        return values

    def matrices(self) -> dict[str, Tensor]:
        """Confusion matrices by metric key, rows the truth; `{key}_zero` is 2 x 2 over not zero, zero."""
        found = {name.removesuffix("/matrix"): state for name, state in self.states.items() if name.endswith("/matrix")}
        return found | {
            name.removesuffix("/zeros") + "_zero": state
            for name, state in self.states.items()
            if name.endswith("/zeros")
        }

    def _scores_of(self, key: str) -> tuple[dict[str, float], dict[str, float]]:
        """What the model scored and what the best constant would have."""
        model: dict[str, float] = {}
        constant: dict[str, float] = {}
        state = {
            name.removeprefix(f"{key}/"): value for name, value in self.states.items() if name.startswith(f"{key}/")
        }
        if "support" in state and state["support"].sum() > 0:
            support = state["support"]
            total = support.sum()
            model["accuracy"] = float(state["hits"] / total)
            share = float(support.max() / total)
            constant |= {"accuracy": share, "f1": 2 * share / (1 + share) / int((support > 0).sum()), "mcc": 0.0}
            if "matrix" in state:
                model |= matrix_scores(state["matrix"])
            if "nll" in state:
                model["perplexity"] = float(torch.exp(state["nll"] / total))
                shares = support[support > 0] / total
                constant["perplexity"] = float(torch.exp(-(shares * shares.log()).sum()))
        if "elements" in state and state["elements"] > 0:
            model["accuracy"] = float(state["hits"] / state["elements"])
        if "moments" in state and state["moments"][0] > 0:
            count, *sums = state["moments"].tolist()
            truth, truth2, guess, guess2, both, absolute, squared = (value / count for value in sums)
            model |= {"mse": squared, "mae": absolute}
            spread = max(truth2 - truth**2, 0.0), max(guess2 - guess**2, 0.0)
            model["pcc"] = (both - truth * guess) / (spread[0] * spread[1]) ** 0.5 if min(spread) > 0 else float("nan")
            constant["mse"] = spread[0]
        if "zeros" in state and state["zeros"].sum() > 0:
            zeros = state["zeros"]
            model["zero_accuracy"] = float(zeros.diagonal().sum() / zeros.sum())
            constant["zero_accuracy"] = float(zeros.sum(dim=1).max() / zeros.sum())
        return model, constant


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
