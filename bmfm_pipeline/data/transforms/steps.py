"""The steps of a chain. Each says what it does to genes, to rows of a chunk, and what it must see of the data first.

Chunks are scipy CSR float32, cells x genes. Arithmetic follows scanpy's in float32, so that binned values agree exactly.
"""

from typing import Any, ClassVar

import numpy as np
from pydantic import Field, model_validator
from scipy import sparse

from bmfm_pipeline.config.strict import Section
from bmfm_pipeline.data.transforms.columns import ColumnMap
from bmfm_pipeline.errors import DataError


class Step(Section):
    """One transform. The base does nothing; a kind overrides what it is about."""

    needs_pass: ClassVar[bool] = False
    filters_cells: ClassVar[bool] = False
    gives_names: ClassVar[bool] = False

    def look_at(self, source) -> None:
        """See the source's tables, before anything else."""

    def genes(self, names: list[str]) -> tuple[list[str], np.ndarray | ColumnMap | None]:
        """New gene names and, when genes change places, the positions that stay (of the old ones), or a map that adds columns up."""
        return names, None

    def column_map(self, names: list[str]) -> tuple[list[str], np.ndarray]:
        """New gene names and, per old gene, int32 where its column goes: -1 drops it, columns with one target are added up."""
        after, columns = self.genes(names)
        return after, ColumnMap.of(columns, len(names)).target

    def values(self, chunk: sparse.csr_matrix, names: list[str]) -> sparse.csr_matrix:
        """New values of the same cells and genes; may change `chunk.data` in place."""
        return chunk

    @property
    def changes_values(self) -> bool:
        """Whether `values` does anything."""
        return type(self).values is not Step.values

    def obs_columns(self, chunk: sparse.csr_matrix, names: list[str]) -> dict[str, np.ndarray]:
        """Columns (cells of the chunk,) that this step adds to obs."""
        return {}

    def keep_cells(self, chunk: sparse.csr_matrix, names: list[str]) -> np.ndarray | None:
        """Boolean mask (cells of the chunk,) of the cells that stay."""
        return None

    def observe(self, chunk: sparse.csr_matrix, names: list[str]) -> None:
        """See one chunk of the cells to fit on (only when `needs_pass`)."""

    def observe_rows(self, chunk: sparse.csr_matrix, names: list[str], numbers: np.ndarray) -> None:
        """As `observe`, with the source's row number of each cell, for a step that needs to know which cells it sees."""
        self.observe(chunk, names)

    def seen(self) -> Any:
        """What was observed since the last call, for `add` of this step in another process; it is forgotten here. Plain values and arrays."""

    def add(self, seen: Any) -> None:
        """Take what another process observed of other cells, as `seen` gave it."""

    def finish(self, names: list[str]) -> bool | None:
        """All chunks were seen: settle what was fitted. True asks for another pass."""

    def fitted(self) -> dict[str, Any]:
        """What fitting found, as plain values; `restore` takes it back."""
        return {}

    def restore(self, fitted: dict[str, Any]) -> None:
        """Take what `fitted` returned."""


class KeepGenes(Step):
    """Keep and order the listed genes that exist; null keeps all. A string is a file with one gene per line."""

    genes_to_keep: list[str] | str | None = None

    def genes(self, names: list[str]) -> tuple[list[str], np.ndarray | None]:
        if self.genes_to_keep is None:
            return names, None
        wanted = self.genes_to_keep
        if isinstance(wanted, str):
            try:
                with open(wanted) as lines:
                    wanted = [line.strip() for line in lines if line.strip()]
            except OSError as error:
                raise DataError(
                    f"KeepGenesTransform: genes_to_keep {self.genes_to_keep}: cannot be read ({error.strerror})"
                ) from None
        position = {name: index for index, name in enumerate(names)}
        keep = [position[name] for name in wanted if name in position]
        if not keep:
            raise DataError(
                f"KeepGenesTransform: none of the {len(wanted)} genes to keep is in the data, e.g. {', '.join(wanted[:5])}"
            )
        return [names[index] for index in keep], np.array(keep, dtype=np.int64)


def _one_threshold(step: Section, names: tuple[str, ...]) -> tuple[str, float]:
    given = [(name, getattr(step, name)) for name in names if getattr(step, name) is not None]
    if len(given) != 1:
        raise ValueError(f"give exactly one of {', '.join(names)}; found {len(given)}")
    return given[0]


class FilterCells(Step):
    """Keep cells by one threshold, inclusive: total value (counts) or number of genes above zero."""

    filters_cells: ClassVar[bool] = True
    min_counts: float | None = None
    max_counts: float | None = None
    min_genes: int | None = None
    max_genes: int | None = None

    @model_validator(mode="after")
    def _one(self) -> "FilterCells":
        _one_threshold(self, ("min_counts", "max_counts", "min_genes", "max_genes"))
        return self

    def keep_cells(self, chunk: sparse.csr_matrix, names: list[str]) -> np.ndarray:
        name, threshold = _one_threshold(self, ("min_counts", "max_counts", "min_genes", "max_genes"))
        number = row_sums(chunk) if name.endswith("counts") else row_counts(chunk)
        return number >= threshold if name.startswith("min") else number <= threshold


