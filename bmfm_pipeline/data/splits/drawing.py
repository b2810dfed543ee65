"""Drawing a share of cells, or folds: by cell, balanced over classes, or by whole groups."""

import math
import warnings

import numpy as np

from bmfm_pipeline.config.splits import PLACE
from bmfm_pipeline.data.label_files import few
from bmfm_pipeline.errors import DataError

# Folds among which a share of the cells is looked for when groups and classes must both be kept.
MOST_FOLDS = 20


def draw_cells(n: int, share: float, seed: int) -> np.ndarray:
    """True for a random `share` of n cells, at least one."""
    taken = np.zeros(n, dtype=bool)
    taken[np.random.default_rng([seed & 0xFFFFFFFF, 0xDE7]).permutation(n)[: max(1, round(share * n))]] = True
    return taken


def draw_stratified(classes: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(row numbers left, row numbers drawn): a `share` of the cells, each class in proportion.

    Both are in the order in which scikit-learn drew them, on which a draw from what is left depends. Raises ValueError
    where scikit-learn cannot.
    """
    from sklearn.model_selection import StratifiedShuffleSplit

    return next(StratifiedShuffleSplit(n_splits=1, test_size=share, random_state=seed).split(classes, classes))


def draw_groups(groups: np.ndarray, share: float, seed: int, classes: np.ndarray | None = None) -> np.ndarray:
    """True for whole groups that hold about a `share` of the cells: at least one group, never all of them."""
    names, codes, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    if classes is not None:
        part, of = _fraction(share, min(MOST_FOLDS, len(names)))
        # The seed hardly changes scikit-learn's folds of unequal groups, so it also says which of them are drawn.
        chosen = np.random.default_rng([seed & 0xFFFFFFFF, 0x56F]).permutation(of)[:part]
        return np.isin(stratified_group_folds(codes, classes, of, seed), chosen)
    chosen, cells, goal = [], 0, share * len(groups)
    order = np.random.default_rng([seed & 0xFFFFFFFF, 0x620]).permutation(len(names))
    for group in order:
        # A group is taken when the share comes nearer with it than without.
        if len(chosen) < len(names) - 1 and abs(cells + sizes[group] - goal) < abs(cells - goal):
            chosen.append(group)
            cells += sizes[group]
    if not chosen:
        chosen = [min(order, key=lambda group: sizes[group])]
    return np.isin(codes, chosen)


def _fraction(share: float, most: int) -> tuple[int, int]:
    """(part, of) with `of` at most `most`, nearest to `share`; the smallest `of` among equals."""
    candidates = [
        (abs(part / of - share), of, part)
        for of in range(2, most + 1)
        for part in [min(max(1, round(share * of)), of - 1)]
    ]
    _, of, part = min((round(error, 9), of, part) for error, of, part in candidates)
    return part, of


def cell_folds(n: int, n_folds: int, seed: int) -> np.ndarray:
    """The fold of each of n cells, folds of equal size."""
    folds = np.empty(n, dtype=np.int64)
    folds[np.random.default_rng([seed & 0xFFFFFFFF, 0xF01D]).permutation(n)] = np.arange(n) % n_folds
    return folds


def stratified_folds(classes: np.ndarray, n_folds: int, seed: int) -> np.ndarray:
    """The fold of each cell, each class in proportion."""
    from sklearn.model_selection import StratifiedKFold

    return _folds(StratifiedKFold(n_folds, shuffle=True, random_state=seed).split(classes, classes), len(classes))


def group_folds(groups: np.ndarray, n_folds: int, seed: int) -> np.ndarray:
    """The fold of each cell, whole groups together: the largest first, each into the fold with the fewest cells."""
    names, codes, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    luck = np.random.default_rng([seed & 0xFFFFFFFF, 0x6F0]).permutation(len(names))
    cells, fold_of = np.zeros(n_folds, dtype=np.int64), np.empty(len(names), dtype=np.int64)
    for group in sorted(range(len(names)), key=lambda group: (-sizes[group], luck[group])):
        fold_of[group] = cells.argmin()
        cells[fold_of[group]] += sizes[group]
    return fold_of[codes]


def stratified_group_folds(groups: np.ndarray, classes: np.ndarray, n_folds: int, seed: int) -> np.ndarray:
    """The fold of each cell: whole groups together, classes as evenly as the groups allow."""
    from sklearn.model_selection import StratifiedGroupKFold

    splitter = StratifiedGroupKFold(n_folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes smaller than the folds: counted in the record of the split
        try:
            return _folds(splitter.split(classes, classes, groups), len(classes))
        except ValueError as error:
            raise DataError(
                f"{PLACE}: whole groups cannot be balanced over classes in {n_folds} folds ({error}); use method=group, which does not "
                "look at classes, or fewer folds"
            ) from None


def _folds(rounds, n: int) -> np.ndarray:
    folds = np.empty(n, dtype=np.int64)
    for number, (_, test) in enumerate(rounds):
        folds[test] = number
    return folds


def smallest_class(n_folds: int | None, rounds: int) -> int:
    """Cells that a class needs so that every round of a stratified split finds one, and leaves one."""
    if n_folds is None:
        return max(2, rounds + 1)
    size = n_folds
    while rounds and size - math.ceil(size / n_folds) < 2:
        size += 1
    return size


def too_small(
    codes: np.ndarray, names: np.ndarray, fewest: int, label: str, rare: str, shares: list[float]
) -> np.ndarray:
    """bool (classes,): classes that a stratified split leaves in train because they have too few cells.

    With rare "error" there are none: DataError names them. `shares` are those of the rounds to come, of what is left
    each time; a round can only serve as many classes as it takes cells.
    """
    sizes = np.bincount(codes, minlength=len(names))
    small = sizes < fewest
    if rare == "error":
        if small.any():
            found = few((f"{names[code]} ({sizes[code]})" for code in np.flatnonzero(small)), 5)
            raise DataError(
                f"obs['{label}']: too few cells to stratify by: {found}; a class needs {fewest} cells. Keep such classes in training with "
                f"{PLACE}.rare_classes=train, remove or merge them, or split at random ({PLACE}.method=random)"
            )
        return small
    for limit in np.unique(np.append(sizes[sizes >= fewest], fewest)):
        small = sizes < limit
        left, classes = int(sizes[~small].sum()), int((~small).sum())
        if not classes:
            break
        fits = True
        for share in shares:
            taken = math.ceil(share * left)
            left -= taken
            fits = fits and min(taken, left) >= classes
        if fits:
            return small
    raise DataError(
        f"obs['{label}']: {len(names)} classes are too many and too small to spread over train, dev and test; split at random "
        f"({PLACE}.method=random), or merge classes"
    )
