"""A 10x matrix archive (matrix.mtx, genes.tsv, barcodes.tsv in a tar) turned into an h5ad in one pass, without unpacking it."""

import contextlib
import gzip
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from bmfm_pipeline.data.sources.matrix_market import MatrixMarket
from bmfm_pipeline.errors import DataError
from bmfm_pipeline.storage import check_room, disk_errors

# Base name without .gz: what the file is. Cell Ranger 3 renamed genes.tsv.
ROLES = {"matrix.mtx": "matrix", "genes.tsv": "genes", "features.tsv": "genes", "barcodes.tsv": "barcodes"}
MOST_TABLE_BYTES = 1 << 30  # a name table longer than this is none

Progress = Callable[[int, int], None]


def write_h5ad(
    archive: Path,
    target: Path,
    obs_columns: Callable[[np.ndarray], dict[str, Any]] | None = None,
    on_progress: Progress | None = None,
) -> dict[str, int]:
    """Write the counts of `archive` to `target`: cells x genes, CSR float32 with sorted int32 indices; the same bytes every time.

    obs names are the barcodes, var names the gene symbols, `var["gene_ids"]` the ids. A symbol that was given before becomes
    `SYMBOL_ID`, so that names are unique and repeats are seen; RenameGenesTransform cuts it back. `obs_columns(barcodes)` gives
    further columns, one value a cell. `on_progress(values read, values in all)`. Memory does not grow with cells, beyond names.

    Returns {"cells", "genes", "values", "repeated_symbols"}. Raises DataError for an archive that lacks a file, is cut short, or
    whose files do not fit together; nothing is left at `target` then.
    """
    archive, target = Path(archive), Path(target)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            found = _write(archive, part, obs_columns, on_progress)
            with open(part, "rb") as stream:
                os.fsync(stream.fileno())
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)
    return found


def _write(archive: Path, part: Path, obs_columns, on_progress) -> dict[str, int]:
    import h5py

    tables: dict[str, list[list[str]]] = {}
    where: dict[str, str] = {}
    with h5py.File(part, "w") as file, _reading(archive):
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        matrix = None
        for role, name, stream in _members(archive):
            if role in where:
                raise DataError(
                    f"{archive}: holds more than one {Path(name).name} ({where[role]} and {name}); give an archive of one genome"
                )
            where[role] = name
            if role == "matrix":
                matrix = _fill(file, MatrixMarket(stream, f"{archive}: {name}"), on_progress)
            else:
                tables[role] = _table(stream, f"{archive}: {name}")
        absent = [role for role in ("matrix", "genes", "barcodes") if role not in where]
        if absent:
            names = {"matrix": "matrix.mtx", "genes": "genes.tsv (or features.tsv)", "barcodes": "barcodes.tsv"}
            raise DataError(
                f"{archive}: is no 10x matrix archive: it has no {', '.join(names[role] for role in absent)}"
            )
        return _finish(file, archive, matrix, tables, obs_columns)


def _members(archive: Path) -> Iterator[tuple[str, str, BinaryIO]]:
    """(role, name, bytes) of the members that matter, in the order of the archive. Members are read, never written anywhere."""
    with tarfile.open(archive, "r|*") as tar:
        for member in tar:
            base = Path(member.name).name
            role = ROLES.get(base.removesuffix(".gz"))
            if role is None or not member.isreg():
                continue
            stream = tar.extractfile(member)
            yield role, member.name, gzip.GzipFile(fileobj=stream) if base.endswith(".gz") else stream


@contextlib.contextmanager
def _reading(archive: Path) -> Iterator[None]:
    try:
        yield
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{archive}: is no readable tar archive, or is cut short ({error}); remove it and fetch it again"
        ) from None
    except FileNotFoundError:
        raise DataError(f"{archive}: no such file") from None


def _table(stream: BinaryIO, name: str) -> list[list[str]]:
    data = stream.read(MOST_TABLE_BYTES + 1)
    if len(data) > MOST_TABLE_BYTES:
        raise DataError(f"{name}: is larger than {MOST_TABLE_BYTES:,} bytes; a table of names is expected")
    try:
        return [line.split("\t") for line in data.decode().splitlines() if line]
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: is no text ({error}); a table of names, one a line, is expected") from None


def _fill(file, matrix: MatrixMarket, on_progress: Progress | None) -> tuple[int, int, int]:
    """Stream the matrix into X; (cells, genes, values)."""
    genes, cells, size = matrix.shape[0], matrix.shape[1], matrix.n_values
    check_room(Path(file.filename).parent, 8 * size + 8 * cells)
    group = file.create_group("X")
    group.attrs.update(
        {"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": np.array((cells, genes), dtype=np.int64)}
    )
    data = group.create_dataset("data", shape=(size,), dtype=np.float32)
    indices = group.create_dataset("indices", shape=(size,), dtype=np.int32)
    lengths = np.zeros(cells, dtype=np.int64)
    done = 0
    # One chunk of whole cells at a time; h5py writes the contiguous datasets in place.
    for first, block in matrix.columns():
        end = done + len(block.data)
        data[done:end] = block.data
        indices[done:end] = block.indices
        lengths[first : first + block.shape[0]] = np.diff(block.indptr)
        done = end
        if on_progress:
            on_progress(done, size)
    group.create_dataset("indptr", data=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
    return cells, genes, size


def _finish(file, archive: Path, matrix, tables, obs_columns) -> dict[str, int]:
    import pandas as pd
    from anndata.io import write_elem

    cells, genes, size = matrix
    for role, expected, what in (("barcodes", cells, "columns"), ("genes", genes, "rows")):
        if len(tables[role]) != expected:
            raise DataError(
                f"{archive}: the matrix has {expected:,} {what} but {role}.tsv has {len(tables[role]):,} lines; "
                "the files do not belong together: fetch the archive again"
            )
    barcodes = np.array([row[0] for row in tables["barcodes"]], dtype=object)
    twice = len(barcodes) - len(set(barcodes))
    if twice:
        raise DataError(f"{archive}: {twice} barcodes are given twice; every cell needs a name of its own")
    ids = [row[0] for row in tables["genes"]]
    symbols = [row[1] if len(row) > 1 and row[1] else row[0] for row in tables["genes"]]
    names, repeated = _unique(symbols, ids)
    obs = pd.DataFrame(obs_columns(barcodes) if obs_columns else {}, index=pd.Index(barcodes, name="barcode"))
    var = pd.DataFrame({"gene_ids": ids}, index=pd.Index(names, dtype=object))
    write_elem(file, "obs", obs)
    write_elem(file, "var", var)
    for name in ("uns", "obsm", "varm", "obsp", "varp", "layers"):
        write_elem(file, name, {})
    return {"cells": cells, "genes": genes, "values": size, "repeated_symbols": repeated}


def _unique(symbols: list[str], ids: list[str]) -> tuple[list[str], int]:
    seen: set[str] = set()
    names = []
    for symbol, gene in zip(symbols, ids, strict=True):
        names.append(f"{symbol}_{gene}" if symbol in seen else symbol)
        seen.add(symbol)
    return names, len(symbols) - len(seen)
