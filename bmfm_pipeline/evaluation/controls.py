"""Controls on the same split and the same training rows, from raw counts: what a simple method reaches."""

import logging
import warnings
from collections.abc import Sequence

import numpy as np

from bmfm_pipeline.errors import ConfigError
from bmfm_pipeline.evaluation.predictions import LabelPredictions

logger = logging.getLogger(__name__)

DEFAULT = ("majority", "logistic_l2")
FULL = (*DEFAULT, "logistic_l1", "pca50_logistic")
DESCRIPTIONS = {
    "majority": "always the commonest class of the training cells",
    "logistic_l2": "L2 logistic regression (C 1) on log1p of counts per 10,000, all genes, fitted on the training cells",
    "logistic_l1": "L1 logistic regression (C 0.1, liblinear, one-vs-rest) on the same values and cells",
    "pca50_logistic": "L2 logistic regression on the first 50 principal components of the same values, fitted on the same cells",
    "train_mean": "always the mean of the training cells",
}


def which_controls(asked: str | Sequence[str]) -> tuple[str, ...]:
    """The names behind 'default' and 'full'; a list is taken as it is, with the default ones always in it."""
    if asked == "default":
        return DEFAULT
    if asked == "full":
        return FULL
    return tuple(dict.fromkeys([*DEFAULT, *([asked] if isinstance(asked, str) else asked)]))


def log_cp10k(counts):
    """log1p of counts per 10,000: a CSR matrix float32 (cells, genes) from raw counts."""
    from scipy import sparse

    matrix = sparse.csr_matrix(counts, dtype=np.float32, copy=True)
    totals = np.asarray(matrix.sum(axis=1, dtype=np.float64)).ravel()
    scale = np.divide(1e4, totals, out=np.zeros_like(totals), where=totals > 0)
    matrix.data = np.log1p(matrix.data * np.repeat(scale, np.diff(matrix.indptr)).astype(np.float32))
    return matrix


def run_controls(
    counts,
    train_rows: np.ndarray,
    test_rows: np.ndarray,
    labels: dict[str, np.ndarray],
    class_names: dict[str, list[str]],
    which: Sequence[str],
    seed: int = 0,
) -> dict[str, dict[str, LabelPredictions]]:
    """{control: {label column: predictions of the test rows}}.

    `counts` offers rows(array) -> scipy CSR of raw counts; `labels` holds class ids (-100 unknown) or values (nan unknown) of all
    cells. Controls are fitted on the training rows with known labels, and on nothing else.
    """
    unknown = sorted(set(which) - set(FULL))
    if unknown:
        raise ConfigError(f"evaluation.controls: unknown control {', '.join(unknown)}; known: {', '.join(FULL)}")
    needs_counts = any(class_names.get(name) for name in labels) and set(which) != {"majority"}
    train_x = log_cp10k(counts.rows(train_rows)) if needs_counts else None
    test_x = log_cp10k(counts.rows(test_rows)) if needs_counts else None
    found: dict[str, dict[str, LabelPredictions]] = {}
    for name, values in labels.items():
        names = class_names.get(name) or []
        truth, fit = values[test_rows], values[train_rows]
        known = fit >= 0 if names else np.isfinite(fit)
        if not known.any():
            logger.warning("controls: no training cell has a known %s, so there is nothing to fit them on", name)
            continue
        if not names:
            mean = float(np.mean(fit[known], dtype=np.float64))
            found.setdefault("train_mean", {})[name] = LabelPredictions(truth, np.full(len(truth), mean))
            continue
        for control in which:
            if control == "majority":
                shares = np.bincount(fit[known], minlength=len(names)) / known.sum()
                probabilities = np.tile(shares, (len(truth), 1))
            else:
                probabilities = _fit_predict(control, train_x[known], fit[known], test_x, len(names), seed)
            found.setdefault(control, {})[name] = LabelPredictions(
                truth, probabilities.argmax(axis=1), probabilities, names
            )
    return found


def _fit_predict(control: str, x, y: np.ndarray, test_x, n_classes: int, seed: int) -> np.ndarray:
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression
    from sklearn.multiclass import OneVsRestClassifier
    from sklearn.pipeline import make_pipeline
    from threadpoolctl import threadpool_limits

    if len(np.unique(y)) < 2:
        probabilities = np.zeros((test_x.shape[0], n_classes))
        probabilities[:, y[0]] = 1
        return probabilities
    if control == "logistic_l1":
        model = OneVsRestClassifier(LogisticRegression(l1_ratio=1, C=0.1, solver="liblinear", random_state=seed))
    elif control == "pca50_logistic":
        components = max(1, min(50, min(x.shape) - 1))
        # arpack centres a sparse matrix without filling it in.
        pca = PCA(components, svd_solver="arpack", random_state=seed)
        model = make_pipeline(pca, LogisticRegression(max_iter=1000))
    else:
        model = LogisticRegression(max_iter=300)
    # One thread: the steps are small, and threads that wait for each other on busy cores made them a hundred times slower. It also
    # gives the same numbers on machines with another number of cores.
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore")  # a fit that stops at max_iter is a control all the same
        model.fit(x, y)
        found = model.predict_proba(test_x)
    probabilities = np.zeros((test_x.shape[0], n_classes))
    probabilities[:, model.classes_] = found
    return probabilities
