"""Metrics over weighted observations, vectorised over resamples: weights (R, n) in, values (R,) out. numpy only.

Classification metrics come from confusion matrices, so a thousand resamples are one matrix product. Macro averages run over the
classes that occur among the labels or the predictions, as in scikit-learn.
"""

from collections.abc import Callable

import numpy as np

from bmfm_pipeline.errors import ConfigError

Weights = np.ndarray


def confusion(y_true: np.ndarray, y_pred: np.ndarray, weights: Weights, n_classes: int) -> np.ndarray:
    """(R, C, C) weighted counts, rows true, columns predicted; y_* are class ids 0..C-1."""
    pairs, inverse = np.unique(y_true.astype(np.int64) * n_classes + y_pred, return_inverse=True)
    indicator = np.zeros((len(y_true), len(pairs)))
    indicator[np.arange(len(y_true)), inverse] = 1.0
    matrices = np.zeros((weights.shape[0], n_classes * n_classes))
    matrices[:, pairs] = weights @ indicator
    return matrices.reshape(-1, n_classes, n_classes)


def _divide(top: np.ndarray, bottom: np.ndarray, empty: float = 0.0) -> np.ndarray:
    return np.divide(top, bottom, out=np.full(np.broadcast(top, bottom).shape, empty), where=bottom != 0)


def _macro(values: np.ndarray, matrices: np.ndarray) -> np.ndarray:
    present = (matrices.sum(axis=1) + matrices.sum(axis=2)) > 0
    return _divide((values * present).sum(axis=1), present.sum(axis=1))


def accuracy_of(matrices: np.ndarray) -> np.ndarray:
    return _divide(np.trace(matrices, axis1=1, axis2=2), matrices.sum(axis=(1, 2)))


def recall_by_class(matrices: np.ndarray) -> np.ndarray:
    return _divide(np.diagonal(matrices, axis1=1, axis2=2), matrices.sum(axis=2))


def precision_by_class(matrices: np.ndarray) -> np.ndarray:
    return _divide(np.diagonal(matrices, axis1=1, axis2=2), matrices.sum(axis=1))


def f1_by_class(matrices: np.ndarray) -> np.ndarray:
    return _divide(2 * np.diagonal(matrices, axis1=1, axis2=2), matrices.sum(axis=1) + matrices.sum(axis=2))


def mcc_of(matrices: np.ndarray) -> np.ndarray:
    """Matthews correlation for any number of classes (Gorodkin 2004); 0 where it is not defined."""
    total, hits = matrices.sum(axis=(1, 2)), np.trace(matrices, axis1=1, axis2=2)
    true, predicted = matrices.sum(axis=2), matrices.sum(axis=1)
    top = hits * total - (true * predicted).sum(axis=1)
    bottom = np.sqrt((total**2 - (predicted**2).sum(axis=1)) * (total**2 - (true**2).sum(axis=1)))
    return _divide(top, bottom)


MATRIX_METRICS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "accuracy": accuracy_of,
    "f1": lambda matrices: _macro(f1_by_class(matrices), matrices),
    "precision": lambda matrices: _macro(precision_by_class(matrices), matrices),
    "recall": lambda matrices: _macro(recall_by_class(matrices), matrices),
    "mcc": mcc_of,
}


def auroc(y_true: np.ndarray, scores: np.ndarray, weights: Weights) -> np.ndarray:
    """Mean over classes of the one-vs-rest area under the ROC curve; classes without both kinds of cells are left out. nan if none."""
    return _over_classes(y_true, scores, weights, _binary_auroc)


def auprc(y_true: np.ndarray, scores: np.ndarray, weights: Weights) -> np.ndarray:
    """Mean over classes of the one-vs-rest average precision; classes without positives are left out. nan if none."""
    return _over_classes(y_true, scores, weights, _binary_average_precision)


def _over_classes(y_true, scores, weights, one) -> np.ndarray:
    if scores.ndim == 1:
        return one(y_true == 1, scores, weights)
    values = np.stack([one(y_true == label, scores[:, label], weights) for label in range(scores.shape[1])])
    known = np.isfinite(values)
    return np.where(known.any(axis=0), _divide(np.where(known, values, 0).sum(axis=0), known.sum(axis=0)), np.nan)


