"""A processed h5ad of sequences: letters and tokens as flat arrays in uns, contiguous, so that training memory-maps them."""

from pathlib import Path
from typing import Any

import numpy as np

from bmfm_pipeline.data.processed import ProcessedWriter
from bmfm_pipeline.data.stores.sequences import GROUP, STARTS
from bmfm_pipeline.errors import DataError


class SequenceWriter:
    """Writes a processed h5ad of sequences: obs, no genes, and flat arrays that are appended to block by block."""

    def __init__(self, path: Path, obs: Any):
        self._writer = ProcessedWriter(path, obs, [], (len(obs), 0))
        self._lengths: dict[str, list[np.ndarray]] = {}
        self._n = len(obs)

    def __enter__(self) -> "SequenceWriter":
        self._writer.__enter__()
        self._writer.matrix("X", np.zeros(self._n, np.int64), np.float32)
        self._group = self._writer.file.create_group(GROUP)
        self._group.attrs.update({"encoding-type": "dict", "encoding-version": "0.1.0"})
        return self

    def array(self, name: str, total: int, dtype: Any) -> None:
        """Preallocate `total` entries of one kind of array."""
        self._dataset(name, (total,), dtype)
        self._lengths[name] = [np.zeros(1, np.int64)]
        self._filled = {**getattr(self, "_filled", {}), name: 0}

    def append(self, name: str, values: np.ndarray, lengths: np.ndarray) -> None:
        """The entries of the next sequences, one after the other, and how many each has."""
        first = self._filled[name]
        self._group[name][first : first + len(values)] = values
        self._filled[name] = first + len(values)
        self._lengths[name].append(np.asarray(lengths, dtype=np.int64))

    def __exit__(self, kind, *error) -> None:
        if kind is None:
            for name, lengths in self._lengths.items():
                starts = np.cumsum(np.concatenate(lengths))
                if len(starts) != self._n + 1 or starts[-1] != self._group[name].shape[0]:
                    raise DataError(
                        f"{self._writer.path}: {name} of {len(starts) - 1} sequences were written, obs has {self._n}"
                    )
                self._dataset(STARTS[name], starts.shape, np.int64)[:] = starts
        self._writer.__exit__(kind, *error)

    def _dataset(self, name: str, shape: tuple[int, ...], dtype: Any):
        made = self._group.create_dataset(name, shape=shape, dtype=dtype)
        made.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        return made