class FilterGenes(Step):
    """Keep genes by one threshold over the cells to fit on, inclusive: total value (counts) or number of cells above zero."""

    needs_pass: ClassVar[bool] = True
    min_counts: float | None = None
    max_counts: float | None = None
    min_cells: int | None = None
    max_cells: int | None = None
    kept_: list[str] | None = Field(None, exclude=True)
    number_: Any = Field(None, exclude=True)

    @model_validator(mode="after")
    def _one(self) -> "FilterGenes":
        _one_threshold(self, ("min_counts", "max_counts", "min_cells", "max_cells"))
        return self

    def observe(self, chunk: sparse.csr_matrix, names: list[str]) -> None:
        if self._by_counts():
            number = chunk.T @ np.ones(chunk.shape[0])
        else:
            above = chunk.indices if _all_positive(chunk) else chunk.indices[chunk.data > 0]
            number = np.bincount(above, minlength=len(names))
        self.add(number)

    def seen(self) -> np.ndarray | None:
        number, self.number_ = self.number_, None
        return number

    def add(self, seen: np.ndarray | None) -> None:
        self.number_ = added(self.number_, seen)

    def _by_counts(self) -> bool:
        return self.min_counts is not None or self.max_counts is not None

    def finish(self, names: list[str]) -> None:
        name, threshold = _one_threshold(self, ("min_counts", "max_counts", "min_cells", "max_cells"))
        number = np.zeros(len(names)) if self.number_ is None else self.number_
        stays = number >= threshold if name.startswith("min") else number <= threshold
        self.kept_ = [gene for gene, stay in zip(names, stays, strict=True) if stay]
        self.number_ = None

    def genes(self, names: list[str]) -> tuple[list[str], np.ndarray | None]:
        if self.kept_ is None or len(self.kept_) == len(names):
            return names, None
        kept = set(self.kept_)
        return [name for name in names if name in kept], np.array(
            [i for i, name in enumerate(names) if name in kept], dtype=np.int64
        )

    def fitted(self) -> dict[str, Any]:
        return {"kept": self.kept_}

    def restore(self, fitted: dict[str, Any]) -> None:
        self.kept_ = fitted.get("kept")


class QcMetrics(Step):
    """Keep cells with less than `pct_counts_mt` per cent of counts in MT- genes, and totals within s interquartile ranges."""

    filters_cells: ClassVar[bool] = True
    pct_counts_mt: float | None = Field(None, ge=0, le=100)
    total_counts_iqr_scale: float | None = Field(None, ge=0)
    bounds_: tuple[float, float] | None = Field(None, exclude=True)
    totals_: list[Any] = Field(default_factory=list, exclude=True)
    mitochondrial_: Any = Field(None, exclude=True)

    @property
    def needs_pass(self) -> bool:  # type: ignore[override]
        return self.total_counts_iqr_scale is not None

    def observe(self, chunk: sparse.csr_matrix, names: list[str]) -> None:
        self.totals_.append(row_sums(chunk)[self._mitochondrial(chunk, names)])

    def _mitochondrial(self, chunk: sparse.csr_matrix, names: list[str]) -> np.ndarray:
        if self.pct_counts_mt is None:
            return np.ones(chunk.shape[0], dtype=bool)
        if self.mitochondrial_ is None or self.mitochondrial_[0] is not names:
            self.mitochondrial_ = (names, np.array([name.startswith("MT-") for name in names], dtype=bool))
        totals = row_sums(chunk)
        found = np.flatnonzero(self.mitochondrial_[1][chunk.indices])
        rows = np.searchsorted(chunk.indptr, found, side="right") - 1
        share = np.bincount(rows, weights=chunk.data[found], minlength=chunk.shape[0]).astype(np.float32)
        with np.errstate(divide="ignore", invalid="ignore"):
            percent = share / totals * 100
        return np.nan_to_num(percent) < self.pct_counts_mt

    def seen(self) -> list[np.ndarray]:
        totals, self.totals_ = self.totals_, []
        return totals

    def add(self, seen: list[np.ndarray]) -> None:
        self.totals_ += seen

    def finish(self, names: list[str]) -> None:
        totals = np.concatenate(self.totals_) if self.totals_ else np.zeros(1)
        low, high = np.percentile(totals, [25, 75])
        margin = (self.total_counts_iqr_scale or 0) * (high - low)
        self.bounds_, self.totals_ = (float(low - margin), float(high + margin)), []

    def keep_cells(self, chunk: sparse.csr_matrix, names: list[str]) -> np.ndarray:
        keep = self._mitochondrial(chunk, names)
        if self.bounds_ is not None:
            totals = row_sums(chunk)
            keep &= (totals >= self.bounds_[0]) & (totals <= self.bounds_[1])
        return keep

    def fitted(self) -> dict[str, Any]:
        return {"bounds": self.bounds_}

    def restore(self, fitted: dict[str, Any]) -> None:
        self.bounds_ = tuple(fitted["bounds"]) if fitted.get("bounds") else None


