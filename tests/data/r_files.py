"""RData files as R's save() writes them (version 2, XDR), for matrices of package Matrix: enough of the format for tests."""

import gzip
import struct

import numpy as np
from scipy import sparse

_NIL = struct.pack(">i", 254)


def _flags(kind: int, is_object: bool = False, attributes: bool = False, tag: bool = False) -> bytes:
    return struct.pack(">i", kind | is_object << 8 | attributes << 9 | tag << 10)


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack(">i", 9 | 64 << 12) + struct.pack(">i", len(data)) + data


def _texts(texts, attributes: bytes = b"") -> bytes:
    body = b"".join(_text(text) for text in texts)
    return _flags(16, attributes=bool(attributes)) + struct.pack(">i", len(texts)) + body + attributes


def _symbol(name: str) -> bytes:
    return struct.pack(">i", 1) + _text(name)


def _pairs(entries: dict[str, bytes]) -> bytes:
    return b"".join(_flags(2, tag=True) + _symbol(name) + value for name, value in entries.items()) + _NIL


def _integers(values) -> bytes:
    values = np.asarray(values)
    return _flags(13) + struct.pack(">i", len(values)) + values.astype(">i4").tobytes()


def _reals(values) -> bytes:
    values = np.asarray(values)
    return _flags(14) + struct.pack(">i", len(values)) + values.astype(">f8").tobytes()


def _matrix(matrix, genes, cells, kind: str = "dgCMatrix") -> bytes:
    columns = sparse.csc_matrix(matrix)
    names = _NIL if cells is None else _texts(cells)
    of_class = _texts([kind], _pairs({"package": _texts(["Matrix"])}))
    slots = {
        "i": _integers(columns.indices),
        "p": _integers(columns.indptr),
        "Dim": _integers(columns.shape),
        "Dimnames": _flags(19) + struct.pack(">i", 2) + _texts(genes) + names,
        "x": _reals(columns.data),
        "factors": _flags(19) + struct.pack(">i", 0),
        "class": of_class,
    }
    return _flags(25, is_object=True, attributes=True) + _pairs(slots)


def rdata_bytes(objects: dict) -> bytes:
    """What save() writes of {name: (genes x cells matrix, gene names, cell names or None[, class])}, or of {name: numbers}."""
    made = {name: _matrix(*value) if isinstance(value, tuple) else _reals(value) for name, value in objects.items()}
    return gzip.compress(b"RDX2\nX\n" + struct.pack(">iii", 2, 0x30600, 0x20300) + _pairs(made))
