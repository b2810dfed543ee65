"""Evaluation: predictions -> metrics -> intervals -> controls -> report. Names load when first used."""

from importlib import import_module

_EXPORTS = {
    "Interval": "bmfm_pipeline.evaluation.intervals",
    "confidence_interval": "bmfm_pipeline.evaluation.intervals",
    "evaluate_predictions": "bmfm_pipeline.evaluation.tables",
    "predict_loader": "bmfm_pipeline.evaluation.inference",
    "read_predictions": "bmfm_pipeline.evaluation.predictions",
    "run_controls": "bmfm_pipeline.evaluation.controls",
    "write_predictions": "bmfm_pipeline.evaluation.predictions",
    "write_report": "bmfm_pipeline.evaluation.report",
}
__all__ = list(_EXPORTS)


def __getattr__(name: str):
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'bmfm_pipeline.evaluation' has no attribute {name!r}")
