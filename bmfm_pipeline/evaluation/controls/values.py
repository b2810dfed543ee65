"""What controls read of cells: log1p of counts per 10,000, and embeddings."""

import numpy as np

ROWS_AT_ONCE = 4096


def log_cp10k(counts):
    """log1p of counts per 10,000: a CSR matrix float32 (cells, genes) from raw counts; cells without a count stay zero.

    The matrix shares its index arrays with `counts`; beyond the values themselves, memory is that of a few thousand cells.
    """
    from scipy import sparse

    matrix = sparse.csr_matrix(counts)
    data = matrix.data.astype(np.float32)
    for start in range(0, matrix.shape[0], ROWS_AT_ONCE):
        ends = matrix.indptr[start : start + ROWS_AT_ONCE + 1]
        values, sizes = data[ends[0] : ends[-1]], np.diff(ends)
        cells = np.repeat(np.arange(len(sizes)), sizes)
        totals = np.bincount(cells, weights=values, minlength=len(sizes)).astype(np.float64)
        scale = np.divide(1e4, totals, out=np.zeros_like(totals), where=totals > 0)
        values *= scale[cells].astype(np.float32)
        np.log1p(values, out=values)
    return sparse.csr_matrix((data, matrix.indices, matrix.indptr), shape=matrix.shape, copy=False)


def standardised(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both (n, features) float64, each feature with mean 0 and deviation 1 over the training rows; one that never varies is 0."""
    mean, deviation = train.mean(axis=0, dtype=np.float64), train.std(axis=0, dtype=np.float64)
    varies = deviation > 1e-7 * np.maximum(1, np.abs(mean))
    scale = np.divide(1, deviation, out=np.zeros_like(deviation), where=varies)
    return (train - mean) * scale, (test - mean) * scale


def unit_length(rows: np.ndarray) -> np.ndarray:
    """Rows float32 divided by their length, so that Euclidean neighbours are those by cosine distance; a row of zeros stays."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, lengths, out=np.zeros(rows.shape, dtype=np.float32), where=lengths > 0)