class NormalizeTotal(Step):
    """Scale each cell to `target_sum` (null: the median total); optionally leaving genes above `max_fraction` of a cell out of the total."""

    target_sum: float | None = Field(None, gt=0)
    exclude_highly_expressed: bool = False
    max_fraction: float = Field(0.05, ge=0, le=1)
    target_: float | None = Field(None, exclude=True)
    high_: list[str] | None = Field(None, exclude=True)
    totals_: list[Any] = Field(default_factory=list, exclude=True)
    mask_: Any = Field(None, exclude=True)

    @property
    def needs_pass(self) -> bool:  # type: ignore[override]
        return self.target_sum is None or self.exclude_highly_expressed

    def observe(self, chunk: sparse.csr_matrix, names: list[str]) -> None:
        totals = row_sums(chunk)
        self.totals_.append(totals)
        if self.exclude_highly_expressed:
            high = chunk.data > np.repeat(totals * np.float32(self.max_fraction), np.diff(chunk.indptr))
            found = np.zeros(len(names), dtype=bool)
            found[chunk.indices[high]] = True
            self.mask_ = added(self.mask_, found)

    def seen(self) -> tuple[list[np.ndarray], np.ndarray | None]:
        found, self.totals_, self.mask_ = (self.totals_, self.mask_), [], None
        return found

    def add(self, seen: tuple[list[np.ndarray], np.ndarray | None]) -> None:
        self.totals_ += seen[0]
        self.mask_ = added(self.mask_, seen[1])

    def finish(self, names: list[str]) -> None:
        if self.mask_ is not None:
            self.high_ = [name for name, high in zip(names, self.mask_, strict=True) if high]
        if self.target_sum is None:
            totals = np.concatenate(self.totals_) if self.totals_ else np.ones(1)
            self.target_ = float(np.median(totals))
        self.totals_, self.mask_ = [], None

    def values(self, chunk: sparse.csr_matrix, names: list[str]) -> sparse.csr_matrix:
        if self.high_:
            high = set(self.high_)
            totals = row_sums(_only(chunk, np.array([name not in high for name in names])))
        else:
            totals = row_sums(chunk)
        factor = (totals / np.float32(self.target_sum or self.target_ or 1)).astype(np.float32)
        factor[factor == 0] = 1
        chunk.data = chunk.data / np.repeat(factor, np.diff(chunk.indptr))
        return chunk

    def fitted(self) -> dict[str, Any]:
        return {"target": self.target_, "high": self.high_}

    def restore(self, fitted: dict[str, Any]) -> None:
        self.target_, self.high_ = fitted.get("target"), fitted.get("high")


class Log(Step):
    """log(1 + x) to `base` (null: e). Without `add_one` log(x + 1e-6), clipped at 0: values up to 1 become 0.

    `chunked` and `chunk_size` are accepted and have no effect: rows always come in chunks.
    """

    base: float | None = Field(None, gt=1)
    chunked: bool | None = None
    chunk_size: int | None = None
    add_one: bool = True

    def values(self, chunk: sparse.csr_matrix, names: list[str]) -> sparse.csr_matrix:
        chunk.data = np.log1p(chunk.data if self.add_one else chunk.data - np.float32(0.999999))
        if self.base is not None:
            chunk.data /= np.float32(np.log(self.base))
        if not self.add_one:
            np.maximum(chunk.data, 0, out=chunk.data)
        return chunk


class ScaleCounts(Step):
    """Multiply every value by `scale_factor`."""

    scale_factor: float

    def values(self, chunk: sparse.csr_matrix, names: list[str]) -> sparse.csr_matrix:
        chunk.data = chunk.data * np.float32(self.scale_factor)
        return chunk


def added(one: np.ndarray | None, other: np.ndarray | None) -> np.ndarray | None:
    """The sum of two arrays, either of which may be missing; of boolean ones, where either is true."""
    return one if other is None else other if one is None else one + other


def row_sums(chunk: sparse.csr_matrix) -> np.ndarray:
    """float32 (cells,): total value of each cell."""
    sums = np.zeros(chunk.shape[0], dtype=np.float32)
    filled = np.flatnonzero(np.diff(chunk.indptr))
    if len(filled):
        sums[filled] = np.add.reduceat(chunk.data, chunk.indptr[filled])
    return sums


def _all_positive(chunk: sparse.csr_matrix) -> bool:
    return not chunk.nnz or bool(chunk.data.min() > 0)


def row_counts(chunk: sparse.csr_matrix) -> np.ndarray:
    """int64 (cells,): number of values above zero of each cell."""
    if _all_positive(chunk):
        return np.diff(chunk.indptr).astype(np.int64)
    positive = np.concatenate([[0], np.cumsum(chunk.data > 0)])
    return positive[chunk.indptr[1:]] - positive[chunk.indptr[:-1]]


def _only(chunk: sparse.csr_matrix, genes: np.ndarray) -> sparse.csr_matrix:
    """The chunk with the values of other genes set to zero."""
    return sparse.csr_matrix(
        (np.where(genes[chunk.indices], chunk.data, 0), chunk.indices, chunk.indptr), shape=chunk.shape
    )
