"""A synthetic processed file, as preprocessing leaves one: bins in X, raw counts beside them, CSR, uncompressed.

python benchmarks/processed.py FILE --cells 68579 --genes 20000
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
UMIS = 1300  # molecules a cell, which leaves about 525 expressed genes of 20,000
BINS = 10


def write_processed(path: Path, n_cells: int = 68_579, n_genes: int = 20_000, umis: float = UMIS) -> Path:
    """Write `path` unless it is there; gene counts, genes and labels are distributed as in benchmarks/preprocess.py."""
    if path.exists():
        return path
    import h5py
    import pandas as pd
    from anndata.io import write_elem
    from preprocess import LABELS, cell_blocks

    blocks = list(cell_blocks(n_cells, n_genes, umis))
    indptr = np.concatenate([[0], np.cumsum(np.concatenate([np.diff(block[0]) for block in blocks]))]).astype(np.int64)
    counts = np.concatenate([block[2] for block in blocks]).astype(np.int16)
    indices = np.concatenate([block[1] for block in blocks]).astype(np.int32)
    bins = np.clip(np.log2(1.0 + counts), 1, BINS - 1).astype(np.int8)
    labels = np.random.default_rng(1).choice(
        list(LABELS), n_cells, p=np.array([*LABELS.values()]) / sum(LABELS.values())
    )
    obs = pd.DataFrame({"celltype": pd.Categorical(labels)}, index=[f"cell-{number}" for number in range(n_cells)])
    partial = path.with_name(path.name + ".part")
    with h5py.File(partial, "w") as file:
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        write_elem(file, "obs", obs)
        write_elem(file, "var", pd.DataFrame(index=[f"GENE{number}" for number in range(n_genes)]))
        for name, data in (("X", bins), ("layers/counts", counts)):
            group = file.require_group(name)
            group.attrs.update(
                {"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": (n_cells, n_genes)}
            )
            group["data"], group["indices"], group["indptr"] = data, indices, indptr
        file["layers"].attrs.update({"encoding-type": "dict", "encoding-version": "0.1.0"})
    partial.rename(path)
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--cells", type=int, default=68_579)
    parser.add_argument("--genes", type=int, default=20_000)
    arguments = parser.parse_args()
    write_processed(arguments.file, arguments.cells, arguments.genes)
