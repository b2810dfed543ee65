"""Stores of cells: rows by number, alike for a mapped file, arrays in memory, zarr, and several of these as one."""

from importlib import import_module

_HOMES = {
    "BaseStore": "bmfm_pipeline.data.stores.base",
    "CellStore": "bmfm_pipeline.data.stores.h5ad",
    "JoinedStore": "bmfm_pipeline.data.stores.joined",
    "MemoryStore": "bmfm_pipeline.data.stores.memory",
    "ZarrStore": "bmfm_pipeline.data.stores.zarr_group",
    "open_store": "bmfm_pipeline.data.stores.opening",
    "write_zarr": "bmfm_pipeline.data.stores.writing",
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