def _tied(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Order by falling score, and the last position of each run of equal scores."""
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    return order, np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))


def _binary_auroc(positive: np.ndarray, scores: np.ndarray, weights: Weights) -> np.ndarray:
    order, ends = _tied(scores)
    w = weights[:, order]
    hits = np.cumsum(w * positive[order], axis=1)[:, ends]
    alarms = np.cumsum(w * ~positive[order], axis=1)[:, ends]
    zero = np.zeros((len(weights), 1))
    hits, alarms = np.hstack([zero, hits]), np.hstack([zero, alarms])
    area = (np.diff(alarms, axis=1) * (hits[:, 1:] + hits[:, :-1]) / 2).sum(axis=1)
    return _divide(area, hits[:, -1] * alarms[:, -1], np.nan)


def _binary_average_precision(positive: np.ndarray, scores: np.ndarray, weights: Weights) -> np.ndarray:
    order, ends = _tied(scores)
    w = weights[:, order]
    hits = np.cumsum(w * positive[order], axis=1)[:, ends]
    all_ = np.cumsum(w, axis=1)[:, ends]
    gained = np.diff(np.hstack([np.zeros((len(weights), 1)), hits]), axis=1)
    return _divide((gained * _divide(hits, all_)).sum(axis=1), hits[:, -1], np.nan)


def mse(y_true: np.ndarray, y_pred: np.ndarray, weights: Weights) -> np.ndarray:
    return _divide(weights @ (y_true - y_pred) ** 2, weights.sum(axis=1))


def mae(y_true: np.ndarray, y_pred: np.ndarray, weights: Weights) -> np.ndarray:
    return _divide(weights @ np.abs(y_true - y_pred), weights.sum(axis=1))


def pcc(y_true: np.ndarray, y_pred: np.ndarray, weights: Weights) -> np.ndarray:
    """Pearson correlation; nan for a constant."""
    n = weights.sum(axis=1)
    x, y = y_true - y_true.mean(), y_pred - y_pred.mean()
    mx, my = (weights @ x) / n, (weights @ y) / n
    cov = (weights @ (x * y)) / n - mx * my
    vx, vy = (weights @ x**2) / n - mx**2, (weights @ y**2) / n - my**2
    return _divide(cov, np.sqrt(np.clip(vx, 0, None) * np.clip(vy, 0, None)), np.nan)


SCORE_METRICS = {"auroc": auroc, "auprc": auprc}
VALUE_METRICS = {"mse": mse, "mae": mae, "pcc": pcc}
ALL_METRICS = (*MATRIX_METRICS, *SCORE_METRICS, *VALUE_METRICS)
PROPORTIONS = ("accuracy",)


class Metric:
    """A metric of given observations that can be evaluated under many weightings.

    `name` is one of ALL_METRICS, or a function (y_true, y_pred) -> float, which is called once per resample.
    """

    def __init__(self, name: str | Callable, y_true, y_pred):
        self.name = name if isinstance(name, str) else getattr(name, "__name__", "metric")
        self.function = None if isinstance(name, str) else name
        self.y_true, self.y_pred = np.asarray(y_true), np.asarray(y_pred)
        if len(self.y_true) != len(self.y_pred):
            raise ConfigError(f"y_true has {len(self.y_true)} observations, y_pred has {len(self.y_pred)}")
        if not len(self.y_true):
            raise ConfigError("there is no observation to compute a metric from")
        if isinstance(name, str) and name not in ALL_METRICS:
            raise ConfigError(f"unknown metric '{name}'; known: {', '.join(ALL_METRICS)}")
        if name in MATRIX_METRICS:
            names, codes = np.unique(
                np.concatenate([self.y_true.astype(str), self.y_pred.astype(str)]), return_inverse=True
            )
            n = len(self.y_true)
            self._true, self._pred, self._classes = codes[:n], codes[n:], len(names)
        elif name in SCORE_METRICS:
            self.y_pred = self.y_pred.astype(np.float64)
        elif name in VALUE_METRICS:
            self.y_true, self.y_pred = self.y_true.astype(np.float64), self.y_pred.astype(np.float64)

    @property
    def n(self) -> int:
        return len(self.y_true)

    def values(self, weights: Weights) -> np.ndarray:
        """(R,) values under whole-number weights (R, n)."""
        if self.function is not None:
            index = np.arange(self.n)
            chosen = (np.repeat(index, row.astype(int)) for row in weights)
            return np.array([float(self.function(self.y_true[rows], self.y_pred[rows])) for rows in chosen])
        if self.name in MATRIX_METRICS:
            return MATRIX_METRICS[self.name](confusion(self._true, self._pred, weights, self._classes))
        return (SCORE_METRICS.get(self.name) or VALUE_METRICS[self.name])(self.y_true, self.y_pred, weights)

    def value(self) -> float:
        return float(self.values(np.ones((1, self.n)))[0])
