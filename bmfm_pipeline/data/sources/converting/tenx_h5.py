"""The h5 file of 10x Cell Ranger: a matrix of features by cells stored by cell, today's layout and that of version 2."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from bmfm_pipeline.config.reading import PLACE, Reading
from bmfm_pipeline.data.sources.converting.tenx_folder import other_features
from bmfm_pipeline.data.sources.converting.writing import CellFile, texts, unique_genes
from bmfm_pipeline.data.sources.row_reading import row_blocks
from bmfm_pipeline.errors import ConfigError, DataError

VALUES_PER_BLOCK = 2_000_000


def write(path: Path, target: Path, reading: Reading) -> dict[str, Any]:
    """Cells by the genes of type `feature_type`; see `convert`."""
    import h5py

    try:
        with h5py.File(path, "r") as stored:
            return _write(path, _group(path, stored), target, reading)
    except OSError as error:
        raise DataError(f"{path}: could not be read to its end ({error}); fetch it again") from None


def _group(path: Path, stored):
    wanted = {"barcodes", "data", "indices", "indptr", "shape"}
    groups = [name for name in stored if hasattr(stored[name], "keys") and wanted <= set(stored[name])]
    if len(groups) != 1:
        there = ", ".join(groups) or ", ".join(stored) or "nothing"
        raise DataError(f"{path}: one 10x matrix is expected, found {there}; give a file of one genome")
    return stored[groups[0]]


def _write(path: Path, group, target: Path, reading: Reading) -> dict[str, Any]:
    genes, cells = (int(size) for size in group["shape"][:])
    if "features" in group:
        part = group["features"]
        ids, symbols = texts(part["id"][:]), texts(part["name"][:])
        kinds = texts(part["feature_type"][:]) if "feature_type" in part else [reading.feature_type] * len(ids)
    else:
        ids, symbols = texts(group["genes"][:]), texts(group["gene_names"][:])
        kinds = [reading.feature_type] * len(ids)
    kept = np.array([kind == reading.feature_type for kind in kinds], dtype=bool)
    if not kept.any():
        raise ConfigError(
            f"{PLACE}.reading.feature_type: no feature of {path} is of type {reading.feature_type!r}; there are {', '.join(sorted(set(kinds)))}"
        )
    barcodes, ends = texts(group["barcodes"][:]), group["indptr"][:].astype(np.int64)
    stored = group["data"].shape[0]
    if len(ends) != cells + 1 or ends[0] != 0 or ends[-1] != stored or (np.diff(ends) < 0).any() or len(ids) != genes:
        raise DataError(f"{path}: its parts do not fit together ({genes:,} features x {cells:,} cells); it is damaged")
    with CellFile(target) as file:
        for start, stop in row_blocks(ends, VALUES_PER_BLOCK):
            low, high = ends[start], ends[stop]
            indices = group["indices"][low:high]
            if len(indices) and (indices.min() < 0 or indices.max() >= genes):
                raise DataError(f"{path}: an index lies outside 0..{genes - 1}; it is damaged: fetch it again")
            parts = (group["data"][low:high], indices.astype(np.int32), (ends[start : stop + 1] - low).astype(np.int64))
            block = sparse.csr_matrix(parts, shape=(stop - start, genes))
            file.add(block if kept.all() else block[:, kept])
        var = pd.DataFrame({"gene_ids": ids}, index=unique_genes(symbols, ids))[kept]
        found = file.finish(pd.DataFrame(index=pd.Index(barcodes)), var, path)
    return {**found, "notes": other_features(kinds, reading.feature_type)}
