"""Where code that wants the cells of a file finds the store, whichever kind it is."""

from bmfm_pipeline.data.stores.base import BaseStore, keys_of
from bmfm_pipeline.data.stores.h5ad import CellStore
from bmfm_pipeline.data.stores.matrices import CSRArrays
from bmfm_pipeline.data.stores.opening import open_store

__all__ = ["BaseStore", "CSRArrays", "CellStore", "keys_of", "open_store"]
