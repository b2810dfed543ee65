"""The laptop preset: small sizes and bounded steps where there is no accelerator and nobody asked for more."""

from pathlib import Path
from typing import Any

import yaml

from bmfm_pipeline.config.accelerator import find_accelerator
from bmfm_pipeline.config.tree import is_written
from bmfm_pipeline.errors import ConfigError

# Not called `preset`: Hydra would take the key of that name for a choice among these files.
FOLDER = Path(__file__).resolve().parents[1] / "run" / "presets"
SIZES = ("model.hidden_size", "model.num_hidden_layers", "model.num_attention_heads", "model.intermediate_size")
# Keys of the model section that leave it as it is by default.
NOT_ARCHITECTURE = (
    "model.checkpoint",
    "model.load",
    "model.gradient_checkpointing",
    "model.gene_vectors",
    "model.linear_path",
    "model.path_shares",
    "model.use_cache",
    "model._target_",
    "model._partial_",
)
# Who writes one of these says how values are read, and gets nothing of the part of a preset that reads them as numbers.
READING = ("fields", "trainer.losses")
READING_DATA = (
    "log_normalize_transform",
    "sqrt_normalize_transform",
    "rda_transform",
    "median_normalization",
    "masking_strategy",
    "switch_ratio",
    "dataset_kwargs.expose_zeros",
    "dataset_kwargs.processed_data_source",
    "transform_kwargs.input_values",
    "transform_kwargs.processed_data_source",
)
# Steps whose values are not those of the raw counts, which the preset would read past them.
OTHER_VALUES = ("TPMNormalizationTransform", "MedianNormalizeTransform", "ChangeExpressionLevelTransform")
# Who says how long to train in one way is not held to the preset's number of steps, or of epochs where these are scheduled.
BOUNDED_BY = {
    "task.max_steps": ("task.max_epochs", "task.max_time"),
    "task.max_epochs": ("data_module.batch_schedule",),
}
# Who writes one of these chooses the pieces that sequences are cut into.
OTHER_PIECES = (
    "data_module.sequences.vocabulary.kind",
    "data_module.sequences.vocabulary.size",
    "data_module.sequences.vocabulary.k",
    "data_module.sequences.windows.variants",
    "tokenizer.identifier",
)


def apply_preset(values: dict[str, Any], written: set[str] | frozenset[str]) -> None:
    """Apply the preset that `preset: auto` (or its name) asks for, in place.

    `auto` means laptop when no accelerator is usable and no size of the model was written. A key that a person wrote, in an
    override or in a file of their own, is never changed.
    """
    if values.get("task", {}).get("kind", "train") != "train":
        return
    wanted = values.setdefault("preset", "auto")
    known = sorted(path.stem for path in FOLDER.glob("*.yaml"))
    if wanted not in ("auto", "none", *known):
        raise ConfigError(f"preset: must be one of auto, none, {', '.join(known)} (found {wanted!r})")
    values["sizes_from_checkpoint"] = not any(
        key == "model" or (key.startswith("model.") and key not in NOT_ARCHITECTURE) for key in written
    )
    reason = "asked for"
    if wanted == "auto":
        if find_accelerator() is not None:
            return
        if any(is_written(key, written) for key in SIZES):
            model = values.get("model", {})
            width, layers = model.get("hidden_size", 768), model.get("num_hidden_layers", 12)
            if width > 256 or layers > 4:
                _note(
                    values,
                    f"no accelerator is usable here, and the model keeps the size that was written ({layers} layers of {width}): "
                    "training will be slow",
                )
            return
        wanted, reason = "laptop", "no accelerator is usable and no model size was written"
    elif wanted == "none":
        return
    preset = yaml.safe_load((FOLDER / f"{wanted}.yaml").read_text())
    stage = _stage(values)
    parts, changed = [preset.get("all", {}), preset.get(stage, {})], []
    if "values_as_numbers" in preset and _read_as_numbers(values, written):
        changed.append("expressions as numbers")
        parts += [preset["values_as_numbers"].get(name, {}) for name in ("all", stage)]
    if values.get("data_module", {}).get("sequences"):
        parts += [preset.get("sequences", {}).get(name, {}) for name in ("all", stage)]
        if not any(is_written(key, written) for key in OTHER_PIECES):
            parts.append(preset.get("letters", {}))
    whole = _joined(parts)
    if values.get("data_module", {}).get("transform_kwargs", {}).get("input_values") == "log_normalised":
        # Logarithms are numbers of a good scale already: no square root is taken of their shares.
        whole.get("data_module", {}).pop("sqrt_normalize_transform", None)
    changed += _merge(values, whole, written)
    values["preset_used"] = wanted
    if changed:
        _note(values, f"preset {wanted}: {reason}, so {', '.join(changed)}")


def _read_as_numbers(values: dict[str, Any], written: set[str] | frozenset[str]) -> bool:
    """Make the field expressions continuous, in place, where nobody said how values are read; whether that was done."""
    for key in (*READING, *(f"data_module.{name}" for name in READING_DATA)):
        if is_written(key, written) or any(other.startswith(f"{key}.") for other in written):
            return False
    module, fields = values.get("data_module", {}), values.get("fields") or []
    entries = {entry.get("field_name"): entry for entry in fields if isinstance(entry, dict)}
    if set(entries) != {"genes", "expressions"} or entries["genes"].get("is_masked"):
        return False
    said = (
        entries["expressions"].get("tokenization_strategy"),
        values.get("trainer", {}).get("losses"),
        module.get("masking_strategy"),
        module.get("rda_transform"),
        module.get("transform_kwargs", {}).get("input_values") == "any",
        any(step.get("transform_name") in OTHER_VALUES for step in _steps(module)),
    )
    if any(said):
        return False
    numbers = {"tokenization_strategy": "continuous_value_encoder"}
    values["fields"] = [{**entry, **(numbers if entry["field_name"] == "expressions" else {})} for entry in fields]
    return True


def _steps(module: dict[str, Any]) -> list[dict[str, Any]]:
    steps = module.get("transform_kwargs", {}).get("transforms")
    return [step for step in steps if isinstance(step, dict)] if isinstance(steps, list) else []


def _note(values: dict[str, Any], text: str) -> None:
    values.setdefault("notes", []).append(text)


def _stage(values: dict[str, Any]) -> str:
    """Pretraining when tokens are masked, as RunConfig.training_stage says of a checked config; pairs of cells by themselves."""
    module = values.get("data_module", {})
    masks, strategy = module.get("mlm"), module.get("collation_strategy", "multitask")
    if strategy == "sequence_labeling":
        return "perturbation"
    return "finetune" if masks is False or strategy == "sequence_classification" else "pretrain"


def _joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Nested mappings as one; of a key given several times the last value."""
    whole: dict[str, Any] = {}
    for name, value in ((name, value) for part in parts for name, value in part.items()):
        whole[name] = _joined([whole.get(name, {}), value]) if isinstance(value, dict) else value
    return whole


def _merge(
    values: dict[str, Any], preset: dict[str, Any], written: set[str] | frozenset[str], prefix: str = ""
) -> list[str]:
    changed = []
    for name, value in preset.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict):
            changed += _merge(values.setdefault(name, {}), value, written, key + ".")
        elif not any(is_written(other, written) for other in (key, *BOUNDED_BY.get(key, ()))):
            values[name] = value
            changed.append(f"{key}={value}")
    return changed
