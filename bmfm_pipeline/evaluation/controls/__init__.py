"""Controls on the same split and the same training rows: what a simple method reaches, fitted once and kept."""

from bmfm_pipeline.evaluation.controls.choice import (
    DEFAULT,
    DESCRIPTIONS,
    FULL,
    VALUES_DEFAULT,
    VALUES_FULL,
    chosen_for,
    expand_controls,
    which_controls,
)
from bmfm_pipeline.evaluation.controls.running import ControlCells, control_predictions, run_controls
from bmfm_pipeline.evaluation.controls.values import log_cp10k

__all__ = [
    "DEFAULT",
    "DESCRIPTIONS",
    "FULL",
    "VALUES_DEFAULT",
    "VALUES_FULL",
    "ControlCells",
    "chosen_for",
    "control_predictions",
    "expand_controls",
    "log_cp10k",
    "run_controls",
    "which_controls",
]
