"""The demonstration data: 700 real cells of Zheng68K x 765 genes that ship inside scanpy, turned back into counts."""

import importlib.util
from pathlib import Path

import numpy as np

from bmfm_pipeline.errors import DataError

# The stored values are log1p of counts scaled per cell, rounded to three decimals: divided by a cell's smallest value they are
# whole numbers up to an error that grows with the count. The bound is relative to the count (the packaged file reaches 0.003).
TOLERANCE = 0.01


def packaged_file() -> Path:
    """Path of scanpy's packaged file, found without importing scanpy."""
    spec = importlib.util.find_spec("scanpy")
    path = Path(spec.origin).parent / "datasets" / "10x_pbmc68k_reduced.h5ad" if spec and spec.origin else None
    if path is None or not path.exists():
        raise DataError(
            "zheng68k-mini is built from cells that ship inside scanpy (scanpy/datasets/10x_pbmc68k_reduced.h5ad), "
            f"{'which is not installed' if path is None else f'and {path} is missing'}; run `pip install --force-reinstall scanpy`"
        )
    return path


def build(path: str | Path) -> Path:
    """Write the cells to `path` as an h5ad of whole counts (float32 CSR) with obs column `celltype`; same bytes of data every time."""
    import h5py
    import pandas as pd
    from scipy import sparse

    from bmfm_pipeline.data.processed import ProcessedWriter

    with h5py.File(packaged_file(), "r") as file:
        raw, obs, uns = file["raw.X"], file["obs"][:], file["uns"]
        genes = [name.decode() for name in file["raw.var"]["index"]]
        scaled = sparse.csr_matrix((raw["data"][:], raw["indices"][:], raw["indptr"][:]), shape=(len(obs), len(genes)))
        names = np.array([name.decode() for name in uns["bulk_labels_categories"][:]], dtype=object)
    scaled.sort_indices()
    counts = _counts(scaled)
    table = pd.DataFrame(
        {"celltype": pd.Categorical.from_codes(obs["bulk_labels"], categories=list(names))},
        index=pd.Index([name.decode() for name in obs["index"]], name="cell"),
    )
    with ProcessedWriter(Path(path), table, genes, counts.shape) as writer:
        writer.matrix("X", np.diff(counts.indptr), counts.dtype)
        writer.fill("X", counts)
    return Path(path)


def _counts(scaled):
    """Whole counts from log1p of scaled counts; DataError when they are not whole."""
    values = np.expm1(scaled.data.astype(np.float64))
    starts = scaled.indptr[:-1]
    if (np.diff(scaled.indptr) == 0).any() or (values <= 0).any():
        raise DataError(f"{packaged_file()}: holds cells without values; expected scanpy's 700 packaged cells")
    smallest = np.minimum.reduceat(values, starts)
    ratios = values / np.repeat(smallest, np.diff(scaled.indptr))
    counts = np.rint(ratios)
    if (distance := (np.abs(ratios - counts) / counts).max()) > TOLERANCE:
        raise DataError(
            f"{packaged_file()}: values are up to {distance:.1%} from whole counts (at most {TOLERANCE:.0%} expected); "
            "this scanpy ships other cells than the ones described"
        )
    result = scaled.copy()
    result.data = counts.astype(np.float32)
    return result
