"""Losses, the heads they read and the metrics that belong to them. Names are imported when first used."""

_PUBLIC = {
    "LossResult": "bmfm_pipeline.objectives.compute",
    "LossTask": "bmfm_pipeline.objectives.tasks",
    "Objectives": "bmfm_pipeline.objectives.compute",
    "RunningMetrics": "bmfm_pipeline.objectives.metrics",
    "build_objectives": "bmfm_pipeline.objectives.compute",
}
__all__ = ["LossResult", "LossTask", "Objectives", "RunningMetrics", "build_objectives"]


def __getattr__(name: str):
    if name in _PUBLIC:
        from importlib import import_module

        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'bmfm_pipeline.objectives' has no attribute {name!r}")
