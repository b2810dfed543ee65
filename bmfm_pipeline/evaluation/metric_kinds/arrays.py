"""What observations may look like: read into plain arrays, or refused with what was found."""

import numpy as np

from bmfm_pipeline.config.losses import IGNORED_LABEL
from bmfm_pipeline.errors import ConfigError


def plain_array(values) -> np.ndarray:
    found = np.asarray(values)
    # Columns of a table come as objects: read what they hold, so that 1 and 1.0 are one class.
    return np.asarray(found.tolist()) if found.dtype == object and found.ndim == 1 else found


def one_column(name: str, values: np.ndarray) -> np.ndarray:
    if values.ndim == 2 and values.shape[1] == 1:
        return values[:, 0]
    if values.ndim != 1:
        raise ConfigError(f"{name} has shape {values.shape}; one value per observation is expected, shape (n,)")
    return values


def numbers(name: str, values: np.ndarray) -> np.ndarray:
    try:
        return values.astype(np.float64)
    except (TypeError, ValueError):
        raise ConfigError(f"{name} holds {values.dtype} values; numbers are expected") from None


def refuse_unknown(name: str, values: np.ndarray, *, ignored: bool) -> None:
    if values.dtype == object:
        unknown = np.array([value is None or value != value for value in values])
    elif values.dtype.kind == "f":
        unknown = np.isnan(values)
    else:
        unknown = np.zeros(len(values), dtype=bool)
    if ignored and values.dtype.kind in "if":
        unknown |= values == IGNORED_LABEL
    if unknown.any():
        raise ConfigError(
            f"{name}: {int(unknown.sum())} of {len(values)} observations have no known label (None, nan or {IGNORED_LABEL}), "
            f"the first in row {int(np.flatnonzero(unknown)[0])}; leave those out first"
        )


def refuse_no_probabilities(name: str, values: np.ndarray) -> None:
    known = values[np.isfinite(values)]
    if len(known) and (known.min() < 0 or known.max() > 1.001):
        raise ConfigError(
            f"{name}: y_pred holds {known.min():.4g} to {known.max():.4g}; probabilities are expected, from 0 to 1"
        )


def codes_of_both(y_true: np.ndarray, y_pred: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct labels of both, sorted, and the codes of y_true followed by those of y_pred."""
    if y_true.dtype.kind in "biuf" and y_pred.dtype.kind in "biuf":
        both = np.concatenate([y_true, y_pred])
    else:
        both = np.concatenate([y_true.astype(str), y_pred.astype(str)])
    return np.unique(both, return_inverse=True)


def score_codes(name: str, y_true: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Class ids of the scores' columns; for one column of scores, 1 where the label is the greater of two."""
    labels, codes = np.unique(y_true, return_inverse=True)
    numeric = y_true.dtype.kind in "biuf"
    if scores.ndim == 1:
        if len(labels) > 2:
            raise ConfigError(
                f"{name}: one score per observation fits two labels, y_true holds {len(labels)}; pass scores of shape (n, C)"
            )
        return (y_true == 1).astype(int) if numeric and set(labels.tolist()) <= {0, 1} else codes
    width = scores.shape[1]
    if numeric and np.all(labels == labels.astype(int)) and labels[0] >= 0 and labels[-1] < width:
        return y_true.astype(int)
    if len(labels) == width:
        return codes
    raise ConfigError(
        f"{name}: y_pred has {width} columns, so y_true must hold class ids 0 to {width - 1}; found {', '.join(map(str, labels[:5]))}"
    )
