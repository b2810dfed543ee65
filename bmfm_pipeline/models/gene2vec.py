"""Pretrained gene vectors: a text table of `token v1 ... vd` lines put into an embedding whose rows are then kept as they are."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bmfm_pipeline.errors import ConfigError, DataError


class PartlyFrozenEmbedding(nn.Embedding):
    """An embedding whose rows marked in `frozen_rows` get no gradient. Keep it out of weight decay, which would still move them."""

    def __init__(self, rows: int, width: int, padding_idx: int):
        super().__init__(rows, width, padding_idx=padding_idx)
        self.register_buffer("frozen_rows", torch.zeros(rows, dtype=torch.bool))

    def forward(self, ids: Tensor) -> Tensor:
        vectors = super().forward(ids)
        # The gradient is cut at the positions that look a frozen row up, which costs nothing in the size of the table.
        return torch.where(self.frozen_rows[ids].unsqueeze(-1), vectors.detach(), vectors)

    def fill(self, rows: Tensor, vectors: Tensor, frozen: Tensor | None = None) -> None:
        """Write `vectors` (n, d) into `rows` (n,) and freeze these, or those in `frozen` instead."""
        with torch.no_grad():
            self.weight[rows] = vectors.to(self.weight.dtype)
            self.frozen_rows[rows if frozen is None else frozen] = True


@dataclass(frozen=True)
class PretrainedRows:
    """Vectors (n, d) of a file for the token ids `ids` (n,), those of them that stay as they are, and how many the file had."""

    ids: Tensor
    vectors: Tensor
    frozen: Tensor
    rows_in_file: int


def read_pretrained(field: str, settings: Mapping[str, Any], vocabulary: Sequence[str]) -> PretrainedRows:
    """The rows of settings["filename"] whose token is in the vocabulary.

    `pre_trained_indices_to_use` names rows of the file, counted from 0, `embedding_indices_to_freeze` token ids among those found.
    Raises ConfigError when no token is in common or an index does not exist, DataError for an unreadable file.
    """
    where, file = f"fields.{field}.pretrained_embedding", settings["filename"]
    tokens, vectors = read_vectors(file)
    rows, ids = match_rows(tokens, vocabulary)
    if not len(ids):
        raise ConfigError(
            f"{where}: none of the {len(tokens)} tokens of {file} (for example {', '.join(tokens[:3])}) is in the vocabulary (for "
            f"example {', '.join(list(vocabulary)[5:8])}); do the gene names agree?"
        )
    wanted = settings.get("pre_trained_indices_to_use")
    if wanted is not None:
        if strange := [index for index in wanted if not 0 <= index < len(tokens)]:
            raise ConfigError(
                f"{where}.pre_trained_indices_to_use: {strange[:5]} are no rows of {file}, which has 0 to {len(tokens) - 1}"
            )
        kept = np.isin(rows, wanted)
        rows, ids = rows[kept], ids[kept]
        if not len(ids):
            raise ConfigError(
                f"{where}.pre_trained_indices_to_use: none of these rows of {file} is of a token in the vocabulary"
            )
    frozen = settings.get("embedding_indices_to_freeze")
    if frozen is not None and (strange := sorted(set(frozen) - set(ids.tolist()))):
        raise ConfigError(
            f"{where}.embedding_indices_to_freeze: token ids {strange[:5]} got no vector from {file}; only rows that it fills "
            f"can be frozen, for example {ids[:5].tolist()}"
        )
    frozen = ids if frozen is None else np.array(sorted(set(frozen)), dtype=np.int64)
    return PretrainedRows(torch.from_numpy(ids), torch.from_numpy(vectors[rows]), torch.from_numpy(frozen), len(tokens))


def describe_pretrained(fields: Iterable[Mapping[str, Any]]) -> list[str]:
    """For each field of a built model with pretrained vectors, how many tokens were found, in words."""
    return [
        f"fields.{entry['field_name']}.pretrained_embedding: {found['rows_used']} of {entry['vocab_size']} tokens have a vector in "
        f"{found['filename']} ({found['rows_in_file']} rows), {found['rows_frozen']} are kept as they are; the others start at random"
        for entry in fields
        if (found := entry.get("pretrained_embedding"))
    ]


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
            if not np.isfinite(vectors[-1]).all():
                raise DataError(f"{path}, line {number}: the vector of {parts[0]} holds a value that is not a number")
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
