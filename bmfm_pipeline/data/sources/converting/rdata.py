"""RData and rds files that hold a sparse matrix of package Matrix (dgCMatrix, genes by cells), as PanglaoDB's do."""

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from bmfm_pipeline.config.reading import PLACE, Reading
from bmfm_pipeline.data.sources.converting.writing import CellFile
from bmfm_pipeline.errors import ConfigError, DataError

# Names under which the matrix is looked for, in this order.
USUAL = ("sm", "sm2", "spliced")
_SPARSE = ("dgCMatrix", "dgTMatrix", "dgRMatrix", "lgCMatrix", "ngCMatrix")


def write(path: Path, target: Path, reading: Reading) -> dict[str, Any]:
    """Cells by genes of the matrix in `path`, whose columns are cells; see `convert`."""
    name, matrix = _chosen(_objects(path), reading.r_object, path)
    slots = _slots(matrix)
    kind = _class_of(slots)
    if kind != "dgCMatrix":
        raise DataError(
            f"{path}: {name} is a {kind or 'object without a class'}; a dgCMatrix is read: as(x, 'CsparseMatrix')"
        )
    absent = [slot for slot in ("i", "p", "x", "Dim", "Dimnames") if slot not in slots]
    if absent:
        raise DataError(f"{path}: {name} has no slot {', '.join(absent)}; it is damaged: write it again")
    genes, cells = (int(size) for size in slots["Dim"].value)
    rows, ends, values = (np.asarray(slots[slot].value) for slot in ("i", "p", "x"))
    _check(path, name, rows, ends, values, genes, cells)
    row_names, column_names = (_names(entry) for entry in slots["Dimnames"].value)
    if row_names is None or len(row_names) != genes:
        raise DataError(f"{path}: {name} has {genes:,} genes and no names for them (rownames); they are needed")
    notes = [] if column_names else ["cells have no names and are numbered"]
    column_names = column_names or [str(number) for number in range(cells)]
    if len(column_names) != cells:
        raise DataError(f"{path}: {name} has {cells:,} cells and {len(column_names):,} names for them; it is damaged")
    block = sparse.csr_matrix(
        (values.astype(np.float32), rows.astype(np.int32), ends.astype(np.int64)), shape=(cells, genes)
    )
    block.eliminate_zeros()
    with CellFile(target) as file:
        file.add(block)
        found = file.finish(pd.DataFrame(index=column_names), pd.DataFrame(index=row_names), path)
    fractional = int((block.data != np.rint(block.data)).sum())
    if fractional:
        notes.append(f"{fractional:,} of {block.nnz:,} values are no whole numbers")
    return {**found, "notes": notes, "object": name}


def _objects(path: Path) -> dict[str, Any]:
    """{name: parsed R object} of a file; a single object without a name is called by the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from rdata.parser import RObjectType, parse_data

            tree = parse_data(_unpacked(path))
    except ImportError:
        raise DataError(f"{path}: reading RData needs the package rdata; run `pip install rdata`") from None
    except DataError:
        raise
    except Exception as error:
        raise DataError(
            f"{path}: is no RData file, or is damaged or cut short ({type(error).__name__}: {error}); fetch it again"
        ) from None
    found: dict[str, Any] = {}
    node = tree.object
    if node.info.type is not RObjectType.LIST:
        return {path.name: node}
    while node is not None and node.info.type is RObjectType.LIST:
        found[_symbol(node.tag)] = node.value[0]
        node = node.value[1]
    return found


def _unpacked(path: Path) -> bytes:
    """The bytes of the file, unpacked; a stream that ends too early is an error and not what came of it."""
    import bz2
    import gzip
    import lzma
    import zlib

    openers = ((b"\x1f\x8b", gzip.open), (b"BZh", bz2.open), (b"\xfd7zXZ", lzma.open))
    with open(path, "rb") as stream:
        head = stream.read(6)
    opener = next((way for start, way in openers if head.startswith(start)), io.open)
    try:
        with opener(path, "rb") as stream:
            data = stream.read()
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{path}: is damaged or cut short ({error}); fetch it again") from None
    if not data.startswith((b"RDX", b"RDA", b"X\n", b"A\n")):
        raise DataError(f"{path}: is no RData file: it begins with {data[:12]!r}")
    return data


def _symbol(node) -> str:
    node = node.referenced_object if node.referenced_object is not None else node
    value = node.value.value if hasattr(node.value, "value") else node.value
    return value.decode() if isinstance(value, bytes) else str(value)


def _slots(node) -> dict[str, Any]:
    """Attributes of an R object by name: the slots of an S4 object."""
    found: dict[str, Any] = {}
    node = node.attributes
    while node is not None and isinstance(node.value, tuple) and node.tag is not None:
        found[_symbol(node.tag)] = node.value[0]
        node = node.value[1]
    return found


def _class_of(slots: dict[str, Any]) -> str | None:
    names = _names(slots["class"]) if "class" in slots else None
    return names[0] if names else None


def _names(node) -> list[str] | None:
    """A vector of text as a list; None for anything else, such as NULL."""
    if not isinstance(node.value, list):
        return None
    return [
        "NA"
        if entry.value is None
        else entry.value.decode("utf-8", "replace")
        if isinstance(entry.value, bytes)
        else str(entry.value)
        for entry in node.value
    ]


def _chosen(objects: dict[str, Any], asked: str | None, path: Path) -> tuple[str, Any]:
    there = ", ".join(f"{name} ({_class_of(_slots(node)) or node.info.type.name})" for name, node in objects.items())
    if asked is not None:
        if asked not in objects:
            raise ConfigError(f"{PLACE}.reading.r_object: {path} has no object '{asked}'; it has {there or 'none'}")
        return asked, objects[asked]
    for name in USUAL:
        if name in objects:
            return name, objects[name]
    matrices = [name for name, node in objects.items() if _class_of(_slots(node)) in _SPARSE]
    if len(matrices) == 1:
        return matrices[0], objects[matrices[0]]
    what = "several sparse matrices" if matrices else "no sparse matrix (dgCMatrix)"
    cure = (
        f"name one with {PLACE}.reading.r_object" if matrices else "save the counts as one: as(counts, 'CsparseMatrix')"
    )
    raise DataError(f"{path}: holds {what}: {there or 'nothing'}; {cure}")


def _check(path: Path, name: str, rows, ends, values, genes: int, cells: int) -> None:
    fits = (
        len(ends) == cells + 1
        and ends[0] == 0
        and ends[-1] == len(rows) == len(values)
        and not (np.diff(ends) < 0).any()
        and (not len(rows) or (rows.min() >= 0 and rows.max() < genes))
    )
    if not fits:
        raise DataError(
            f"{path}: the slots of {name} do not fit together ({genes:,} x {cells:,}, {len(rows):,} rows, {len(values):,} values, "
            f"{len(ends):,} ends); it is damaged: fetch it again"
        )
