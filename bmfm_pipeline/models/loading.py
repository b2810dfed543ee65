"""Weights into models: strict, with an account of what was loaded, what started fresh and what was left behind."""

import logging
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from bmfm_pipeline.errors import CheckpointError
from bmfm_pipeline.models.configuration import MultitaskConfig
from bmfm_pipeline.models.registry import find_backbone
from bmfm_pipeline.models.schema import module_name

log = logging.getLogger(__name__)

# How weights may be taken over; see load_weights.
POLICIES = ("strict", "backbone", "encoder")
_HEADS = "cls."
_LABEL_HEAD = "cls.label_predictions.predictions.label_decoders."
_GROUP = "cls.label_predictions.predictions.task_groups."
_FIELD_HEAD = "cls.predictions.predictions.decoder.field_decoders."


@dataclass
class LoadReport:
    """What became of every tensor. `new_heads` and `not_used` name heads; the other lists name tensors."""

    source: str = ""
    policy: str = "strict"
    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    shape_mismatch: list[str] = field(default_factory=list)
    new_heads: list[str] = field(default_factory=list)
    not_used: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        return not (self.missing or self.unexpected or self.shape_mismatch)

    def render(self) -> str:
        """The account in lines, for the terminal."""
        origin = f" from {self.source}" if self.source else ""
        lines = [f"weights{origin}: {len(self.loaded)} tensors loaded ({self.policy})"]
        for title, names in (
            ("new, started at random", self.new_heads),
            ("in the checkpoint but not used", self.not_used),
            ("missing", self.missing),
            ("unexpected", self.unexpected),
            ("other shape", self.shape_mismatch),
        ):
            if names:
                lines.append(f"  {title} ({len(names)}): {', '.join(names)}")
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])

    def to_dict(self) -> dict[str, Any]:
        return {name: value if isinstance(value, str) else list(value) for name, value in vars(self).items()}

    __str__ = render


def load_weights(
    model: PreTrainedModel,
    state_dict: Mapping[str, Tensor],
    policy: str = "strict",
    *,
    source_config: MultitaskConfig | None = None,
    reset_heads: Collection[str] = (),
    source: str = "",
) -> LoadReport:
    """Copy `state_dict` into `model` and return what happened; nothing is copied when it raises.

    `strict`: every tensor of the model is there with its shape, and no other. `backbone`: a pretrained model becomes the start of
    another one: encoder, embeddings, pooler, transform and same-named heads are taken over; heads (and input fields) that the
    checkpoint does not have start fresh and are listed in `new_heads`, heads that the model does not have in `not_used`. `encoder`: the
    same without any head. Anything else that differs is an error. `source_config`, the checkpoint's configuration, lets vocabularies and label
    dictionaries be compared: equal sizes with different meanings are refused. Label heads in `reset_heads` start fresh in any case.

    Raises CheckpointError listing every difference.
    """
    if policy not in POLICIES:
        raise ValueError(f"policy {policy!r}: there are {', '.join(POLICIES)}")
    given = _without_wrapper_prefix(state_dict, model)
    own = model.state_dict()
    report = LoadReport(source=source, policy=policy)
    reset = tuple(f"{_LABEL_HEAD}{module_name(name)}." for name in reset_heads)
    if policy == "encoder":
        reset, reset_heads = (_HEADS,), [label.name for label in model.config.model_labels]
    left_out = [name for name in given if reset and name.startswith(reset)]
    given = {name: tensor for name, tensor in given.items() if name not in left_out} if left_out else given
    for name, tensor in own.items():
        if name not in given:
            report.missing.append(name)
        elif given[name].shape != tensor.shape:
            report.shape_mismatch.append(
                f"{name} {tuple(given[name].shape)} in the checkpoint, {tuple(tensor.shape)} in the model"
            )
        else:
            report.loaded.append(name)
    report.unexpected = [name for name in given if name not in own]
    _excuse_missing(report, model)
    if policy != "strict":
        _sort_differences(report, model, given)
        report.not_used += [head for head in dict.fromkeys(map(_head_of, left_out)) if head not in report.not_used]
    elif reset:
        raise ValueError("reset_heads needs policy='backbone'")
    problems = _meaning_differences(report, model.config, source_config, reset_heads)
    if not report.clean or problems:
        raise CheckpointError(_refusal(report, problems, model, policy))
    with torch.no_grad():
        for name in report.loaded:
            own[name].copy_(given[name])
    return report


