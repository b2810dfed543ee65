"""Where cells come from: files opened for reading row by row, and the checks they must pass first."""

from importlib import import_module

_HOMES = {
    "CellSource": "bmfm_pipeline.data.sources.h5ad",
    "open_several": "bmfm_pipeline.data.sources.several",
    "open_source": "bmfm_pipeline.data.sources.h5ad",
    "check_genes": "bmfm_pipeline.data.sources.gene_names",
    "check_source": "bmfm_pipeline.data.sources.checks",
}
__all__ = ["CellSource", "check_genes", "check_source", "open_several", "open_source"]


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
