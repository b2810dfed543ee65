"""What controls read of cells: log1p of counts per 10,000, log-normalised input as it is, and embeddings."""

from collections.abc import Sequence
from typing import Any

import numpy as np

ROWS_AT_ONCE = 4096
LOG_OF_COUNTS = "log1p of counts per 10,000"
# What is read where there are no counts, by where it comes from.
WITHOUT_COUNTS = {
    "log_normalised": "the log-normalised values of the input, as they are",
    "X": "the values of the processed data (X), as they are",
}


def values_for_controls(store) -> tuple[Any, str]:
    """(matrix, where it comes from) of a store: raw counts, else log-normalised input, else X; only counts are normalised.

    Of sequences they are counts of words.
    """
    if getattr(store, "sequences", None) is not None:
        from bmfm_pipeline.evaluation.controls.sequences import SequenceValues

        return SequenceValues(store.sequences), "words"
    if store.counts is not None:
        return store.counts, "counts"
    if getattr(store, "log_values", None) is not None:
        return store.log_values, "log_normalised"
    return store.matrix, "X"


def as_they_are(values):
    """CSR float32 of values of which the logarithm was taken already."""
    from scipy import sparse

    return sparse.csr_matrix(values, dtype=np.float32)


def note_on_values(kind: str) -> str:
    """A sentence for a report about controls that had no counts to read."""
    return f"controls: the processed data hold no raw counts, so controls read {WITHOUT_COUNTS[kind]}; nothing is normalised again"


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


def values_read(notes: Sequence[str]) -> str:
    """Where the controls of an evaluation with these notes had their values from."""
    return next((kind for kind in WITHOUT_COUNTS if note_on_values(kind) in notes), "counts")


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
