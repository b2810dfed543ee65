"""Pretrained gene vectors: a text table of `token v1 ... vd` lines put into an embedding whose rows are then kept as they are."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from bmfm_pipeline.errors import DataError


class PartlyFrozenEmbedding(nn.Embedding):
    """An embedding whose rows marked in `frozen_rows` get no gradient. Keep it out of weight decay, which would still move them."""

    def __init__(self, rows: int, width: int, padding_idx: int):
        super().__init__(rows, width, padding_idx=padding_idx)
        self.register_buffer("frozen_rows", torch.zeros(rows, dtype=torch.bool))

    def forward(self, ids: Tensor) -> Tensor:
        vectors = super().forward(ids)
        # The gradient is cut at the positions that look a frozen row up, which costs nothing in the size of the table.
        return torch.where(self.frozen_rows[ids].unsqueeze(-1), vectors.detach(), vectors)

    def fill(self, rows: Tensor, vectors: Tensor) -> None:
        """Write `vectors` (n, d) into `rows` (n,) and freeze these."""
        with torch.no_grad():
            self.weight[rows] = vectors.to(self.weight.dtype)
            self.frozen_rows[rows] = True


def read_vectors(path: str | Path) -> tuple[list[str], np.ndarray]:
    """Tokens and a float32 (rows, width) array of a gene2vec text file, whose first line is `rows width`. Raises DataError."""
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path}: pretrained embedding not found")
    tokens: list[str] = []
    vectors: list[np.ndarray] = []
    with path.open(encoding="utf-8") as lines:
        header = lines.readline().split()
        if len(header) != 2 or not all(part.isdigit() for part in header):
            raise DataError(f"{path}: the first line is {' '.join(header)[:60]!r}; expected 'rows width'")
        width = int(header[1])
        for number, line in enumerate(lines, start=2):
            parts = line.split()
            if not parts:
                continue
            if len(parts) != width + 1:
                raise DataError(f"{path}, line {number}: {len(parts) - 1} values; the header promises {width}")
            try:
                vectors.append(np.array(parts[1:], dtype=np.float32))
            except ValueError as error:
                raise DataError(f"{path}, line {number}: {error}") from None
            tokens.append(parts[0])
    if len(tokens) != int(header[0]):
        raise DataError(f"{path}: {len(tokens)} vectors; the header promises {header[0]}")
    return tokens, np.stack(vectors) if vectors else np.zeros((0, width), dtype=np.float32)


def match_rows(tokens: Sequence[str], vocabulary: Sequence[str], unknown_id: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the table that are in the vocabulary, and their token ids. A token the table repeats keeps its first row."""
    ids = {token: index for index, token in enumerate(vocabulary)}
    rows, found = [], []
    seen: set[int] = set()
    for row, token in enumerate(tokens):
        index = ids.get(token, unknown_id)
        if index != unknown_id and index not in seen:
            seen.add(index)
            rows.append(row)
            found.append(index)
    return np.array(rows, dtype=np.int64), np.array(found, dtype=np.int64)
