"""Time and memory of building zheng68k.h5ad from a 10x archive of the real size: 68,579 cells x 32,738 genes, 36 million counts.

    python benchmarks/zheng68k_build.py [--cells N] [--folder DIR]

Writes a synthetic archive of that shape (kept in --folder for the next time), builds the h5ad in a process of its own, and
prints one JSON line.
"""

import argparse
import io
import json
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np

CELLS, GENES, GENES_A_CELL = 68_579, 32_738, 525
PREFIX = "filtered_matrices_mex/hg19/"


def write_archive(
    path: Path, n_cells: int, n_genes: int = GENES, genes_a_cell: int = GENES_A_CELL, seed: int = 0
) -> None:
    """A tar.gz laid out as Cell Ranger 1 writes it: real-general header, genes of a cell in falling order."""
    random = np.random.default_rng(seed)
    weights = random.gamma(0.2, 1.0, n_genes)
    ends = np.cumsum(weights / weights.sum())
    lengths = np.clip(random.poisson(genes_a_cell, n_cells), 1, n_genes)
    with tarfile.open(path, "w:gz", compresslevel=1) as tar, tempfile.TemporaryFile() as body:
        body.write(f"%%MatrixMarket matrix coordinate real general\n%\n{n_genes} {n_cells} {'0' * 12}\n".encode())
        total = 0
        for cell in range(n_cells):
            drawn = np.searchsorted(ends, random.random(lengths[cell])).clip(max=n_genes - 1)
            genes = np.unique(drawn)[::-1]
            counts = random.geometric(0.6, len(genes))
            body.write(
                "".join(
                    f"{gene + 1} {cell + 1} {count}\n"
                    for gene, count in zip(genes.tolist(), counts.tolist(), strict=True)
                ).encode()
            )
            total += len(genes)
        size = body.tell()
        body.seek(0)
        head = body.read(200)
        body.seek(head.index(b"0" * 12))
        body.write(f"{total:012d}".encode())
        body.seek(0)
        member = tarfile.TarInfo(PREFIX + "matrix.mtx")
        member.size = size
        genes = "".join(f"ENSG{index:011d}\tGENE{index - (index % 340 == 7)}\n" for index in range(n_genes)).encode()
        barcodes = "".join(f"{_barcode(index)}-1\n" for index in range(n_cells)).encode()
        for name, text in (("barcodes.tsv", barcodes), ("genes.tsv", genes)):
            small = tarfile.TarInfo(PREFIX + name)
            small.size = len(text)
            tar.addfile(small, io.BytesIO(text))
        tar.addfile(member, body)


def _barcode(index: int) -> str:
    return "".join("ACGT"[index >> 2 * place & 3] for place in range(14))


def build(archive: Path, target: Path) -> None:
    """Build once and print seconds and peak memory."""
    import anndata  # noqa: F401  (its import is not what is measured)
    import numba  # noqa: F401
    import pandas  # noqa: F401
    import scipy.sparse  # noqa: F401

    from bmfm_pipeline.data.sources.tenx import write_h5ad

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began, cpu = time.perf_counter(), time.process_time()
    found = write_h5ad(archive, target)
    print(
        json.dumps(
            {
                **found,
                "seconds": round(time.perf_counter() - began, 2),
                "cpu_seconds": round(time.process_time() - cpu, 2),
                "peak_mb_beyond_imports": round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024),
                "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
                "archive_mb": round(archive.stat().st_size / 1e6),
                "h5ad_mb": round(target.stat().st_size / 1e6),
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=int, default=CELLS)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--build", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch)
        archive, target = folder / f"cells-{arguments.cells}.tar.gz", folder / "built.h5ad"
        if arguments.build:
            return build(archive, target)
        if not archive.exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_archive(archive, arguments.cells)
        command = [sys.executable, __file__, "--build", "--cells", str(arguments.cells), "--folder", str(folder)]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
