"""Statistics of confidences under resampling: calibration error, areas under risk-coverage curves. Weights (R, n) in, values (R,) out."""

from functools import cached_property

import numpy as np

BINS = 15
# With fewer cells in a bin its error is mostly luck.
FEWEST_IN_BIN = 20
SIMULATIONS = 1000
_AT_ONCE = 2_000_000


class OfCells:
    """A statistic of n cells, each of its own, as `evaluation.resampling` draws them."""

    def __init__(self, n: int):
        self.n = n

    def alike(self) -> tuple[np.ndarray, np.ndarray]:
        """Every cell acts for itself."""
        everyone = np.arange(self.n)
        return everyone, everyone

    def values(self, weights: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def value(self) -> float:
        return float(self.values(np.ones((1, self.n)))[0])


class Mean(OfCells):
    """Weighted mean of numbers (n,), of the cells `of` only where given; nan where none of them is drawn."""

    def __init__(self, numbers: np.ndarray, of: np.ndarray | None = None):
        super().__init__(len(numbers))
        self.of = np.ones(self.n) if of is None else of.astype(np.float64)
        self.numbers = numbers * self.of

    def values(self, weights: np.ndarray) -> np.ndarray:
        total = weights @ self.of
        return np.divide(weights @ self.numbers, total, out=np.full(len(weights), np.nan), where=total > 0)


def equal_bins(confidence: np.ndarray, bins: int = BINS) -> np.ndarray:
    """The bin of each cell, from 0 for the least sure: as many cells in each as equal confidences, which stay together, allow.

    At most `bins`, and so few that each has 20 cells.
    """
    n = len(confidence)
    count = max(1, min(bins, n // FEWEST_IN_BIN))
    order = np.argsort(confidence, kind="stable")
    ranked = confidence[order]
    # A cell goes with the first of those that are as sure as it.
    first = np.searchsorted(ranked, ranked, side="left")
    found = np.empty(n, dtype=np.int64)
    found[order] = np.unique(first * count // max(n, 1), return_inverse=True)[1]
    return found


class CalibrationError(OfCells):
    """Expected calibration error (Naeini et al. 2015): mean over cells of |accuracy - mean confidence| of their bin.

    `value` is that number. Luck in the bins makes it too large, and resampling adds as much luck again: `values` takes off each bin's
    gap what a normal error of twice its variance would add to it, so that their quantiles bound the error itself.
    """

    def __init__(self, confidence: np.ndarray, right: np.ndarray, bins: int = BINS):
        super().__init__(len(confidence))
        self.confidence, self.right = confidence, right.astype(np.float64)
        self.bin = equal_bins(confidence, bins)
        self.count = int(self.bin.max()) + 1

    @cached_property
    def _sums(self):
        """(3 bins, n) sparse: cells of each bin, their gaps and the squares of these."""
        from scipy import sparse

        gap, cells = self.right - self.confidence, np.arange(self.n)
        rows = np.concatenate([self.bin, self.bin + self.count, self.bin + 2 * self.count])
        values = np.concatenate([np.ones(self.n), gap, gap**2])
        return sparse.csr_matrix((values, (rows, np.tile(cells, 3))), shape=(3 * self.count, self.n))

    def _by_bin(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(R, bins) each: weight, mean gap, and the variance of that mean."""
        total, gap, square = np.split((self._sums @ weights.T).T, 3, axis=1)
        there = np.maximum(total, 1)
        mean = gap / there
        spread = np.maximum(square / there - mean**2, 0) / np.maximum(total - 1, 1)
        return total, mean, spread

    def value(self) -> float:
        total, mean, _ = self._by_bin(np.ones((1, self.n)))
        return float((np.abs(mean) * total).sum() / total.sum())

    def values(self, weights: np.ndarray) -> np.ndarray:
        from scipy.special import ndtr

        total, mean, spread = self._by_bin(weights)
        scale, size = np.sqrt(2 * spread) + 1e-12, np.abs(mean)
        ratio = size / scale
        expected = scale * np.sqrt(2 / np.pi) * np.exp(-(ratio**2) / 2) + size * (1 - 2 * ndtr(-ratio))
        return np.maximum(((2 * size - expected) * total).sum(axis=1) / total.sum(axis=1), 0)

    def if_calibrated(self, level: float, seed: int) -> tuple[float, float]:
        """(mean, upper end at `level`) of the error that a model would show whose confidences are exactly right, by simulation."""
        generator = np.random.default_rng(seed)
        runs = int(np.clip(10 * _AT_ONCE // self.n, 200, SIMULATIONS))
        block = max(1, _AT_ONCE // self.n)
        errors = []
        for start in range(0, runs, block):
            drawn = generator.random((min(block, runs - start), self.n)) < self.confidence
            # Sums by bin of what was drawn less what was to be expected.
            gap = np.zeros((len(drawn), self.count))
            for number in range(self.count):
                own = self.bin == number
                gap[:, number] = drawn[:, own].sum(axis=1) - self.confidence[own].sum()
            errors.append(np.abs(gap).sum(axis=1) / self.n)
        found = np.concatenate(errors)
        return float(found.mean()), float(np.quantile(found, level))

    def bins(self) -> list[dict[str, float]]:
        """[{low, high, confidence, accuracy, n}], from the least sure: the points of a reliability diagram."""
        found = []
        for number in range(self.count):
            own = self.bin == number
            confidence = self.confidence[own]
            found.append(
                {
                    "low": float(confidence.min()),
                    "high": float(confidence.max()),
                    "confidence": float(confidence.mean()),
                    "accuracy": float(self.right[own].mean()),
                    "n": int(own.sum()),
                }
            )
        return found


class _Ranked(OfCells):
    """Cells by falling confidence, those of equal confidence as one step."""

    def __init__(self, confidence: np.ndarray, right: np.ndarray):
        super().__init__(len(confidence))
        self.order = np.argsort(-confidence, kind="stable")
        ranked = confidence[self.order]
        self.ends = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))
        self.sizes = np.diff(self.ends, prepend=-1)
        self.wrong = ~right.astype(bool)[self.order]

    def _steps(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(R, steps) each: weight of the step, weight up to its end, and how much of that is wrong."""
        ranked = np.take(weights, self.order, axis=1)
        upto = np.cumsum(ranked, axis=1)[:, self.ends]
        wrong = np.cumsum(ranked * self.wrong, axis=1)[:, self.ends]
        return np.diff(upto, axis=1, prepend=0), upto, wrong


class RiskCoverageArea(_Ranked):
    """Area under the risk-coverage curve (Geifman and El-Yaniv 2017): mean over cells of the share of wrong labels among the cells
    that are at least as sure. 0 is best; confidences that say nothing reach the share of wrong labels of all cells."""

    def values(self, weights: np.ndarray) -> np.ndarray:
        own, upto, wrong = self._steps(weights)
        risk = np.divide(wrong, upto, out=np.zeros_like(upto), where=upto > 0)
        return (risk * own).sum(axis=1) / upto[:, -1]


class AccuracyAtCoverage(_Ranked):
    """Accuracy of the surest cells that make up at least the share `coverage`."""

    def __init__(self, confidence: np.ndarray, right: np.ndarray, coverage: float):
        super().__init__(confidence, right)
        self.coverage = coverage

    def values(self, weights: np.ndarray) -> np.ndarray:
        _, upto, wrong = self._steps(weights)
        # A little less than asked for, so that rounding does not add a step.
        step = (upto >= self.coverage * upto[:, -1:] * (1 - 1e-12)).argmax(axis=1)[:, None]
        return (1 - np.take_along_axis(wrong, step, 1) / np.take_along_axis(upto, step, 1)).ravel()
