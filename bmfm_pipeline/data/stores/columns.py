"""obs and var columns in anndata's layout, from HDF5 and zarr groups alike, without importing anndata."""

import numpy as np


def index_of(group) -> np.ndarray:
    """The index of a table, object array."""
    return read_column(group[group.attrs.get("_index", "_index")])


def read_column(node) -> np.ndarray:
    """One column as an object array, NaN where missing: plain, categorical or nullable."""
    if hasattr(node, "keys"):
        if "categories" in node:
            codes = node["codes"][:]
            categories = read_column(node["categories"])
            values = np.full(len(codes), np.nan, dtype=object)
            known = codes >= 0
            values[known] = categories[codes[known]]
            return values
        filled = _plain(node["values"])
        filled[node["mask"][:].astype(bool)] = np.nan
        return filled
    return _plain(node)


def _plain(node) -> np.ndarray:
    if hasattr(node, "asstr"):
        import h5py

        if h5py.check_string_dtype(node.dtype) is not None:
            return np.asarray(node.asstr()[:], dtype=object)
    return np.asarray(node[:]).astype(object)
