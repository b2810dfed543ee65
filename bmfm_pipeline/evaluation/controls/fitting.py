"""One control fitted with scikit-learn on training cells, and what it says about others."""

import warnings

import numpy as np

from bmfm_pipeline.evaluation.controls.sequences import fit_network
from bmfm_pipeline.evaluation.controls.values import standardised, unit_length

COMPONENTS = 50
NEIGHBOURS = 15
PENALTIES = (1.0, 10.0, 100.0, 1e3, 1e4, 1e5)
FOLDS = 5


def fit_classes(control: str, x, y: np.ndarray, test_x, n_classes: int, seed: int) -> np.ndarray:
    """Probabilities (test cells, n_classes) of a control fitted on `x` (cells, features) and classes `y`, 0 for a class not in `y`.

    `x` is a CSR matrix of log values, principal components or embeddings, as `control` needs. Where all cells have one class it is
    certain.
    """
    probabilities = np.zeros((test_x.shape[0], n_classes))
    classes, counts = np.unique(y, return_counts=True)
    if control == "majority":
        probabilities[:, classes] = counts / len(y)
        return probabilities
    if len(classes) < 2:
        probabilities[:, classes] = 1
        return probabilities
    if control == "cnn":
        found = fit_network(x, np.searchsorted(classes, y), test_x, len(classes), seed)
        probabilities[:, classes] = found
        return probabilities
    with _alone():
        model, x, test_x = _class_model(control, x, test_x, seed)
        model.fit(x, y)
        probabilities[:, model.classes_] = model.predict_proba(test_x)
    return probabilities


def _class_model(control: str, x, test_x, seed: int):
    """(the model, what it is fitted on, what it is asked about)."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.multiclass import OneVsRestClassifier
    from sklearn.neighbors import KNeighborsClassifier

    if control == "logistic_l1":
        each = LogisticRegression(l1_ratio=1, C=0.1, solver="liblinear", random_state=seed)
        return OneVsRestClassifier(each), x, test_x
    if control == "kmer6_logistic":
        return LogisticRegression(C=0.1, max_iter=1000), x, test_x
    if control == "pca50_logistic":
        return LogisticRegression(max_iter=1000), x, test_x
    if control == "linear_probe":
        return LogisticRegression(max_iter=1000), *standardised(x, test_x)
    if control == "knn":
        return KNeighborsClassifier(min(NEIGHBOURS, len(x))), unit_length(x), unit_length(test_x)
    return LogisticRegression(max_iter=300), x, test_x


def fit_numbers(control: str, x, y: np.ndarray, test_x, seed: int) -> np.ndarray:
    """Numbers (test cells,) that a control predicts, fitted on `x` (cells, features) and `y` (cells,)."""
    y = y.astype(np.float64)
    if control == "train_mean" or len(y) < 2 or (y == y[0]).all():
        return np.full(test_x.shape[0], y.mean())
    if control == "cnn":
        return fit_network(x, y, test_x, 0, seed)
    with _alone():
        if control == "knn":
            from sklearn.neighbors import KNeighborsRegressor

            model = KNeighborsRegressor(min(NEIGHBOURS, len(x))).fit(unit_length(x), y)
            return model.predict(unit_length(test_x)).ravel()
        if control == "linear_probe":
            x, test_x = standardised(x, test_x)
        return _ridge(best_penalty(x, y, seed), x).fit(x, y).predict(test_x).ravel()


def best_penalty(x, y: np.ndarray, seed: int) -> float:
    """The one of PENALTIES with the smallest squared error over five folds of these cells; the middle one for fewer than 20 cells."""
    from sklearn.model_selection import KFold

    if len(y) < 4 * FOLDS:
        return PENALTIES[len(PENALTIES) // 2]
    errors = np.zeros(len(PENALTIES))
    for fit, held in KFold(FOLDS, shuffle=True, random_state=seed).split(y):
        own, others = x[fit], x[held]
        for place, penalty in enumerate(PENALTIES):
            errors[place] += ((_ridge(penalty, own).fit(own, y[fit]).predict(others) - y[held]) ** 2).sum()
    return PENALTIES[int(errors.argmin())]


def _ridge(penalty: float, x):
    from scipy import sparse
    from sklearn.linear_model import Ridge

    return Ridge(penalty, solver="sparse_cg" if sparse.issparse(x) else "cholesky")


def principal_components(train, test, seed: int):
    """(train, test) in the first 50 principal components of `train`, a CSR matrix; unchanged where there are not enough to take."""
    from sklearn.decomposition import PCA

    most = min(train.shape) - 1
    if most < 2 or not train.nnz or not _varies(train):
        return train, test
    with _alone():
        # arpack centres a sparse matrix without filling it in.
        pca = PCA(min(COMPONENTS, most), svd_solver="arpack", random_state=seed).fit(train)
        return pca.transform(train), pca.transform(test)


def _varies(x) -> bool:
    """Whether any two rows differ."""
    from sklearn.utils.sparsefuncs import mean_variance_axis

    return bool(mean_variance_axis(x, axis=0)[1].any())


class _alone:
    """One thread and no warnings.

    The steps are small, and threads that wait for each other on busy cores made them a hundred times slower; one also gives the same
    numbers on machines with another number of cores. A fit that stops at max_iter is a control all the same.
    """

    def __enter__(self):
        from threadpoolctl import threadpool_limits

        self._warnings, self._threads = warnings.catch_warnings(), threadpool_limits(1)
        self._warnings.__enter__()
        warnings.simplefilter("ignore")

    def __exit__(self, *error):
        self._threads.restore_original_limits()
        self._warnings.__exit__(*error)
