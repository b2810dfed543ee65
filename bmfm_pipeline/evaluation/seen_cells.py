"""Which cells of other data are cells that a model was trained on: by the counts of the genes that both have, and by name."""

from dataclasses import dataclass

import numpy as np

# Cells that express fewer of the shared genes may be alike by chance; of these the name must be the same too.
FEWEST_GENES = 20
ROWS = 20_000


@dataclass
class SeenCells:
    """Of n cells: `seen`, and `same_name` as some training cell, each bool (n,). `by_counts`: whether counts could be compared."""

    seen: np.ndarray
    same_name: np.ndarray
    by_counts: bool = True

    def __or__(self, other: "SeenCells") -> "SeenCells":
        return SeenCells(self.seen | other.seen, self.same_name | other.same_name, self.by_counts and other.by_counts)


def find_seen(new, rows: np.ndarray, training, training_rows: np.ndarray, by_counts: bool = True) -> SeenCells:
    """Which `rows` of the store `new` are among the `training_rows` of the store `training`.

    A cell is the same where its counts are, over the genes that both stores have, whatever it is called. By name alone, which barcodes of
    two studies may share by chance, where `by_counts` is False, a store has no counts, or fewer than 20 genes are shared.
    """
    names = {name: row for name, row in zip(training.obs_names[training_rows], training_rows.tolist(), strict=True)}
    same_name = np.array([name in names for name in new.obs_names[rows]], dtype=bool)
    shared = sorted(set(new.var_names) & set(training.var_names))
    if not by_counts or new.counts is None or training.counts is None or len(shared) < FEWEST_GENES:
        return SeenCells(same_name.copy(), same_name, by_counts=False)
    keys = np.random.default_rng(0x5EE4).integers(0, 2**64, size=len(shared), dtype=np.uint64)
    place = {gene: number for number, gene in enumerate(shared)}
    own, own_genes = _hashes(new, rows, place, keys)
    theirs, their_genes = _hashes(training, training_rows, place, keys)
    seen = np.isin(own, theirs[their_genes >= FEWEST_GENES]) & (own_genes >= FEWEST_GENES)
    by_row = dict(zip(training_rows.tolist(), theirs.tolist(), strict=True))
    for number in np.flatnonzero(same_name & ~seen):
        seen[number] = by_row[names[new.obs_names[rows[number]]]] == int(own[number])
    return SeenCells(seen, same_name)


def _hashes(store, rows: np.ndarray, place: dict[str, int], keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(uint64 (rows,): a checksum of each cell's counts over the genes of `place`, int64 (rows,): how many of them it expresses)."""
    table = np.array([place.get(gene, -1) for gene in store.var_names], dtype=np.int64)
    sums, sizes = np.zeros(len(rows), dtype=np.uint64), np.zeros(len(rows), dtype=np.int64)
    for start in range(0, len(rows), ROWS):
        indptr, indices, data = store.counts.gather(np.asarray(rows[start : start + ROWS], dtype=np.int64))
        genes = table[indices]
        there = (genes >= 0) & (data != 0)
        mixed = np.zeros(len(data), dtype=np.uint64)
        mixed[there] = _mixed(keys[genes[there]], data[there])
        running = np.concatenate([np.zeros(1, dtype=np.uint64), np.cumsum(mixed, dtype=np.uint64)])
        sums[start : start + ROWS] = (
            running[indptr[1:]] - running[indptr[:-1]]
        )  # wraps around, as sums of both stores do
        counted = np.concatenate([[0], np.cumsum(there)])
        sizes[start : start + ROWS] = counted[indptr[1:]] - counted[indptr[:-1]]
    return sums, sizes


def _mixed(keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """A number of gene and count that looks random (the finaliser of splitmix64)."""
    found = keys ^ (values.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    found = (found ^ (found >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    found = (found ^ (found >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return found ^ (found >> np.uint64(31))
