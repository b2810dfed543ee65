"""A 10x matrix folder (matrix.mtx, features.tsv or genes.tsv, barcodes.tsv, each plain or gzip), or a tar of one."""

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bmfm_pipeline.config.reading import Reading
from bmfm_pipeline.data.sources.converting.writing import CellFile, unique_genes
from bmfm_pipeline.data.sources.matrix_market import MatrixMarket
from bmfm_pipeline.errors import DataError

GENES = "Gene Expression"


def write(path: Path, target: Path, reading: Reading) -> dict[str, Any]:
    """Cells by genes of the folder; features that are no genes (antibodies, guides) are left out and said. See `convert`."""
    if path.is_file():
        from bmfm_pipeline.data.sources.tenx import write_h5ad

        return write_h5ad(path, target)
    features = _table(_member(path, ("features.tsv", "genes.tsv")))
    barcodes = [row[0] for row in _table(_member(path, ("barcodes.tsv",)))]
    kinds = [row[2] if len(row) > 2 else GENES for row in features]
    kept = np.array([kind == GENES for kind in kinds], dtype=bool)
    if not kept.any():
        raise DataError(
            f"{path}: none of its {len(kinds)} features is of type {GENES}, but {', '.join(sorted(set(kinds)))}"
        )
    ids, symbols = [row[0] for row in features], [row[1] if len(row) > 1 and row[1] else row[0] for row in features]
    file_name = _member(path, ("matrix.mtx",))
    with _opened(file_name) as stream, CellFile(target) as file:
        matrix = MatrixMarket(stream, str(file_name))
        for found, expected, what in (
            (len(features), matrix.shape[0], "features"),
            (len(barcodes), matrix.shape[1], "barcodes"),
        ):
            if found != expected:
                raise DataError(
                    f"{path}: the matrix has {expected:,} {what}, and {found:,} are named; the files do not belong together"
                )
        for _, block in matrix.columns():
            file.add(block if kept.all() else block[:, kept])
        names = unique_genes(symbols, ids)
        var = pd.DataFrame({"gene_ids": ids}, index=names)[kept]
        obs = pd.DataFrame(index=pd.Index(barcodes))
        return {**file.finish(obs, var, path), "notes": other_features(kinds)}


def other_features(kinds: list[str], wanted: str = GENES) -> list[str]:
    """What was left out, in words."""
    others = pd.Series(kinds)[lambda kind: kind != wanted].value_counts()
    return [f"{count:,} features of type {kind} are left out" for kind, count in others.items()]


def _member(folder: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
    raise DataError(f"{folder}: is no whole 10x matrix folder: it has no {' or '.join(names)} (plain or .gz)")


def _opened(path: Path):
    return gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")


def _table(path: Path) -> list[list[str]]:
    try:
        with _opened(path) as stream:
            return [line.split("\t") for line in stream.read().decode().splitlines() if line]
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as a table of names ({error}); fetch it again") from None
