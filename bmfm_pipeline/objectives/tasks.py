"""Loss entries of a configuration, read into tasks: which scores, which targets, which function, what weight, what names."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bmfm_pipeline.config.losses import COMMON_KEYS, LOSSES, decode_mode, default_loss, read_loss
from bmfm_pipeline.errors import ConfigError


@dataclass(frozen=True)
class LossTask:
    """One loss. `target` is None, or the whole-cell target set (`input`, `non_input`, `all`) of a wced loss."""

    source: str
    is_field: bool
    objective: str
    weight: float
    logits_key: str
    arguments: dict[str, Any] = field(default_factory=dict)
    loss_group: str | None = None
    target: str | None = None
    output_index: int | None = None
    metrics: tuple[dict[str, Any], ...] = ()

    @property
    def metric_key(self) -> str:
        """Losses that share it are predicted and scored together."""
        return f"{self.source}_{self.loss_group}" if self.loss_group else self.source

    @property
    def name(self) -> str:
        return f"{self.metric_key}_{self.objective}"

    @property
    def loss_key(self) -> str:
        """The name under which the loss is logged."""
        return f"{self.name}_loss"


def read_tasks(
    losses: Sequence[Mapping[str, Any]], fields: Sequence[Mapping[str, Any]], label_columns: Sequence[Mapping[str, Any]]
) -> list[LossTask]:
    """Tasks in the order of the entries. Raises ConfigError for an entry that names no source, an unknown one or an unknown option."""
    fields_by_name = {entry["field_name"]: entry for entry in fields}
    labels_by_name = {entry["label_column_name"]: entry for entry in label_columns or []}
    tasks = [
        _read(f"trainer.losses.{index}", dict(entry), fields_by_name, labels_by_name)
        for index, entry in enumerate(losses or [])
    ]
    if not tasks:
        raise ConfigError("trainer.losses is empty: name at least one loss for a masked field or a label column")
    names = [task.name for task in tasks]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ConfigError(f"trainer.losses: {', '.join(repeated)} listed more than once; give one of them a loss_group")
    for key in {task.logits_key for task in tasks if task.target is not None and task.output_index is None}:
        sharing = sorted({task.objective for task in tasks if task.logits_key == key})
        if len(sharing) > 1:
            raise ConfigError(
                f"trainer.losses: {', '.join(sharing)} would all read the only output of {key}; name them in "
                "decode_modes.wced.logit_outputs of the field"
            )
    return tasks


def _read(where: str, entry: dict[str, Any], fields: Mapping[str, Mapping], labels: Mapping[str, Mapping]) -> LossTask:
    is_field = entry.get("field_name") is not None
    source, known = entry.get("field_name" if is_field else "label_column_name"), fields if is_field else labels
    entry = read_loss(entry, where, _default_name(is_field, known.get(source) or {}))
    if source not in known:
        raise ConfigError(
            f"{where}: no {'field' if is_field else 'label column'} {source!r}; there are {', '.join(sorted(known)) or 'none'}"
        )
    name = entry["name"]
    arguments = {**LOSSES[name].offered(is_field), **{key: entry[key] for key in entry if key not in COMMON_KEYS}}
    target, index, group = None, None, entry.get("loss_group")
    if "wced_target" in entry:
        group = entry["wced_target"]
        target, index = _whole_cell_target(where, name, group, known[source])
    if is_field:
        mode = decode_mode(entry, name)
        heads = known[source].get("decode_modes")
        if heads and mode not in heads:
            raise ConfigError(
                f"{where}: {name} needs the head {mode!r} of field {source}, whose decode_modes are {', '.join(heads)}"
            )
        key = f"{source}_{mode}"
    else:
        key = source
    weight = float(entry.get("weight", 1.0))
    return LossTask(source, is_field, name, weight, key, arguments, group, target, index, _metrics(entry, name))


def _default_name(is_field: bool, entry: Mapping[str, Any]) -> str:
    return default_loss(
        not is_field,
        is_regression=bool(entry.get("is_regression_label")),
        is_multilabel=bool(entry.get("is_multilabel")),
        has_ontology=bool(entry.get("label_ontology")),
        is_continuous=entry.get("tokenization_strategy") == "continuous_value_encoder",
    )


def _whole_cell_target(
    where: str, name: str, wced_target: str, field_entry: Mapping[str, Any]
) -> tuple[str, int | None]:
    modes = field_entry.get("decode_modes") or {}
    options = (modes.get("wced") if isinstance(modes, Mapping) else None) or {}
    vocab_field = options.get("vocab_field", "genes")
    target = wced_target.removesuffix(f"_{vocab_field}")
    if target not in ("input", "non_input", "all"):
        raise ConfigError(
            f"{where}: wced_target {wced_target!r}; there are "
            + ", ".join(f"{x}_{vocab_field}" for x in ("input", "non_input", "all"))
        )
    outputs = options.get("logit_outputs") or []
    if len(outputs) < 2:
        return target, None
    if name not in outputs:
        raise ConfigError(
            f"{where}: the wced head of {field_entry['field_name']} has outputs for {', '.join(outputs)}, not for {name}"
        )
    return target, list(outputs).index(name)


def _metrics(entry: Mapping[str, Any], name: str) -> tuple[dict[str, Any], ...]:
    asked = entry.get("metrics")
    if asked is None:
        return tuple({"name": metric} for metric in LOSSES[name].metrics)
    return tuple({"name": item} if isinstance(item, str) else dict(item) for item in asked)
