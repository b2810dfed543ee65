"""CellTypist as a control, through its own train and annotate."""

import logging
import warnings
from collections.abc import Sequence
from importlib.util import find_spec

import numpy as np

from bmfm_pipeline.errors import ConfigError

# CellTypist scales its values into a dense float64 matrix.
MOST_VALUES = 250_000_000
TOP_GENES = 300


def check_celltypist() -> None:
    """Raise ConfigError where CellTypist is not installed."""
    if find_spec("celltypist") is None:
        raise ConfigError(
            "evaluation.controls names celltypist, which is not installed; run `pip install 'bmfm-pipeline[celltypist]'`, or leave it out"
        )


def too_large(n_cells: int, n_genes: int) -> str:
    """Why CellTypist is not run on so many training cells; empty where it can be."""
    if n_cells * n_genes <= MOST_VALUES:
        return ""
    return (
        f"celltypist is left out: it scales all values at once, {8 * n_cells * n_genes / 1e9:.0f} GB for {n_cells} training cells of "
        f"{n_genes} genes"
    )


def fit_celltypist(x, y: np.ndarray, test_x, genes: Sequence[str], seed: int) -> np.ndarray:
    """Class ids (test cells,) that CellTypist predicts, trained on log values `x` (cells, genes) and class ids `y`.

    It is trained by stochastic gradient descent with its selection of genes, the way of its own published models; the other way that
    it has asks scikit-learn for an argument that current versions do not take. Its scores are not calibrated, so only classes are
    taken from it.
    """
    check_celltypist()
    from anndata import AnnData
    from threadpoolctl import threadpool_limits

    if len(np.unique(y)) < 2:
        return np.full(test_x.shape[0], y[0])
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore")
        import celltypist

        logging.getLogger("celltypist").setLevel(logging.ERROR)
        celltypist.logger.set_level(logging.ERROR)
        names = [str(gene) for gene in genes]
        model = celltypist.train(
            x,
            labels=np.array([str(label) for label in y]),
            genes=names,
            check_expression=False,
            n_jobs=1,
            use_SGD=True,
            feature_selection=(x.getnnz(axis=0) > 0).sum()
            > TOP_GENES,  # it leaves out genes without a value, and refuses fewer
            top_genes=TOP_GENES,
            random_state=seed,
        )
        # The first cell is taken as a sample of how values were normalised, so it must have some.
        order = np.argsort(np.diff(test_x.indptr) == 0, kind="stable")
        cells = AnnData(test_x[order].copy())
        cells.var_names, cells.obs_names = names, [str(row) for row in order]
        predicted = celltypist.annotate(cells, model=model).predicted_labels["predicted_labels"]
    found = np.empty(test_x.shape[0], dtype=np.int64)
    found[order] = predicted.astype(str).astype(np.int64).to_numpy()
    return found
