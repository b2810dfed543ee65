"""The same sequence in two splits: identical ones, ones read on the other strand, and ones that share most of their pieces."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from bmfm_pipeline.data.sequences.letters import reverse_complement

# Pieces of so many letters are compared; of each sequence the few with the smallest hash, the same ones on both strands.
PIECE, SKETCH, SHARED = 12, 16, 0.5
_MIX = np.uint64(0x9E3779B97F4A7C15)
_CODES = np.full(256, 4, dtype=np.uint64)
for _code, _letter in enumerate(b"ACGT"):
    _CODES[_letter] = _code


@dataclass
class Leakage:
    """How many sequences of dev and test are in training as well: the same, on the other strand, or nearly so."""

    identical: dict[str, int]
    reverse: dict[str, int]
    near: dict[str, int]
    examples: list[tuple[str, str, str]]  # (sequence, training sequence, how)
    rows: np.ndarray  # of dev and test, int64

    def to_dict(self) -> dict[str, Any]:
        return {
            "identical": self.identical,
            "reverse_complement": self.reverse,
            "near_identical": self.near,
            "examples": [list(entry) for entry in self.examples],
        }

    @property
    def total(self) -> int:
        return len(self.rows)

    def sentence(self) -> str:
        """What was found, in words."""
        words = []
        for split in self.identical:
            parts = [
                f"{found[split]:,} {what}"
                for found, what in (
                    (self.identical, "identical to"),
                    (self.reverse, "the reverse complement of"),
                    (self.near, "nearly identical to"),
                )
                if found[split]
            ]
            if parts:
                words.append(f"{split}: {', '.join(parts)} a training sequence")
        return "; ".join(words)


def find_leakage(
    letters: np.ndarray, starts: np.ndarray, splits: np.ndarray, ids: np.ndarray, most_letters: int | None = None
) -> Leakage:
    """Sequences of dev and test that training has too.

    letters uint8 and starts int64 (n + 1,) as `clean` gives them, splits and ids object (n,). Nearly identical means: of the 16 smallest
    hashes of pieces of 12 letters (a min-hash sketch, strands not told apart; Broder 1997), half or more are those of one training
    sequence. A sequence counts once, as the closest kind. Of more than `most_letters` letters near ones are not looked for.
    """
    turned = reverse_complement(letters, starts)
    forward, backward = _whole_hashes(letters, starts), _whole_hashes(turned, starts)
    train = np.flatnonzero(splits == "train")
    others = {split: np.flatnonzero(splits == split) for split in ("dev", "test")}
    others = {split: rows for split, rows in others.items() if len(rows)}
    place = {}
    for row in train.tolist():
        place.setdefault(int(forward[row]), row)
    shared = {}
    if most_letters is None or len(letters) <= most_letters:
        scored = np.concatenate([*others.values(), np.zeros(0, np.int64)])
        shared = _near(_sketches(letters, turned, starts), train, scored)
    identical, reverse, near = ({split: 0 for split in others} for _ in range(3))
    rows, examples = [], []
    for split, chosen in others.items():
        for row in chosen.tolist():
            for found, how, counts in (
                (place.get(int(forward[row])), "identical", identical),
                (place.get(int(backward[row])), "reverse complement", reverse),
                (shared.get(row), "nearly identical", near),
            ):
                if found is not None:
                    counts[split] += 1
                    rows.append(row)
                    if len(examples) < 10:
                        examples.append((str(ids[row]), str(ids[found]), how))
                    break
    return Leakage(identical, reverse, near, examples, np.array(rows, dtype=np.int64))


def _whole_hashes(letters: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """uint64 (n,): a polynomial hash of each whole sequence and its length, collisions of 64 bits apart."""
    lengths = np.diff(starts)
    within = np.arange(len(letters), dtype=np.int64) - np.repeat(starts[:-1], lengths)
    powers = np.empty(int(lengths.max(initial=0)) + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        powers[0] = 1
        base = np.uint64(0xD6E8FEB86659FD93)
        for place in range(1, len(powers)):
            powers[place] = powers[place - 1] * base
        terms = (letters.astype(np.uint64) + np.uint64(1)) * _MIX * powers[within]
        sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(terms, dtype=np.uint64)])
        return _mixed(sums[starts[1:]] - sums[starts[:-1]] + lengths.astype(np.uint64))


def _mixed(values: np.ndarray) -> np.ndarray:
    """Bits well stirred (the finaliser of splitmix64)."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))


def _pieces(letters: np.ndarray) -> np.ndarray:
    """uint64: hash of the piece that begins at each place; the last places have none and hold the largest number."""
    codes = _CODES[letters]
    found = np.zeros(max(len(codes) - PIECE + 1, 0), dtype=np.uint64)
    broken = np.zeros(len(found), dtype=bool)
    for offset in range(PIECE):
        part = codes[offset : offset + len(found)]
        found = (found << np.uint64(2)) | (part & np.uint64(3))
        broken |= part > 3
    found = _mixed(found)
    found[broken] = np.iinfo(np.uint64).max
    return np.concatenate([found, np.full(len(codes) - len(found), np.iinfo(np.uint64).max, np.uint64)])


def _sketches(letters: np.ndarray, turned: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """uint64 (n, 16): the smallest distinct piece hashes of each sequence on both strands; filled up with the largest number."""
    none = np.iinfo(np.uint64).max
    forward, backward = _pieces(letters), _pieces(turned)
    lengths = np.diff(starts)
    result = np.full((len(lengths), SKETCH), none, dtype=np.uint64)
    for row, (first, length) in enumerate(zip(starts[:-1].tolist(), lengths.tolist(), strict=True)):
        count = length - PIECE + 1
        if count < 1:
            continue
        both = np.concatenate([forward[first : first + count], backward[first : first + count]])
        if len(both) > 4 * SKETCH:
            both = np.partition(both, 4 * SKETCH)[: 4 * SKETCH]
        smallest = np.unique(both)[:SKETCH]
        result[row, : len(smallest)] = smallest
    return result


def _near(sketches: np.ndarray, train: np.ndarray, others: np.ndarray) -> dict[int, int]:
    """{row of dev or test: row of training} with at least half of the smaller sketch in common."""
    none = np.iinfo(np.uint64).max
    sizes = (sketches != none).sum(axis=1)
    values = sketches[train].ravel()
    owners = np.repeat(train, SKETCH)
    keep = values != none
    order = np.argsort(values[keep], kind="stable")
    values, owners = values[keep][order], owners[keep][order]
    found: dict[int, int] = {}
    for row in others.tolist():
        own = sketches[row, : sizes[row]]
        low, high = np.searchsorted(values, own, "left"), np.searchsorted(values, own, "right")
        hits = [owners[a:b] for a, b in zip(low.tolist(), high.tolist(), strict=True) if b > a]
        if not hits:
            continue
        names, counts = np.unique(np.concatenate(hits), return_counts=True)
        best = int(counts.argmax())
        if counts[best] >= max(SHARED * min(sizes[row], sizes[names[best]]), 2):
            found[row] = int(names[best])
    return found
