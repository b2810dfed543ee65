"""What a run is: sections, composition, checks, the catalogue. Imports no torch; names are loaded when first used."""

from importlib import import_module

_EXPORTS = {
    "ConfigError": "bmfm_pipeline.errors",
    "DataModuleConfig": "bmfm_pipeline.config.data_module",
    "DatasetEntry": "bmfm_pipeline.config.catalogue",
    "FieldInfo": "bmfm_pipeline.config.sections",
    "InterpretTaskConfig": "bmfm_pipeline.config.tasks",
    "LabelColumnInfo": "bmfm_pipeline.config.sections",
    "ModelConfig": "bmfm_pipeline.config.models",
    "PredictTaskConfig": "bmfm_pipeline.config.tasks",
    "RunConfig": "bmfm_pipeline.config.run_config",
    "TestTaskConfig": "bmfm_pipeline.config.tasks",
    "TrainerConfig": "bmfm_pipeline.config.sections",
    "TrainingTaskConfig": "bmfm_pipeline.config.tasks",
    "compose": "bmfm_pipeline.config.compose",
    "compose_raw": "bmfm_pipeline.config.tree",
    "find_accelerator": "bmfm_pipeline.config.accelerator",
    "list_entries": "bmfm_pipeline.config.catalogue",
    "load_entry": "bmfm_pipeline.config.catalogue",
    "require_path": "bmfm_pipeline.config.environment",
    "settle_execution": "bmfm_pipeline.config.accelerator",
}
__all__ = list(_EXPORTS)


def __getattr__(name: str):
    if name in _EXPORTS:
        value = getattr(import_module(_EXPORTS[name]), name)
        globals()[name] = value  # `compose` is also the name of a submodule, which must not win
        return value
    raise AttributeError(f"module 'bmfm_pipeline.config' has no attribute {name!r}")
