"""Loom files: a dense matrix of genes by cells, its layers, and attributes of rows and columns."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from bmfm_pipeline.config.reading import Reading
from bmfm_pipeline.data.sources.converting.writing import CellFile, texts
from bmfm_pipeline.errors import DataError

# Attributes that name genes and cells, as loompy, velocyto and scanpy call them; the first that is there.
GENES = ("Gene", "gene", "gene_names", "GeneName", "var_names", "Accession", "gene_id")
CELLS = ("CellID", "cell_id", "obs_names", "cell_names", "barcode", "Barcode")
BYTES_PER_BLOCK = 64_000_000


def write(path: Path, target: Path, reading: Reading) -> dict[str, Any]:
    """Cells by genes of the matrix and of all layers; see `convert`."""
    import h5py

    try:
        with h5py.File(path, "r") as stored:
            return _write(path, stored, target)
    except OSError as error:
        raise DataError(f"{path}: could not be read to its end ({error}); fetch it again") from None


def _write(path: Path, stored, target: Path) -> dict[str, Any]:
    genes, cells = (int(size) for size in stored["matrix"].shape)
    gene_name, var, more = _attributes(stored["row_attrs"], genes, GENES)
    cell_name, obs, others = _attributes(stored["col_attrs"], cells, CELLS)
    if gene_name is None:
        raise DataError(
            f"{path}: no row attribute names its genes ({', '.join(stored['row_attrs']) or 'it has none'}); Gene is expected"
        )
    notes = [f"attributes with several values a row are left out: {', '.join(more + others)}"] if more + others else []
    if cell_name is None:
        notes.append("cells have no names and are numbered")
    with CellFile(target) as file:
        names = {
            "X": stored["matrix"],
            **{f"layers/{name}": stored["layers"][name] for name in stored.get("layers", ())},
        }
        for name, node in names.items():
            if node.shape != (genes, cells):
                raise DataError(
                    f"{path}: {name} is {node.shape[0]} x {node.shape[1]}, the matrix {genes} x {cells}; it is damaged"
                )
            for block in _bands(node):
                file.add(block, name)
        return {**file.finish(obs, var, path), "notes": notes}


def _bands(node):
    """CSR of consecutive cells: whole columns of HDF5 chunks at a time, so that each chunk is unpacked once."""
    genes, cells = node.shape
    band = node.chunks[1] if node.chunks else 1
    width = max(band, BYTES_PER_BLOCK // max(1, genes * node.dtype.itemsize) // band * band)
    for start in range(0, cells, width):
        yield sparse.csr_matrix(np.ascontiguousarray(node[:, start : start + width].T))


def _attributes(group, length: int, names: tuple[str, ...]) -> tuple[str | None, pd.DataFrame, list[str]]:
    """(the attribute that gives names, a table of the others, those that are no columns)."""
    columns, others = {}, []
    for name, node in group.items():
        if getattr(node, "shape", None) != (length,):
            others.append(name)
            continue
        values = node[:]
        columns[name] = np.array(texts(values), dtype=object) if values.dtype.kind in "SO" else values
    chosen = next((name for name in names if name in columns), None)
    index = columns.pop(chosen) if chosen else np.arange(length)
    return chosen, pd.DataFrame(columns, index=pd.Index(index.astype(str), dtype=object)), others
