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
NOT_ARCHITECTURE = ("model.checkpoint", "model.use_cache", "model._target_", "model._partial_")
# Who says how long to train in one way is not held to the preset's number of steps.
BOUNDED_BY = {"task.max_steps": ("task.max_epochs", "task.max_time")}


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
    changed = _merge(values, preset.get("all", {}), written) + _merge(values, preset.get(_stage(values), {}), written)
    values["preset_used"] = wanted
    if changed:
        _note(values, f"preset {wanted}: {reason}, so {', '.join(changed)}")


def _note(values: dict[str, Any], text: str) -> None:
    values.setdefault("notes", []).append(text)


def _stage(values: dict[str, Any]) -> str:
    """Pretraining when tokens are masked, as RunConfig.training_stage says of a checked config."""
    module = values.get("data_module", {})
    masks, strategy = module.get("mlm"), module.get("collation_strategy", "multitask")
    return "finetune" if masks is False or strategy == "sequence_classification" else "pretrain"


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
