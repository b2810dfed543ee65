"""Cells without their padding: the positions of all cells of a batch one after another, in a stream of T positions.

What acts on single positions (embeddings, Linear layers, norms) runs on the stream as it is, in the shape (1, T, H). Attention reads it
cell by cell: cells of one length lie side by side, so that a group of them is a view of the stream.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass
class Packing:
    """Where the positions of a batch (B, L) lie in the stream.

    rows, lengths : of the cells in the order of the stream, longest first; cells of nothing but padding are left out.
    index : (T,) int64, for each place of the stream its flat position in B * L. offsets : (cells + 1,) int32, where cells begin.
    """

    batch: int
    length: int
    rows: Sequence[int]
    lengths: Sequence[int]
    index: Tensor
    offsets: Tensor

    @classmethod
    def of(cls, attention_mask: Tensor | None) -> "tuple[Tensor | None, Packing | None]":
        """What a model needs of a 0/1 mask (B, L): the mask, None when it hides nothing, and the packing, None when there is nothing to pack.

        A mask (B, L, L), or one with padding in front of a cell's positions, is left as it is. The mask is read: on an accelerator this
        waits, so do it in host memory and move the packing.
        """
        if attention_mask is None or attention_mask.dim() != 2:
            return attention_mask, None
        mask = attention_mask.to("cpu", torch.bool)
        batch, length = mask.shape
        counts = mask.sum(dim=1)
        if bool((counts == length).all()):
            return None, None
        if not bool((mask == (torch.arange(length) < counts[:, None])).all()):
            return attention_mask, None
        lengths, rows = torch.sort(counts, descending=True, stable=True)
        cells = int((lengths > 0).sum())
        if not cells:
            return attention_mask, None
        lengths, rows = lengths[:cells], rows[:cells]
        places = torch.arange(int(lengths[0]))
        index = (rows[:, None] * length + places)[places < lengths[:, None]]
        offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        packing = cls(batch, length, rows.tolist(), lengths.tolist(), index, offsets)
        return attention_mask, packing.to(attention_mask.device)

    def to(self, device: torch.device | str, *_, non_blocking: bool = False, **__) -> "Packing":
        """The same with its tensors on another device."""
        index, offsets = (part.to(device, non_blocking=non_blocking) for part in (self.index, self.offsets))
        return Packing(self.batch, self.length, self.rows, self.lengths, index, offsets)

    @cached_property
    def groups(self) -> list[tuple[int, int, list[int]]]:
        """(length, first place, rows) of the cells of one length, in the order of the stream."""
        found: list[tuple[int, int, list[int]]] = []
        start = 0
        for row, length in zip(self.rows, self.lengths, strict=True):
            if not found or found[-1][0] != length:
                found.append((length, start, []))
            found[-1][2].append(row)
            start += length
        return found

    @cached_property
    def places(self) -> Tensor:
        """(T,) the position of each place of the stream in its cell."""
        return self.index % self.length

    @cached_property
    def valid(self) -> Tensor:
        """(B, L), True where a position is not padding."""
        flat = torch.zeros(self.batch * self.length, dtype=torch.bool, device=self.index.device)
        return flat.index_fill_(0, self.index, True).view(self.batch, self.length)

    def pack(self, states: Tensor) -> Tensor:
        """(B, L, ...) -> (1, T, ...)"""
        return states.flatten(0, 1).index_select(0, self.index).unsqueeze(0)

    def unpack(self, stream: Tensor) -> Tensor:
        """(1, T, ...) -> (B, L, ...), zeros where padding is"""
        flat = stream.new_zeros(self.batch * self.length, *stream.shape[2:])
        return flat.index_copy(0, self.index, stream[0]).view(self.batch, self.length, *stream.shape[2:])

    def longer(self, tail: int) -> tuple["Packing", Tensor]:
        """The packing of the same cells with `tail` more positions behind each, and how its stream is gathered.

        The second is (T',): places in this stream, then, from T on, the places in a stream of the cells' tails in the order of their
        rows.
        """
        index = []
        start = 0
        for row, length in zip(self.rows, self.lengths, strict=True):
            index += [torch.arange(start, start + length), len(self.index) + row * tail + torch.arange(tail)]
            start += length
        gathered = torch.cat(index).to(self.index.device)
        lengths = [length + tail for length in self.lengths]
        room = self.length + tail
        flat = torch.cat([row * room + torch.arange(n) for row, n in zip(self.rows, lengths, strict=True)])
        steps = torch.arange(len(lengths) + 1, dtype=torch.int32, device=self.offsets.device) * tail
        wider = Packing(self.batch, room, self.rows, lengths, flat.to(self.index.device), self.offsets + steps)
        return wider, gathered

    @cached_property
    def firsts(self) -> Tensor:
        """(cells,) where in the stream the first positions of the cells are."""
        return self.offsets[:-1].to(torch.int64)

    def unpack_firsts(self, states: Tensor) -> Tensor:
        """(cells, 1, ...) in the order of the stream -> (B, 1, ...), zeros for cells of nothing but padding"""
        rows = torch.tensor(self.rows, device=states.device)
        return states.new_zeros(self.batch, *states.shape[1:]).index_copy(0, rows, states)

    def by_group(self, function: Callable[..., Tensor], *parts: Tensor) -> Tensor:
        """`function(rows, q, k, ...)` on every group, with (1, heads, T, d) cut into (cells, heads, length, d); back to (1, heads, T, d)."""
        sizes = [length * len(rows) for length, _, rows in self.groups]
        streams = [part[0].transpose(0, 1).split(sizes) for part in parts]
        mixed = []
        for (length, _, rows), *pieces in zip(self.groups, *streams, strict=True):
            cells = [piece.unflatten(0, (len(rows), length)).transpose(1, 2) for piece in pieces]
            mixed.append(function(rows, *cells).transpose(1, 2).flatten(0, 1))
        return (mixed[0] if len(mixed) == 1 else torch.cat(mixed)).transpose(0, 1).unsqueeze(0)

    def in_cells(self, function: Callable[..., Tensor], *parts: Tensor) -> Tensor:
        """`function(q, k, ...)` on the padded (B, heads, L, d) of each (1, heads, T, d); back to (1, heads, T, d)."""
        padded = [self.unpack(part.transpose(1, 2)).transpose(1, 2) for part in parts]
        return self.pack(function(*padded).transpose(1, 2)).transpose(1, 2)
