"""Cells from files to the processed artefact: sources, splits, labels, transforms, and the store that reads the result by row."""

from importlib import import_module

_HOMES = {
    "CellSource": "bmfm_pipeline.data.sources",
    "CellStore": "bmfm_pipeline.data.stores",
    "Chain": "bmfm_pipeline.data.transforms",
    "build_chain": "bmfm_pipeline.data.transforms",
    "build_label_dict": "bmfm_pipeline.data.labels",
    "check_genes": "bmfm_pipeline.data.sources",
    "check_source": "bmfm_pipeline.data.sources",
    "make_split": "bmfm_pipeline.data.splits",
    "open_source": "bmfm_pipeline.data.sources",
    "open_store": "bmfm_pipeline.data.stores",
}
__all__ = [
    "CellSource",
    "CellStore",
    "Chain",
    "build_chain",
    "build_label_dict",
    "check_genes",
    "check_source",
    "make_split",
    "open_source",
    "open_store",
]


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
