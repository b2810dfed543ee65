"""Sequences of a processed file as flat arrays: letters, and tokens of one or both strands."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bmfm_pipeline.data.stores.matrices import mapped

GROUP = "uns/sequences"
# A kind of array, and where the pieces of each sequence begin in it; `other_strand` are tokens of the reverse complement.
STARTS = {"letters": "letter_starts", "tokens": "token_starts", "other_strand": "other_starts"}


class SequenceArrays:
    """Flat arrays of the sequences of a processed file, memory-mapped. Pickles as its path.

    `letters` uint8 and `letter_starts` int64 (n + 1,); `tokens` uint16 or uint32 and `token_starts`; `other_strand` and `other_starts`
    likewise of reverse complements, or None where they were not kept.
    """

    def __init__(self, path: str | Path):
        import h5py

        self.path = Path(path)
        with h5py.File(self.path, "r") as file:
            group = file[GROUP]
            for name, starts in STARTS.items():
                there = name in group
                setattr(self, name, mapped(group[name], self.path) if there else None)
                setattr(self, starts, mapped(group[starts], self.path) if there else None)

    def __reduce__(self):
        return SequenceArrays, (self.path,)

    def __len__(self) -> int:
        return len(self.letter_starts) - 1

    def texts(self, rows: Sequence[int] | np.ndarray) -> list[str]:
        """The letters of chosen sequences."""
        begin, end = self.letter_starts[np.asarray(rows)], self.letter_starts[np.asarray(rows) + 1]
        return [
            self.letters[a:b].tobytes().decode("latin-1") for a, b in zip(begin.tolist(), end.tolist(), strict=True)
        ]
