"""obs and var of an h5ad: today's groups, and the compound datasets that anndata wrote before version 0.7."""

import numpy as np

from bmfm_pipeline.errors import DataError


def text(value) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def read_table(path, file, name: str):
    """The table `name` of the open HDF5 `file` as a DataFrame with text names; `path` is named in errors."""
    import h5py
    import pandas as pd
    from anndata.io import read_elem

    table = _read_old(file, name) if isinstance(file[name], h5py.Dataset) else read_elem(file[name])
    if not isinstance(table, pd.DataFrame):
        raise DataError(f"{path}: {name} is not a table; write the file again with anndata's `adata.write_h5ad(...)`")
    table.index = table.index.astype(str)
    return table


def _read_old(file, name: str):
    """A compound dataset: the first field holds the names, categories lie in uns as COLUMN_categories."""
    import h5py
    import pandas as pd

    stored = file[name][()]
    fields = stored.dtype.names
    if not fields:
        return None
    columns = {field: _texts(stored[field]) for field in fields}
    table = pd.DataFrame(
        {field: columns[field] for field in fields[1:]}, index=pd.Index(columns[fields[0]], dtype=object)
    )
    for field in fields[1:]:
        kept = f"uns/{field}_categories"
        if kept in file and isinstance(file[kept], h5py.Dataset) and stored[field].dtype.kind in "iu":
            categories = _texts(np.atleast_1d(file[kept][()]))
            if len(stored) == 0 or stored[field].max() < len(categories):
                table[field] = pd.Categorical.from_codes(stored[field], categories)
    return table


def _texts(values: np.ndarray) -> np.ndarray:
    """Bytes as text; everything else as it is."""
    if values.dtype.kind == "S" or (values.dtype.kind == "O" and any(isinstance(value, bytes) for value in values[:1])):
        return np.array([text(value) for value in values], dtype=object)
    return values


def read_index(path, file, name: str) -> np.ndarray:
    """The names of the rows of a table, object array of str, without reading its columns."""
    import h5py

    node = file[name]
    if isinstance(node, h5py.Group) and text(node.attrs.get("_index", "")) in node:
        index = node[text(node.attrs["_index"])]
        if isinstance(index, h5py.Dataset) and h5py.check_string_dtype(index.dtype) is not None:
            return np.asarray(index.asstr()[:], dtype=object)
    elif isinstance(node, h5py.Dataset) and node.dtype.names:
        return np.asarray(_texts(node.fields(node.dtype.names[0])[()]), dtype=object)
    return np.asarray(read_table(path, file, name).index, dtype=object)


def table_length(path, file, name: str) -> int:
    """Number of rows of a table, without reading it where its layout tells."""
    import h5py

    node = file[name]
    if isinstance(node, h5py.Dataset):
        return len(node)
    index = node.get(text(node.attrs.get("_index", "")) or "?")
    return len(index) if isinstance(index, h5py.Dataset) else len(read_table(path, file, name))
