"""What a model needs to know about its fields and label columns, read from plain dictionaries."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from bmfm_pipeline.errors import ConfigError

# Order of the heads of one field, and so of the keys in `output.logits`.
DECODE_MODES = ("token_scores", "regression", "is_zero", "wced", "mvc_regression", "mvc_is_zero")
CONTINUOUS = "continuous_value_encoder"
MVC_STYLES = ("inner product", "concat query", "sum query")


@dataclass(frozen=True)
class ModelField:
    """One parallel stream of tokens or values.

    `decode_modes` maps a head's mode to its options; `vocab_size` may be None for a continuous field without token heads.
    """

    name: str
    vocab_size: int | None = None
    is_input: bool = True
    is_masked: bool = False
    continuous: bool = False
    num_special_tokens: int = 0
    encoder_kwargs: dict[str, Any] | None = None
    decode_modes: dict[str, dict[str, Any]] = field(default_factory=dict)
    pretrained_embedding: dict[str, Any] | None = None
    vocab_sha256: str | None = None

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> "ModelField":
        """Read one entry of `fields`; keys that only the data side uses are left alone. Raises ConfigError."""
        name = entry.get("field_name")
        if not name:
            raise ConfigError(f"fields: an entry without field_name: {dict(entry)}")
        strategy = entry.get("tokenization_strategy") or "tokenize"
        if strategy not in ("tokenize", CONTINUOUS):
            raise ConfigError(
                f"fields.{name}.tokenization_strategy: {strategy!r} is neither 'tokenize' nor '{CONTINUOUS}'"
            )
        made = cls(
            name=name,
            vocab_size=entry.get("vocab_size"),
            is_input=entry.get("is_input", True),
            is_masked=entry.get("is_masked", False),
            continuous=strategy == CONTINUOUS,
            num_special_tokens=entry.get("num_special_tokens") or 0,
            encoder_kwargs=entry.get("encoder_kwargs"),
            decode_modes=_ordered_modes(name, entry.get("decode_modes")),
            pretrained_embedding=entry.get("pretrained_embedding"),
            vocab_sha256=entry.get("vocab_sha256"),
        )
        needs_vocabulary = (made.is_input and not made.continuous) or "token_scores" in made.decode_modes
        if needs_vocabulary and (made.vocab_size is None or made.vocab_size < 2):
            raise ConfigError(
                f"fields.{name}.vocab_size is {made.vocab_size}: a tokenised field or a token_scores head needs the size of its "
                "vocabulary (at least 2); it is filled from the field's tokenizer"
            )
        return made

    def head_keys(self) -> list[str]:
        return [f"{self.name}_{mode}" for mode in self.decode_modes]


@dataclass(frozen=True)
class ModelLabel:
    """One label column and the shape of its head.

    `value_mean` and `value_scale` of a regression column are the mean and the deviation of its training cells: the head says how many
    deviations from the mean, and its scores are in the units of the column. Without them the head's output is the score. `encoder_share`
    (0 to 1) is how much the encoder's scores count beside those of a linear path.
    """

    name: str
    output_size: int
    is_regression: bool = False
    is_multilabel: bool = False
    task_group: str | None = None
    classifier_depth: int = 1
    gradient_reversal_coefficient: float | None = None
    decode_from: int | None = None
    class_names: tuple[str, ...] | None = None
    label_dict_hash: str | None = None
    value_mean: float = 0.0
    value_scale: float = 1.0
    encoder_share: float = 0.5

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> "ModelLabel":
        """Read one entry of `label_columns`. Raises ConfigError when the number of classes is unknown or an option is impossible."""
        name = entry.get("label_column_name")
        if not name:
            raise ConfigError(f"label_columns: an entry without label_column_name: {dict(entry)}")
        regression = bool(entry.get("is_regression_label", False))
        classes = entry.get("class_names")
        size = 1 if regression else entry.get("n_unique_values") or (len(classes) if classes else None)
        if not size:
            raise ConfigError(
                f"label_columns.{name}: the number of classes is unknown; give n_unique_values, or a label dictionary, or set "
                "is_regression_label: true"
            )
        if classes and not regression and len(classes) != size:
            raise ConfigError(
                f"label_columns.{name}: n_unique_values is {size} but the label dictionary has {len(classes)} classes"
            )
        depth = entry.get("classifier_depth") or 1
        if depth not in (1, 2):
            raise ConfigError(
                f"label_columns.{name}.classifier_depth is {depth}; 1 (a Linear) and 2 (Linear, activation, Linear) exist"
            )
        position = entry.get("decode_from")
        if position is not None and position < 0:
            raise ConfigError(
                f"label_columns.{name}.decode_from is {position}; it is a position from the start of the sequence, 0 or more"
            )
        share = entry.get("encoder_share")
        if share is not None and not 0 <= share <= 1:
            raise ConfigError(f"label_columns.{name}.encoder_share is {share}; it lies between 0 and 1")
        return cls(
            name=name,
            output_size=int(size),
            is_regression=regression,
            is_multilabel=bool(entry.get("is_multilabel", False)),
            task_group=entry.get("task_group"),
            classifier_depth=depth,
            gradient_reversal_coefficient=entry.get("gradient_reversal_coefficient"),
            decode_from=position,
            class_names=tuple(classes) if classes else None,
            label_dict_hash=entry.get("label_dict_hash"),
            value_mean=float(entry.get("value_mean") or 0.0) if regression else 0.0,
            value_scale=float(entry.get("value_scale") or 1.0) if regression else 1.0,
            encoder_share=0.5 if share is None else float(share),
        )


def _ordered_modes(name: str, modes: Any) -> dict[str, dict[str, Any]]:
    if modes is None:
        return {}
    given = dict(modes) if isinstance(modes, Mapping) else {mode: {} for mode in modes}
    unknown = [mode for mode in given if mode not in DECODE_MODES]
    if unknown:
        raise ConfigError(f"fields.{name}.decode_modes: unknown {unknown}; there are {', '.join(DECODE_MODES)}")
    return {mode: dict(given[mode] or {}) for mode in DECODE_MODES if mode in given}


def read_fields(entries: Iterable[Mapping[str, Any]] | None) -> list[ModelField]:
    fields = [ModelField.from_dict(entry) for entry in entries or []]
    _refuse_repeats("fields", [f.name for f in fields])
    by_name = {f.name: f for f in fields}
    for item in fields:
        if "wced" in item.decode_modes:
            target = item.decode_modes["wced"].setdefault("vocab_field", "genes")
            if target not in by_name or not by_name[target].vocab_size:
                raise ConfigError(
                    f"fields.{item.name}.decode_modes.wced.vocab_field is {target!r}; it names the field whose vocabulary is predicted "
                    f"(one of {sorted(f.name for f in fields if f.vocab_size)})"
                )
        for mode in ("mvc_regression", "mvc_is_zero"):
            options = item.decode_modes.get(mode, {})
            _check_mvc_options(f"fields.{item.name}.decode_modes.{mode}", options)
            query = options.get("query_field", item.name)
            if mode in item.decode_modes and (query not in by_name or not by_name[query].is_input):
                raise ConfigError(
                    f"fields.{item.name}.decode_modes.{mode}.query_field is {query!r}, which is no input field"
                )
    return fields


def _check_mvc_options(place: str, options: Mapping[str, Any]) -> None:
    unknown = set(options) - {"query_field", "arch_style"}
    if unknown:
        raise ConfigError(f"{place}: unknown {', '.join(sorted(unknown))}; there are query_field and arch_style")
    style = options.get("arch_style", MVC_STYLES[0])
    if style not in MVC_STYLES:
        raise ConfigError(f"{place}.arch_style is {style!r}; there are {', '.join(map(repr, MVC_STYLES))}")


def read_labels(entries: Iterable[Mapping[str, Any]] | None, fields: Iterable[ModelField] = ()) -> list[ModelLabel]:
    labels = [ModelLabel.from_dict(entry) for entry in entries or []]
    _refuse_repeats("label_columns", [label.name for label in labels])
    taken = {key for item in fields for key in item.head_keys()}
    for label in labels:
        if label.name in taken:
            raise ConfigError(
                f"label_columns.{label.name}: this is also the name of a field head in the model's output; rename the column"
            )
    return labels


def _refuse_repeats(section: str, names: list[str]) -> None:
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ConfigError(f"{section}: {', '.join(repeated)} listed more than once")


def module_name(name: str) -> str:
    """A reversible module name for any field or label name.

    torch keeps dots for nesting and refuses names of its own attributes (a label column called `type` or `a.b`), so dots and
    percent signs are percent-encoded and an attribute's name gets a trailing `%`. Ordinary names stay as they are.
    """
    escaped = name.replace("%", "%25").replace(".", "%2E")
    return escaped + "%" if hasattr(nn.ModuleDict, escaped) or escaped in ("training", "") else escaped
