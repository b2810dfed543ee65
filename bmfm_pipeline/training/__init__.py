"""Training: the Lightning module and data module, checkpoints, and the child process that trains. Names load when first used."""

from importlib import import_module

_EXPORTS = {
    "CellDataModule": "bmfm_pipeline.training.data_module",
    "PreparedData": "bmfm_pipeline.training.prepared",
    "TrainResult": "bmfm_pipeline.training.spec",
    "TrainSpec": "bmfm_pipeline.training.spec",
    "TrainingModule": "bmfm_pipeline.training.module",
    "build_data_module": "bmfm_pipeline.training.data_module",
    "build_module": "bmfm_pipeline.training.module",
    "train_in_child": "bmfm_pipeline.training.launch",
}
__all__ = list(_EXPORTS)


def __getattr__(name: str):
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'bmfm_pipeline.training' has no attribute {name!r}")
