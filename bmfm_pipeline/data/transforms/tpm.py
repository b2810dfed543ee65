"""Transcripts per million for bulk RNA: counts divided by gene lengths that a GTF file gives."""

import gzip
import re
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import Field
from scipy import sparse

from bmfm_pipeline.data.transforms.steps import Step, added, row_sums
from bmfm_pipeline.errors import DataError

_NAME = "TPMNormalizationTransform"
_ATTRIBUTE = re.compile(r'(gene_id|gene_name) "([^"]*)"')


class TPMNormalization(Step):
    """Transcripts per million: each count over its gene's length in `gtf_file`, scaled so that a cell has a million.

    Cells without counts and genes that the file does not have are dropped, then genes that fewer than the share
    `filter_genes_min_percentage` (0..1) of the cells to fit on have above `filter_genes_min_value`. A gene's length is that of the
    union of its exons; genes are found by gene_id, gene_id without version, or gene_name, whichever names most of the data's.
    """

    needs_pass: ClassVar[bool] = True
    filters_cells: ClassVar[bool] = True
    gtf_file: str
    filter_genes_min_value: float = Field(0.01, ge=0)
    filter_genes_min_percentage: float = Field(0.01, ge=0, le=1)
    annotation_: dict[str, dict[str, int]] | None = Field(None, exclude=True)
    lengths_: dict[str, int] | None = Field(None, exclude=True)
    kept_: list[str] | None = Field(None, exclude=True)
    above_: Any = Field(None, exclude=True)
    cells_: int = Field(0, exclude=True)

    def look_at(self, source) -> None:
        if self.lengths_ is None and self.annotation_ is None:
            self.annotation_ = read_gene_lengths(Path(self.gtf_file))

    def _lengths(self, names: list[str]) -> dict[str, int]:
        if self.lengths_ is None:
            self.annotation_ = self.annotation_ or read_gene_lengths(Path(self.gtf_file))
            self.lengths_, self.annotation_ = _best(self.annotation_, names, self.gtf_file), None
        return self.lengths_

    def genes(self, names: list[str]) -> tuple[list[str], np.ndarray | None]:
        known = self._lengths(names) if self.kept_ is None else set(self.kept_)
        keep = np.array([index for index, name in enumerate(names) if name in known], dtype=np.int64)
        return [names[index] for index in keep], None if len(keep) == len(names) else keep

    def keep_cells(self, chunk: sparse.csr_matrix, names: list[str]) -> np.ndarray:
        return row_sums(chunk) > 0

    def values(self, chunk: sparse.csr_matrix, names: list[str]) -> sparse.csr_matrix:
        lengths = self._lengths(names)
        per_base = np.array([1 / lengths[name] if name in lengths else 0.0 for name in names])
        rates = chunk.data * per_base[chunk.indices]
        sizes = np.diff(chunk.indptr)
        totals = np.bincount(np.repeat(np.arange(len(sizes)), sizes), weights=rates, minlength=len(sizes))
        totals[totals == 0] = 1
        chunk.data = (rates / np.repeat(totals, sizes) * 1e6).astype(np.float32)
        return chunk

    def observe(self, chunk: sparse.csr_matrix, names: list[str]) -> None:
        self.cells_ += int(np.count_nonzero(row_sums(chunk) > 0))
        chunk = self.values(chunk.copy(), names)
        above = np.bincount(chunk.indices[chunk.data > self.filter_genes_min_value], minlength=len(names))
        self.above_ = added(self.above_, above)

    def seen(self) -> tuple[int, np.ndarray | None]:
        found, self.cells_, self.above_ = (self.cells_, self.above_), 0, None
        return found

    def add(self, seen: tuple[int, np.ndarray | None]) -> None:
        self.cells_ += seen[0]
        self.above_ = added(self.above_, seen[1])

    def finish(self, names: list[str]) -> None:
        lengths = self._lengths(names)
        above = np.zeros(len(names)) if self.above_ is None else self.above_
        share = above / max(self.cells_, 1)
        stays = share >= self.filter_genes_min_percentage
        self.kept_ = [name for name, keep in zip(names, stays, strict=True) if keep and name in lengths]
        # Lengths of all genes of the data stay: a cell's million counts those that are dropped, too.
        self.above_, self.cells_ = None, 0

    def fitted(self) -> dict[str, Any]:
        return {"lengths": self.lengths_, "kept": self.kept_}

    def restore(self, fitted: dict[str, Any]) -> None:
        self.lengths_, self.kept_ = fitted.get("lengths"), fitted.get("kept")


def read_gene_lengths(path: Path) -> dict[str, dict[str, int]]:
    """{"gene_id": {gene: bases}, "gene_name": ...}: length of the union of each gene's exons in a GTF file, plain or gzip."""
    exons: dict[str, dict[tuple[str, str], list[tuple[int, int]]]] = {"gene_id": {}, "gene_name": {}}
    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else open(path) as lines:
            for number, line in enumerate(lines, 1):
                if line.startswith("#") or not line.strip():
                    continue
                parts = line.rstrip("\n").split("\t")
                if len(parts) < 9:
                    raise DataError(
                        f"{path}: line {number} has {len(parts)} columns, a GTF file has 9; {_NAME} needs one"
                    )
                if parts[2] != "exon":
                    continue
                for attribute, name in dict(_ATTRIBUTE.findall(parts[8])).items():
                    place = exons[attribute].setdefault((name, parts[0]), [])
                    place.append((int(parts[3]), int(parts[4])))
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{_NAME}: gtf_file {path}: cannot be read ({error})") from None
    except ValueError:
        raise DataError(f"{path}: line {number}: start and end must be whole numbers") from None
    if not exons["gene_id"]:
        raise DataError(f"{path}: holds no exon with a gene_id; {_NAME} needs a GTF annotation with exons")
    return {attribute: _union(found) for attribute, found in exons.items()}


def _union(exons: dict[tuple[str, str], list[tuple[int, int]]]) -> dict[str, int]:
    """Bases covered by each gene's exons; of a gene on several chromosomes (X and Y) the longest counts."""
    lengths: dict[str, int] = {}
    for (name, _), spans in exons.items():
        covered, last = 0, 0
        for start, end in sorted(spans):
            covered += max(0, end - max(start, last + 1) + 1)
            last = max(last, end)
        lengths[name] = max(lengths.get(name, 0), covered)
    return lengths


def _best(lengths: dict[str, dict[str, int]], names: list[str], path: str) -> dict[str, int]:
    """{name of the data: length} by the attribute that names most of the data's genes."""
    bare = {name.split(".")[0]: length for name, length in lengths["gene_id"].items()}
    ways = [
        {name: table[key] for name in names if (key := spelt(name)) in table}
        for table, spelt in (
            (lengths["gene_id"], str),
            (bare, lambda name: name.split(".")[0] if name.startswith("ENS") else name),
            (lengths["gene_name"], str),
        )
    ]
    best = max(ways, key=len)
    if not best:
        known = ", ".join([*lengths["gene_id"]][:3] + [*lengths["gene_name"]][:3])
        raise DataError(
            f"{_NAME}: {path} has none of the {len(names)} genes of the data, e.g. {', '.join(names[:5])}; it has {known}. "
            "Rename the genes first (RenameGenesTransform, StandardizeGeneNamesTransform), or take another annotation"
        )
    return best
