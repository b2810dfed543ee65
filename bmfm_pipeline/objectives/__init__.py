"""Losses, the heads they read and the metrics that belong to them. Names are imported when first used."""

_PUBLIC = {
    "ClassTables": "bmfm_pipeline.objectives.balancing",
    "Constant": "bmfm_pipeline.objectives.constants",
    "LossResult": "bmfm_pipeline.objectives.compute",
    "LossTask": "bmfm_pipeline.objectives.tasks",
    "Objectives": "bmfm_pipeline.objectives.compute",
    "RunningMetrics": "bmfm_pipeline.objectives.metrics",
    "fit_constants": "bmfm_pipeline.objectives.constants",
    "build_objectives": "bmfm_pipeline.objectives.compute",
}
__all__ = [
    "ClassTables",
    "Constant",
    "LossResult",
    "LossTask",
    "Objectives",
    "RunningMetrics",
    "build_objectives",
    "fit_constants",
]


def __getattr__(name: str):
    if name in _PUBLIC:
        from importlib import import_module

        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'bmfm_pipeline.objectives' has no attribute {name!r}")
