"""How a matrix of an h5ad is stored and what its values are, from a part of it: no matrix is loaded whole."""

from typing import Any

import numpy as np

from bmfm_pipeline.data.sources.tables import text

PART = 400_000  # stored values looked at in each of three places
ROWS = 200  # cells whose totals are compared


def matrix_names(file) -> list[str]:
    """X, the layers and .raw of an open h5ad, as they are called in it."""
    names = ["X"] if "X" in file else []
    if "layers" in file:
        names += [f"layers/{name}" for name in file["layers"]]
    return [*names, *(name for name in ("raw/X", "raw.X") if name in file)]


def matrix_facts(file, name: str) -> dict[str, Any]:
    """Storage and values of the matrix `name` of an open h5ad.

    "storage" is csr, csc or dense; "filled" the share of values above zero (of stored ones where sparse); "kind" one of counts,
    log-normalised, normalised, scaled, not finite, empty, with "normalised_to" (the total of a cell) where cells agree on one;
    "zeros_stored" and "unsorted" tell what was met in the part that was looked at ("share_seen" of the stored values).
    """
    import h5py

    node = file[name]
    dense = isinstance(node, h5py.Dataset)
    values = node if dense else node["data"]
    found: dict[str, Any] = {
        "name": name,
        "storage": "dense" if dense else _format(node),
        "dtype": str(values.dtype),
        "compression": values.compression or "none",
        "chunks": list(values.chunks) if values.chunks else None,
        "stored": int(np.prod(values.shape)),
    }
    if dense:
        shape, parts, unsorted = node.shape, _dense_parts(node), 0
    else:
        shape = tuple(int(size) for size in node.attrs.get("shape", node.attrs.get("h5sparse_shape")))
        found["index_dtype"] = str(node["indices"].dtype)
        parts, unsorted = _sparse_parts(node)
    seen = sum(map(len, parts))
    zeros = sum(int((part == 0).sum()) for part in parts)
    cells = max(1, int(np.prod(shape, dtype=np.float64)))
    share_above = 1 - zeros / seen if seen else 0.0
    found |= {
        "shape": list(shape),
        "filled": share_above if dense else found["stored"] * share_above / cells,
        "share_seen": min(1.0, seen / found["stored"]) if found["stored"] else 1.0,
        "zeros_stored": 0 if dense else zeros,
        "unsorted": unsorted,
    }
    found |= _kind(parts)
    return found | _totals(node, dense, found)


def _format(node) -> str:
    return text(node.attrs.get("encoding-type") or node.attrs.get("h5sparse_format", "unknown"))[:3]


def _starts(size: int) -> list[tuple[int, int]]:
    """Up to three ranges of at most PART entries: all, or the begin, the middle and the end."""
    if size <= 3 * PART:
        return [(0, size)] if size else []
    middle = size // 2
    return [(0, PART), (middle, middle + PART), (size - PART, size)]


def _sparse_parts(node) -> tuple[list[np.ndarray], int]:
    """(values looked at, number of places where an index does not rise within its row or column)."""
    indptr = node["indptr"][:]
    parts, unsorted = [], 0
    for low, high in _starts(node["data"].shape[0]):
        parts.append(node["data"][low:high])
        rising = np.diff(node["indices"][low:high].astype(np.int64)) > 0
        begins = indptr[(indptr > low) & (indptr < high)] - low - 1
        rising[begins] = True
        unsorted += int((~rising).sum())
    return parts, unsorted


def _dense_parts(node) -> list[np.ndarray]:
    if node.ndim != 2 or 0 in node.shape:
        return []
    per_row = node.shape[1]
    ranges = {(low // per_row, max(low // per_row + 1, high // per_row)) for low, high in _starts(int(node.size))}
    return [node[first:last].ravel() for first, last in sorted(ranges)]


def _kind(parts: list[np.ndarray]) -> dict[str, Any]:
    values = [part[part != 0] for part in parts]
    if not any(map(len, values)):
        return {"kind": "empty", "min": 0.0, "max": 0.0}
    finite = [part[np.isfinite(part)] for part in values]
    broken = sum(map(len, values)) - sum(map(len, finite))
    lows, highs = (
        [float(part.min()) for part in finite if len(part)],
        [float(part.max()) for part in finite if len(part)],
    )
    found = {"min": min(lows, default=0.0), "max": max(highs, default=0.0)}
    if broken:
        return found | {"kind": "not finite", "not_finite": broken}
    if found["min"] < 0:
        return found | {"kind": "scaled"}
    if all((part == np.rint(part)).all() for part in values):
        return found | {"kind": "counts"}
    return found | {"kind": "log-normalised" if found["max"] < 20 else "normalised"}


def _totals(node, dense: bool, found: dict[str, Any]) -> dict[str, Any]:
    """The total that the first cells were brought to, where they agree: of the values, or of what a logarithm was taken of."""
    if found["kind"] not in ("log-normalised", "normalised") or found["storage"] == "csc":
        return {}
    if dense:
        values = node[:ROWS].astype(np.float64)
        rows = [row[row != 0] for row in values]
    else:
        ends = node["indptr"][: ROWS + 1].astype(np.int64)
        values = node["data"][: ends[-1]].astype(np.float64)
        rows = np.split(values, ends[1:-1])
    rows = [row for row in rows if len(row)]
    if len(rows) < 2:
        return {}
    as_logs = (("ln", np.expm1), ("log2", lambda row: np.exp2(row) - 1))
    for base, undo in (("", lambda row: row), *(as_logs if found["max"] < 50 else ())):
        totals = np.array([undo(row).sum() for row in rows])
        if np.ptp(totals) < 0.01 * totals.mean():
            agreed = {"normalised_to": float(f"{totals.mean():.4g}")}
            return agreed | ({"kind": "log-normalised", "log_base": base} if base else {"kind": "normalised"})
    return {}
