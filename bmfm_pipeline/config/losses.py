"""The losses by name: which head each one needs and what it accepts. Plain Python, so that any room may read it."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class LossKind:
    """A loss as configs name it. `decoder` is the field head it reads; `metrics` are logged beside it unless a config says otherwise."""

    decoder: str
    arguments: dict[str, Any] = field(default_factory=dict)
    metrics: tuple[str, ...] = ()
    sources: tuple[str, ...] = ("field", "label")


LOSSES: dict[str, LossKind] = {
    "cross_entropy": LossKind("token_scores", {"label_smoothing": 0.0}, ("accuracy", "f1")),
    "focal": LossKind("token_scores", {"focal_gamma": 2.0}, ("accuracy", "f1")),
    "token_value": LossKind("token_scores", {}, (), ("field",)),
    "bce_with_logits": LossKind("token_scores", {}, ("accuracy",), ("label",)),
    "hce": LossKind("token_scores", {}, ("accuracy",), ("label",)),
    "mse": LossKind("regression", {"ignore_zero": False, "link_function": None, "shrinkage": 0.0}, ("mse", "pcc")),
    "mae": LossKind("regression", {"ignore_zero": False, "link_function": None, "shrinkage": 0.0}, ("mae",)),
    "is_zero_bce": LossKind("is_zero", {}, ("nonzero_confusion_matrix",), ("field",)),
    "is_zero_focal": LossKind("is_zero", {"focal_gamma": 2.0}, ("nonzero_confusion_matrix",), ("field",)),
}
ALIASES = {"BCEWithLogitsLoss": "bce_with_logits", "smoothing": "label_smoothing"}

# Keys that any loss entry may carry beside the arguments of its kind.
COMMON_KEYS = (
    "field_name",
    "label_column_name",
    "name",
    "weight",
    "metrics",
    "loss_group",
    "decoder_key",
    "wced_target",
    "ignore_index",
)

IGNORED_LABEL = -100


def default_loss(entry: dict[str, Any], is_regression: bool) -> str:
    """The name of a loss entry that names none: mse for a regression label, else cross_entropy."""
    return "mse" if "label_column_name" in entry and is_regression else "cross_entropy"


def decode_mode(entry: dict[str, Any], name: str) -> str:
    """The field head that a loss entry reads: named by decoder_key, wced for a whole-cell target, else by the loss's kind."""
    if entry.get("wced_target"):
        return "wced"
    key = entry.get("decoder_key")
    if key:
        return key.removeprefix(entry.get("field_name", "") + "_")
    return LOSSES[name].decoder
