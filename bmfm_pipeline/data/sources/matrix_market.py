"""Matrix Market files of whole numbers, read column by column as a stream: as 10x writes counts, genes x cells."""

import functools
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from bmfm_pipeline.errors import DataError

BLOCK = 4 << 20  # bytes of text parsed at a time; about 300,000 values


class MatrixMarket:
    """A coordinate matrix whose values are whole numbers and whose columns come in order; rows of a column in any order.

    `shape` is (rows, columns), `n_values` the number of stored values. `name` is how messages call the file.
    """

    def __init__(self, stream: BinaryIO, name: str):
        self._stream, self.name = stream, name
        banner = stream.readline(1000).decode(errors="replace").split()
        if [word.lower() for word in banner[:3]] != ["%%matrixmarket", "matrix", "coordinate"]:
            raise DataError(f"{name}: is no Matrix Market coordinate file; its first line is {' '.join(banner)[:80]!r}")
        kind = [word.lower() for word in banner[3:]]
        if len(kind) < 2 or kind[0] not in ("integer", "real") or kind[1] != "general":
            raise DataError(f"{name}: holds a {' '.join(kind)} matrix; counts are stored as 'integer general'")
        self._line = 1
        text = b"%"
        while text.startswith(b"%") or not text.strip():
            text = stream.readline(100_000)
            self._line += 1
            if not text:
                raise DataError(f"{name}: ends before its sizes")
        sizes = text.split()
        if len(sizes) != 3 or not all(word.isdigit() for word in sizes):
            raise DataError(f"{name}, line {self._line}: expected rows, columns and values, found {text[:80]!r}")
        self.shape, self.n_values = (int(sizes[0]), int(sizes[1])), int(sizes[2])
        if max(self.shape) > np.iinfo(np.int32).max:
            raise DataError(
                f"{name}, line {self._line}: {self.shape[0]} x {self.shape[1]} is too large for 32-bit indices"
            )

    def columns(self) -> Iterator[tuple[int, "object"]]:
        """Yield (first column, scipy CSR float32: columns x rows, sorted indices) of all columns in order, about BLOCK bytes each."""
        parse = _parser()
        rows, columns, values = (np.empty(0, dtype=np.int32) for _ in range(3))
        rest, first, total = b"", 0, 0
        while text := self._stream.read(BLOCK):
            text = rest + text
            whole = text.rfind(b"\n") + 1
            rest = text[whole:]
            read = self._parsed(parse, text[:whole])
            rows, columns, values = (np.concatenate(pair) for pair in zip((rows, columns, values), read, strict=True))
            total += len(read[0])
            # The last column may go on in the next block.
            ready = int(np.searchsorted(columns, columns[-1])) if len(columns) else 0
            if ready:
                last = int(columns[-1])
                yield first, self._block(rows[:ready], columns[:ready], values[:ready], first, last)
                rows, columns, values, first = rows[ready:], columns[ready:], values[ready:], last
        if rest.strip():
            read = self._parsed(parse, rest + b"\n")
            rows, columns, values = (np.concatenate(pair) for pair in zip((rows, columns, values), read, strict=True))
            total += len(read[0])
        if total != self.n_values:
            raise DataError(
                f"{self.name}: promises {self.n_values:,} values and has {total:,}; it is cut short or damaged, fetch it again"
            )
        if first < self.shape[1]:
            yield first, self._block(rows, columns, values, first, self.shape[1])

    def _parsed(self, parse, text: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        size = text.count(b"\n")
        rows, columns, values = (np.empty(size, dtype=np.int32) for _ in range(3))
        filled, lines, wrong = parse(np.frombuffer(text, dtype=np.uint8), rows, columns, values)
        if wrong:
            line = text.splitlines()[lines] if lines < size else text[-80:]
            raise DataError(
                f"{self.name}, line {self._line + lines + 1}: expected row, column and a whole number up to {np.iinfo(np.int32).max}, "
                f"found {line[:80].decode(errors='replace')!r}"
            )
        self._line += lines
        rows, columns, values = rows[:filled], columns[:filled], values[:filled]
        for what, numbers, most in (("row", rows, self.shape[0]), ("column", columns, self.shape[1])):
            if filled and (numbers.min() < 1 or numbers.max() > most):
                raise DataError(
                    f"{self.name}: a {what} number lies outside 1..{most} near line {self._line}; it is damaged"
                )
        return rows - 1, columns - 1, values

    def _block(self, rows, columns, values, first: int, last: int):
        """CSR of the columns first..last-1, rows sorted."""
        from scipy import sparse

        if len(columns) and ((np.diff(columns) < 0).any() or columns[0] < first):
            raise DataError(
                f"{self.name}: its columns (cells) do not come in order; write it sorted by column, as 10x does"
            )
        ends = np.searchsorted(columns, np.arange(first, last + 1))
        block = sparse.csr_matrix((values.astype(np.float32), rows, ends), shape=(last - first, self.shape[0]))
        block.sort_indices()
        if len(rows) > 1:
            same = np.diff(block.indices) == 0
            inside = np.ones(len(same), dtype=bool)
            inside[ends[(ends > 0) & (ends < len(rows))] - 1] = False
            if (same & inside).any():
                raise DataError(f"{self.name}: a cell has two values for one gene; it is damaged")
        return block


@functools.cache
def _parser():
    """Compiled: (text, rows, columns, values) -> (values found, lines read, 1 when the line after those is wrong)."""
    import numba

    @numba.njit(nogil=True)
    def parse(text, rows, columns, values):
        filled, lines, at, size = 0, 0, 0, len(text)
        numbers = np.zeros(3, dtype=np.int64)
        while at < size:
            found, inside, fraction = 0, False, False
            while at < size and text[at] != 10:
                sign = text[at]
                at += 1
                if 48 <= sign <= 57:
                    if fraction:
                        if sign != 48:
                            return filled, lines, 1
                        continue
                    if not inside:
                        if found == 3:
                            return filled, lines, 1
                        numbers[found], inside = 0, True
                        found += 1
                    number = numbers[found - 1] * 10 + (sign - 48)
                    if number > 2147483647:
                        return filled, lines, 1
                    numbers[found - 1] = number
                elif sign == 32 or sign == 9 or sign == 13:
                    inside, fraction = False, False
                elif sign == 46 and inside and found == 3:
                    fraction = True
                else:
                    return filled, lines, 1
            at += 1
            if found == 3:
                rows[filled], columns[filled], values[filled] = numbers[0], numbers[1], numbers[2]
                filled += 1
            elif found:
                return filled, lines, 1
            lines += 1
        return filled, lines, 0

    return parse
