"""bmfm_pipeline: preprocess, pretrain, fine-tune and honestly evaluate foundation models on single-cell and DNA data.

The public names below are imported when first used, so that `import bmfm_pipeline` stays cheap.
"""

__version__ = "0.1.0"

_PUBLIC = {
    "compose": "bmfm_pipeline.config",
    "build_data_module": "bmfm_pipeline.stages",
    "build_module": "bmfm_pipeline.training",
    "load_model": "bmfm_pipeline.models",
}
__all__ = ["__version__", "build_data_module", "build_module", "compose", "load_model"]


def __getattr__(name: str):
    if name in _PUBLIC:
        from importlib import import_module

        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'bmfm_pipeline' has no attribute {name!r}")