def _excuse_missing(report: LoadReport, model: PreTrainedModel) -> None:
    """Tensors that published weights do not have are noted, not missing, as long as every one of the kind is absent."""
    for ending, words in model.may_be_missing.items():
        kind = {name for name in model.state_dict() if name.rpartition(".")[2] == ending}
        if kind and kind <= set(report.missing):
            report.missing = [name for name in report.missing if name not in kind]
            report.notes.append(words)


def _without_wrapper_prefix(state_dict: Mapping[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
    """Lightning modules and torch.compile put `model.` and `_orig_mod.` in front of every name."""
    wrapper = re.compile(rf"^(model\.|module\.|_orig_mod\.)+(?=cls\.|{re.escape(model.base_model_prefix)}\.)")
    return {wrapper.sub("", name): tensor for name, tensor in state_dict.items()}


def _head_of(name: str) -> str | None:
    """The head a tensor belongs to, as a person would call it; None for the backbone."""
    for prefix, kind in ((_LABEL_HEAD, "label head "), (_GROUP, "task group "), (_FIELD_HEAD, "field head ")):
        if name.startswith(prefix):
            escaped = name.removeprefix(prefix).split(".")[0]
            plain = escaped[:-1] if escaped.endswith("%") else escaped
            return kind + plain.replace("%2E", ".").replace("%25", "%")
    return "field head transform" if name.startswith("cls.predictions.") else None


def _field_of(name: str, model: PreTrainedModel) -> str | None:
    """The input field whose embedding a tensor is part of."""
    prefix = f"{model.base_model_prefix}.{model.embeddings_name}."
    for item in model.config.input_fields:
        if name.startswith(f"{prefix}{module_name(item.name + '_embeddings')}"):
            return item.name
    return None


def _sort_differences(report: LoadReport, model: PreTrainedModel, given: Mapping[str, Tensor]) -> None:
    """Take out of missing and unexpected what a change of task explains."""
    loaded_heads = {_head_of(name) for name in report.loaded}
    known_fields = {_field_of(name, model) for name in given}
    new: dict[str, None] = {}
    left: list[str] = []
    for name in report.missing:
        head, item = _head_of(name), _field_of(name, model)
        if head and head not in loaded_heads:
            new[head] = None
        elif item and item not in known_fields:
            new[f"input field {item}"] = None
        else:
            left.append(name)
    report.new_heads, report.missing = list(new), left
    unused = dict.fromkeys(head for name in report.unexpected if (head := _head_of(name)) and head not in loaded_heads)
    report.not_used = list(unused)
    report.unexpected = [name for name in report.unexpected if _head_of(name) not in unused]


def _meaning_differences(
    report: LoadReport, config: MultitaskConfig, source_config: MultitaskConfig | None, reset_heads: Collection[str]
) -> list[str]:
    if source_config is None:
        return []
    problems = []
    before = {label.name: label for label in source_config.model_labels}
    for label in config.model_labels:
        old = before.get(label.name)
        if old is None or label.name in reset_heads:
            continue
        if label.label_dict_hash and old.label_dict_hash:
            if label.label_dict_hash != old.label_dict_hash:
                problems.append(f"label column {label.name}: {_class_difference(old.class_names, label.class_names)}")
        elif f"{_LABEL_HEAD}{module_name(label.name)}.decoder.weight" in report.loaded and not label.is_regression:
            report.notes.append(
                f"label column {label.name}: the class names of the checkpoint are not known, so they were not compared"
            )
    fields_before = {item.name: item for item in source_config.model_fields}
    for item in config.model_fields:
        old = fields_before.get(item.name)
        if old and old.vocab_sha256 and item.vocab_sha256 and old.vocab_sha256 != item.vocab_sha256:
            problems.append(
                f"field {item.name}: its vocabulary is not the checkpoint's; use the tokenizer stored with the checkpoint"
            )
    return problems


def _class_difference(old: tuple[str, ...] | None, new: tuple[str, ...] | None) -> str:
    gone, added = sorted(set(old or ()) - set(new or ())), sorted(set(new or ()) - set(old or ()))
    if gone or added:
        return f"its classes are not the checkpoint's (only there: {', '.join(gone) or 'none'}; only here: {', '.join(added) or 'none'})"
    return "its classes are the checkpoint's but in another order"


def _refusal(report: LoadReport, problems: list[str], model: PreTrainedModel, policy: str) -> str:
    lines = [
        f"{report.source or 'weights'}: do not fit this {type(model).__name__} (policy {policy}); nothing was loaded"
    ]
    for title, names in (
        ("missing from the checkpoint", report.missing),
        ("in the checkpoint but not in the model", report.unexpected),
        ("with another shape", report.shape_mismatch),
        ("with another meaning", problems),
    ):
        if names:
            lines.append(f"  {title} ({len(names)}): {', '.join(names)}")
    heads = sorted(
        {
            head
            for entry in report.shape_mismatch
            if (head := _head_of(entry.split(" ")[0])) and head.startswith("label")
        }
    )
    if heads or any(problem.startswith("label column") for problem in problems):
        lines.append(
            "  give the label column another name, use the checkpoint's label dictionary "
            "(data_module.dataset_kwargs.label_dict_path=MODEL/label_dict.json), or start all heads fresh: model.load=encoder"
        )
    if policy == "strict" and not report.shape_mismatch and not problems:
        lines.append(
            "  to start another task from these weights, set model.load=backbone: heads of the same name are taken over, others start fresh"
        )
    return "\n".join(lines)


def read_state_dict(folder: str | Path) -> dict[str, Tensor]:
    """Every tensor of the safetensors files in a folder written by save_pretrained. Raises CheckpointError."""
    folder = Path(folder)
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder}: holds no model.safetensors; a model folder is written by save_pretrained")
    state: dict[str, Tensor] = {}
    for path in files:
        try:
            state.update(load_file(path))
        except Exception as error:
            raise CheckpointError(
                f"{path}: cannot be read as safetensors ({error}); it may be cut short, copy it again"
            ) from error
    return state


def read_config(folder: str | Path) -> MultitaskConfig:
    """The configuration stored in a model folder. Raises CheckpointError, or ConfigError for a model type that cannot be built."""
    import json

    path = Path(folder) / "config.json"
    try:
        stored = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error}); a model folder holds config.json and model.safetensors"
        ) from error
    backbone = find_backbone(stored.get("model_type", ""))
    return backbone.config_class.from_dict(stored)


