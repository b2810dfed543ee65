"""Small archives in the format of 10x: matrix.mtx (genes x cells), genes.tsv and barcodes.tsv in a tar.gz."""

import gzip
import io
import tarfile
from pathlib import Path

import numpy as np

LABELS = ("CD14+ Monocyte", "CD19+ B", "CD34+")


def counts_of(n_cells: int = 30, n_genes: int = 12, seed: int = 0) -> np.ndarray:
    """(cells, genes) whole numbers; one cell and one gene without any."""
    counts = np.random.default_rng(seed).poisson(0.7, (n_cells, n_genes))
    counts[3], counts[:, 5] = 0, 0
    return counts


def matrix_text(counts: np.ndarray, kind: str = "integer", falling: bool = True) -> bytes:
    """The text of matrix.mtx, cell by cell; rows of a cell in falling order, as Cell Ranger 1 wrote them."""
    lines = []
    for cell, row in enumerate(counts):
        genes = np.flatnonzero(row)
        lines += [f"{gene + 1} {cell + 1} {row[gene]}\n" for gene in (genes[::-1] if falling else genes)]
    head = f"%%MatrixMarket matrix coordinate {kind} general\n%a comment\n{counts.shape[1]} {counts.shape[0]} {len(lines)}\n"
    return (head + "".join(lines)).encode()


def gene_lines(n_genes: int = 12) -> bytes:
    """genes.tsv; the last gene has the symbol of the first."""
    symbols = [f"GENE{index}" for index in range(n_genes - 1)] + ["GENE0"]
    return "".join(f"ENSG{index:011d}\t{symbol}\n" for index, symbol in enumerate(symbols)).encode()


def barcode_lines(n_cells: int = 30) -> bytes:
    return "".join(f"{'ACGT' * 3}{index:02d}-1\n" for index in range(n_cells)).encode()


def label_lines(n_cells: int = 30) -> bytes:
    return "".join(f"{LABELS[index % 3]}\n" for index in range(n_cells)).encode()


def files_of(counts: np.ndarray) -> dict[str, bytes]:
    """{name in the archive: content}."""
    folder = "filtered_matrices_mex/hg19/"
    return {
        folder + "barcodes.tsv": barcode_lines(counts.shape[0]),
        folder + "genes.tsv": gene_lines(counts.shape[1]),
        folder + "matrix.mtx": matrix_text(counts),
    }


def tar_of(files: dict[str, bytes], path: Path | None = None) -> bytes:
    """The bytes of a tar.gz of `files`; also written to `path`."""
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0) as packed, tarfile.open(fileobj=packed, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    if path is not None:
        path.write_bytes(buffer.getvalue())
    return buffer.getvalue()
