"""The losses by name: which head each one needs and what it accepts. Plain Python, so that any room may read it."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from bmfm_pipeline.errors import ConfigError, did_you_mean

CLASS_METRICS = ("accuracy", "f1", "precision", "recall", "mcc", "perplexity", "confusion_matrix")
# Made from the stored predictions of label columns by `bmfm evaluate`, not while training.
SCORE_METRICS = ("auc", "auroc", "auprc")
NUMBER_METRICS = ("mse", "mae", "pcc", "nonzero_confusion_matrix")


@dataclass(frozen=True)
class LossKind:
    """A loss as configs name it.

    `decoder` is the field head it reads; `metrics` are logged beside it unless a config says otherwise, `fitting` are those that may
    be asked for. `label_arguments` are offered for label columns only.
    """

    decoder: str
    arguments: dict[str, Any] = field(default_factory=dict)
    metrics: tuple[str, ...] = ()
    sources: tuple[str, ...] = ("field", "label")
    fitting: tuple[str, ...] = CLASS_METRICS
    label_arguments: dict[str, Any] = field(default_factory=dict)

    def offered(self, is_field: bool) -> dict[str, Any]:
        """Arguments with their defaults."""
        return self.arguments if is_field else self.arguments | self.label_arguments


_WEIGHTS = {"class_weights": None, "beta": 0.999}
_NUMBERS = {"ignore_zero": False, "link_function": None, "shrinkage": 0.0}
LOSSES: dict[str, LossKind] = {
    "cross_entropy": LossKind("token_scores", {"label_smoothing": 0.0}, ("accuracy", "f1"), label_arguments=_WEIGHTS),
    "focal": LossKind("token_scores", {"focal_gamma": 2.0}, ("accuracy", "f1"), label_arguments=_WEIGHTS),
    "ldam": LossKind(
        "token_scores",
        {"max_margin": 0.5, "scale": 1.0, "drw_epochs": None, "beta": 0.999},
        ("accuracy", "f1"),
        ("label",),
    ),
    "token_value": LossKind("token_scores", {}, (), ("field",)),
    "bce_with_logits": LossKind("token_scores", {"pos_weight": None}, ("accuracy",), ("label",), ("accuracy",)),
    "hce": LossKind(
        "token_scores",
        {},
        ("accuracy", "f1", "hierarchical_accuracy"),
        ("label",),
        (*CLASS_METRICS, "hierarchical_accuracy"),
    ),
    "mse": LossKind("regression", dict(_NUMBERS), ("mse", "pcc"), fitting=NUMBER_METRICS),
    "mae": LossKind("regression", dict(_NUMBERS), ("mae",), fitting=NUMBER_METRICS),
    "is_zero_bce": LossKind("is_zero", {}, ("nonzero_confusion_matrix",), ("field",), ("nonzero_confusion_matrix",)),
    "is_zero_focal": LossKind(
        "is_zero", {"focal_gamma": 2.0}, ("nonzero_confusion_matrix",), ("field",), ("nonzero_confusion_matrix",)
    ),
}
ALIASES = {"BCEWithLogitsLoss": "bce_with_logits", "smoothing": "label_smoothing"}
# Names of older versions of bmfm_targets, and what to write now.
GONE = {"token_mse": "mse, which compares the values of tokens too; its predictions are not rounded to whole bins"}

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


def _number(low: float, high: float = math.inf, above: bool = False, below: bool = False) -> Callable[[Any], bool]:
    def holds(value: Any) -> bool:
        return (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and math.isfinite(value)
            and (value > low if above else value >= low)
            and (value < high if below else value <= high)
        )

    return holds


_NOT_NEGATIVE = (_number(0), "a number that is not negative")
_POSITIVE = (_number(0, above=True), "a number above 0")
# What each argument may be, and in words.
CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "weight": _NOT_NEGATIVE,
    "label_smoothing": (_number(0, 1, below=True), "a number from 0 to below 1"),
    "focal_gamma": _NOT_NEGATIVE,
    "ignore_zero": (lambda value: isinstance(value, bool), "true or false"),
    "link_function": (lambda value: value in (None, "exp"), "null or exp"),
    "shrinkage": _NOT_NEGATIVE,
    "class_weights": (
        lambda value: value in (None, "balanced", "effective_number"),
        "balanced, effective_number or null",
    ),
    "beta": (_number(0, 1, below=True), "a number from 0 to below 1"),
    "max_margin": _POSITIVE,
    "scale": _POSITIVE,
    "drw_epochs": (
        lambda value: value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 0),
        "a number of epochs or null",
    ),
    "pos_weight": (
        lambda value: value in (None, "balanced") or _POSITIVE[0](value),
        "balanced, a number above 0 or null",
    ),
    "ignore_index": (
        lambda value: value == IGNORED_LABEL,
        f"{IGNORED_LABEL}, which unlabelled cells and unmasked tokens have",
    ),
}
# Options of metrics that say what is computed anyway.
_METRIC_OPTIONS = {
    "ignore_index": (IGNORED_LABEL,),
    "task": ("multiclass", "multilabel"),
    "average": ("macro",),
}


def read_loss(entry: Mapping[str, Any], path: str, default_name: str) -> dict[str, Any]:
    """The entry with today's spellings and its name, checked by itself; None means "not given".

    Raises ConfigError for an unknown loss, argument or metric and for a value that is out of range.
    """
    found: dict[str, Any] = {}
    for key, value in entry.items():
        new = ALIASES.get(key, key)
        if value is None:
            continue
        if new in found and found[new] != value:
            raise ConfigError(f"{path}: '{key}' is another spelling of '{new}', and both are given; keep one")
        found[new] = value
    if ("field_name" in found) == ("label_column_name" in found):
        raise ConfigError(f"{path}: a loss names either field_name or label_column_name, found {sorted(entry)}")
    is_field = "field_name" in found
    name = found["name"] = _known_name(found.get("name", default_name), path)
    kind, offered = LOSSES[name], LOSSES[name].offered(is_field)
    if ("field" if is_field else "label") not in kind.sources:
        raise ConfigError(
            f"{path}: loss {name} is for a {kind.sources[0]}, not for a {'field' if is_field else 'label'}"
        )
    for key, value in found.items():
        if key not in COMMON_KEYS and key not in offered:
            _refuse_argument(name, key, offered, is_field, path)
        if key in CHECKS and not CHECKS[key][0](value):
            raise ConfigError(f"{path}: {key} must be {CHECKS[key][1]} (found {value!r})")
    _check_beta(found, path)
    _check_places(found, is_field, path)
    _check_metrics(found, kind, is_field, path)
    return found


def _known_name(name: Any, path: str) -> str:
    name = ALIASES.get(name, name) if isinstance(name, str) else name
    if name in GONE:
        raise ConfigError(f"{path}: loss {name} is a name of older versions; use {GONE[name]}")
    if name not in LOSSES:
        hint = did_you_mean(name, LOSSES, f"known: {', '.join(LOSSES)}")
        raise ConfigError(f"{path}: unknown loss '{name}'; {hint}")
    return name


def _refuse_argument(name: str, key: str, offered: Mapping[str, Any], is_field: bool, path: str) -> None:
    if is_field and key in LOSSES[name].label_arguments:
        raise ConfigError(f"{path}: {key} is for losses on label columns, whose classes are counted; remove it")
    hint = did_you_mean(key, [*COMMON_KEYS, *offered], f"its arguments are {', '.join(offered) or 'none'}")
    raise ConfigError(f"{path}: loss {name} has no argument '{key}'; {hint}")


def _check_beta(entry: Mapping[str, Any], path: str) -> None:
    if "beta" in entry and entry.get("class_weights") != "effective_number" and "drw_epochs" not in entry:
        needs = "drw_epochs" if entry["name"] == "ldam" else "class_weights: effective_number"
        raise ConfigError(f"{path}: beta belongs to {needs}, which is not set; set it, or remove beta")


def _check_places(entry: Mapping[str, Any], is_field: bool, path: str) -> None:
    """Keys that say where a loss reads its scores."""
    if not is_field and (key := next((key for key in ("decoder_key", "wced_target") if key in entry), None)):
        raise ConfigError(f"{path}: {key} is for losses on fields; a label column has one head. Remove it")
    if "wced_target" in entry and "decoder_key" in entry:
        raise ConfigError(
            f"{path}: wced_target reads the whole-cell head, so decoder_key has no place beside it; remove one"
        )
    if "wced_target" in entry and entry.get("loss_group", entry["wced_target"]) != entry["wced_target"]:
        raise ConfigError(
            f"{path}: a loss with a wced_target is logged under {entry['wced_target']}; remove loss_group"
        )


def _check_metrics(entry: Mapping[str, Any], kind: LossKind, is_field: bool, path: str) -> None:
    fitting = kind.fitting if is_field or kind.fitting == NUMBER_METRICS else (*kind.fitting, *SCORE_METRICS)
    asked = entry.get("metrics") or ()
    if not isinstance(asked, list | tuple):
        raise ConfigError(f"{path}: metrics must be a list of names (found {asked!r})")
    for metric in asked:
        options = {"name": metric} if isinstance(metric, str) else metric
        if not isinstance(options, Mapping) or "name" not in options:
            raise ConfigError(f"{path}: a metric is a name, or a mapping with a name (found {metric!r})")
        name = options["name"]
        if name not in fitting:
            hint = did_you_mean(name, fitting)
            raise ConfigError(
                f"{path}: metric {name!r} does not fit loss {entry['name']} on a {'field' if is_field else 'label'}; {hint}"
                f"{' ' if hint else ''}They are {', '.join(fitting)}"
            )
        for key, value in options.items():
            if key != "name" and value not in _METRIC_OPTIONS.get(key, ()):
                raise ConfigError(
                    f"{path}: metric {name} is computed without {key}={value!r}; remove it"
                    + (
                        " (accuracy is over all cells, f1, precision and recall are means over classes)"
                        if key == "average"
                        else ""
                    )
                )


def default_loss(
    is_label: bool,
    *,
    is_regression: bool = False,
    is_multilabel: bool = False,
    has_ontology: bool = False,
    is_continuous: bool = False,
) -> str:
    """The name of a loss entry that names none."""
    if not is_label:
        return "mse" if is_continuous else "cross_entropy"
    if is_regression:
        return "mse"
    if is_multilabel:
        return "bce_with_logits"
    return "hce" if has_ontology else "cross_entropy"


def decode_mode(entry: Mapping[str, Any], name: str) -> str:
    """The field head that a loss entry reads: named by decoder_key, wced for a whole-cell target, else by the loss's kind."""
    if entry.get("wced_target"):
        return "wced"
    key = entry.get("decoder_key")
    if key:
        return key.removeprefix(entry.get("field_name", "") + "_")
    return LOSSES[name].decoder