def initialise_from(
    model: PreTrainedModel,
    folder: str | Path,
    policy: str = "strict",
    *,
    reset_heads: Collection[str] = (),
    source: str | None = None,
) -> LoadReport:
    """Start `model` from the one in `folder`, comparing vocabularies and label dictionaries; see `load_weights` for the policies.

    `source` is what the report calls the folder. Raises CheckpointError listing every difference.
    """
    source_config = read_config(folder)
    if source_config.model_type != model.config.model_type:
        raise CheckpointError(
            f"{folder}: holds a {source_config.model_type}, the model to start is a {model.config.model_type}; set model.model_type"
        )
    report = load_weights(
        model,
        read_state_dict(folder),
        policy,
        source_config=source_config,
        reset_heads=reset_heads,
        source=source or str(folder),
    )
    log.info("%s", report.render())
    return report


def refuse_misfits(config: MultitaskConfig, state: Mapping[str, Tensor], source: str) -> None:
    """Compare shapes before anything of the sizes that `config` claims is made. Raises CheckpointError."""
    with torch.device("meta"):
        shapes = find_backbone(config.model_type).model_class(config)
    load_weights(shapes, state, source=source)


def load_model(uri: str | Path, *, source: str | None = None) -> PreTrainedModel:
    """The model behind `uri`, in evaluation mode: a model folder or artefact, a .ckpt file, or a repository of the hub (`org/name`).

    Strict: raises CheckpointError unless every tensor fits. `load_report` of the model is the account of them, in which `source` stands
    for the address.
    """
    from bmfm_pipeline.models.importing import model_folder

    folder = model_folder(uri)
    config, state = read_config(folder), read_state_dict(folder)
    refuse_misfits(config, state, source or str(uri))
    model = find_backbone(config.model_type).model_class(config)
    report = load_weights(model, state, source=source or str(uri))
    log.info("%s", report.render())
    model.name_or_path = str(uri)
    model.load_report = report
    return model.eval()
