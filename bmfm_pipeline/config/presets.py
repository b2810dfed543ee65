"""The laptop preset: small sizes and bounded steps where there is no accelerator and nobody asked for more."""

from pathlib import Path
from typing import Any

import yaml

from bmfm_pipeline.config.accelerator import find_accelerator

FOLDER = Path(__file__).resolve().parents[1] / "run" / "preset"
# Keys of the model section that choose weights, not sizes.
NOT_SIZES = ("model.checkpoint", "model._target_", "model._partial_")


def apply_preset(values: dict[str, Any], written: set[str]) -> None:
    """Apply the preset that `preset: auto` (or its name) asks for, in place.

    `auto` means laptop when no accelerator is usable and no size of the model was written by the user. A key the user wrote,
    in an override or in a file of their own, is never changed.
    """
    wanted = values.get("preset", "none")
    if wanted == "none":
        return
    sizes_written = sorted(
        key for key in written if (key == "model" or key.startswith("model.")) and key not in NOT_SIZES
    )
    if wanted == "auto":
        values["sizes_from_checkpoint"] = not sizes_written
        if find_accelerator() is not None or sizes_written:
            return
        wanted = "laptop"
    preset = yaml.safe_load((FOLDER / f"{wanted}.yaml").read_text())
    module = values.get("data_module", {})
    stage = (
        "pretrain"
        if module.get("collation_strategy", "multitask") != "sequence_classification" and module.get("mlm", True)
        else "finetune"
    )
    if values.get("task", {}).get("kind", "train") != "train":
        stage = ""
    changed = _merge(values, preset.get("all", {}), written) + _merge(values, preset.get(stage, {}), written)
    values["preset_used"] = wanted
    if changed:
        notes = values.setdefault("notes", [])
        notes.append(
            f"preset {wanted}: no accelerator is usable and no model size was written, so {', '.join(changed)}"
        )


def _merge(values: dict[str, Any], preset: dict[str, Any], written: set[str], prefix: str = "") -> list[str]:
    changed = []
    for name, value in preset.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict):
            changed += _merge(values.setdefault(name, {}), value, written, key + ".")
        elif key not in written:
            values[name] = value
            changed.append(f"{key}={value}")
    return changed
