"""Highly variable genes from a stream of cells: sums per gene (and batch) are kept, never the cells.

The flavors are those of scanpy's `highly_variable_genes`, and so are the genes they choose: seurat (Satija 2015), cell_ranger
(Zheng 2017), seurat_v3 (Stuart 2019). Accumulators are float64.
"""

import importlib.util
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator
from scipy import sparse

from bmfm_pipeline.data.transforms.steps import Step
from bmfm_pipeline.errors import ConfigError, DataError

_NAME = "HighlyVariableGenesTransform"
# Sums are kept for every batch and gene: more batches than this are a mistaken column.
_MOST_BATCHES = 1000
# The median absolute deviation of a normal distribution of standard deviation 1.
_NORMAL_MAD = 0.6744897501960817


class GeneMoments:
    """Mean, variance (ddof 1) and number of expressing cells of each gene, over chunks seen one after the other, in float64."""

    def __init__(self, n_genes: int):
        self.n = 0
        self.sums, self.squares = np.zeros(n_genes), np.zeros(n_genes)
        self.expressed = np.zeros(n_genes, dtype=np.int64)

    def add(self, data: np.ndarray, indices: np.ndarray, n_cells: int) -> None:
        """Add `n_cells` cells whose stored values `data` belong to the genes `indices`."""
        from bmfm_pipeline.data.kernels import add_moments

        add_moments(indices, data, self.sums, self.squares, self.expressed)
        self.n += n_cells

    def take(self, other: "GeneMoments") -> None:
        """Add the cells that `other` saw."""
        self.n += other.n
        self.sums += other.sums
        self.squares += other.squares
        self.expressed += other.expressed

    @property
    def mean(self) -> np.ndarray:
        return self.sums / self.n

    @property
    def variance(self) -> np.ndarray:
        spread = self.squares / self.n - self.mean**2
        return spread * (self.n / (self.n - 1)) if self.n > 1 else spread


class HighlyVariableGenes(Step):
    """Keep the genes that scanpy's flavors find highly variable among the cells to fit on.

    seurat and cell_ranger want logarithms (`log_base` is that of the log step before this one), seurat_v3 raw counts, two passes and
    the package scikit-misc. With `batch_key`, a column of obs, genes are chosen in every batch and joined as scanpy does.
    """

    needs_pass: ClassVar[bool] = True
    n_top_genes: int | None = Field(None, gt=0)
    min_disp: float = 0.5
    max_disp: float | None = None
    min_mean: float = 0.0125
    max_mean: float = 3
    span: float = Field(0.3, gt=0, le=1)
    n_bins: int = Field(20, gt=0)
    flavor: Literal["seurat", "cell_ranger", "seurat_v3", "seurat_v3_paper"] = "seurat"
    subset: bool = True
    batch_key: str | None = None
    log_base: float | None = None
    kept_: list[str] | None = Field(None, exclude=True)
    batches_: Any = Field(None, exclude=True)
    moments_: Any = Field(None, exclude=True)
    clipped_: Any = Field(None, exclude=True)

    @field_validator("subset")
    @classmethod
    def _must_subset(cls, value: bool) -> bool:
        if not value:
            raise ValueError(
                "subset=false would mark genes and change nothing; remove the step, or leave subset at true"
            )
        return value

    @property
    def needs_counts(self) -> bool:
        """Whether the flavor is defined on raw counts."""
        return self.flavor.startswith("seurat_v3")

    def look_at(self, source) -> None:
        if self.kept_ is not None:
            return
        if self.needs_counts and importlib.util.find_spec("skmisc") is None:
            raise ConfigError(
                f"{_NAME}: flavor {self.flavor} needs the package scikit-misc (its loess), which is not installed; run "
                "`pip install scikit-misc`, or choose flavor seurat or cell_ranger"
            )
        if self.batch_key is None:
            return
        if self.batch_key not in source.obs:
            columns = ", ".join(map(str, source.obs.columns)) or "none"
            raise DataError(f"{_NAME}: batch_key: obs has no column '{self.batch_key}' (columns: {columns})")
        column = source.obs[self.batch_key]
        if missing := int(column.isna().sum()):
            raise DataError(f"{_NAME}: batch_key: obs['{self.batch_key}'] is missing for {missing} cells")
        names, codes = np.unique(column.astype(str), return_inverse=True)
        if len(names) > _MOST_BATCHES:
            raise DataError(
                f"{_NAME}: batch_key: obs['{self.batch_key}'] has {len(names)} different values, more than {_MOST_BATCHES}; "
                "name the column of batches"
            )
        self.batches_ = codes

    def observe_rows(self, chunk: sparse.csr_matrix, names: list[str], numbers: np.ndarray) -> None:
        if self.needs_counts and ((chunk.data != np.rint(chunk.data)).any() or (chunk.data < 0).any()):
            raise DataError(f"{_NAME}: flavor {self.flavor} needs raw counts; put it before steps that change values")
        self.moments_ = self.moments_ or {}
        codes = np.zeros(chunk.shape[0], dtype=np.int64) if self.batches_ is None else self.batches_[numbers]
        for code in np.unique(codes):
            part = chunk if self.batches_ is None else chunk[codes == code]
            if self.clipped_ is not None:
                self.clipped_[code].add(part)
                continue
            moments = self.moments_.setdefault(code, GeneMoments(len(names)))
            moments.add(self._linear(part.data), part.indices, part.shape[0])

    def seen(self) -> dict[int, Any]:
        if self.clipped_ is not None:
            return {code: clipped.taken() for code, clipped in self.clipped_.items() if clipped.sums.any()}
        moments, self.moments_ = self.moments_ or {}, None
        return moments

    def add(self, seen: dict[int, Any]) -> None:
        for code, found in seen.items():
            if self.clipped_ is not None:
                self.clipped_[code].sums += found[0]
                self.clipped_[code].squares += found[1]
                continue
            self.moments_ = self.moments_ or {}
            self.moments_.setdefault(code, GeneMoments(len(found.sums))).take(found)

    def _linear(self, data: np.ndarray) -> np.ndarray:
        """Values on the scale whose variance the flavor looks at; seurat undoes the logarithm, in float32 as scanpy does."""
        if self.flavor != "seurat":
            return data
        if self.log_base is not None:
            data = (data * np.log(self.log_base)).astype(np.float32)
        return np.expm1(data)

    def finish(self, names: list[str]) -> bool:
        if not self.moments_:
            raise DataError(f"{_NAME}: no training cell is left to choose genes from; loosen the filters before it")
        batches = [self.moments_[code] for code in sorted(self.moments_)]
        if not self.needs_counts:
            marked = self._by_dispersion(batches, names)
        elif self.clipped_ is None:
            self.clipped_ = {code: _Clipped(moments, self.span) for code, moments in self.moments_.items()}
            return True
        else:
            marked = self._by_clipped_variance([self.clipped_[code] for code in sorted(self.clipped_)], names)
        self.kept_ = [name for name, stays in zip(names, marked, strict=True) if stays]
        self.moments_ = self.clipped_ = self.batches_ = None
        if not self.kept_:
            raise DataError(f"{_NAME}: none of the {len(names)} genes is highly variable by these bounds; loosen them")
        return False

    def _by_dispersion(self, batches: list[GeneMoments], names: list[str]) -> np.ndarray:
        import pandas as pd

        if self.batch_key is None:
            table = self._dispersions(batches[0], names, np.ones(len(names), dtype=bool))
            return table["highly_variable"].to_numpy()
        tables = [self._dispersions(moments, names, moments.expressed > 0) for moments in batches]
        joined = pd.concat(tables)
        joined["highly_variable"] = joined["highly_variable"].astype(int)
        how = {"means": "mean", "dispersions": "mean", "dispersions_norm": "mean", "highly_variable": "sum"}
        joined = joined.groupby(joined.index, observed=True).agg(how)
        if self.n_top_genes is None:
            return self._in_bounds(joined["means"], joined["dispersions_norm"].fillna(0)).loc[names].to_numpy()
        ordered = joined.sort_values(["highly_variable", "dispersions_norm"], ascending=False, na_position="last")
        first = pd.Series(np.arange(len(ordered)) < self.n_top_genes, index=ordered.index)
        return first.loc[names].to_numpy()

    def _dispersions(self, moments: GeneMoments, names: list[str], seen: np.ndarray):
        """Table of the genes of one batch: mean, dispersion, dispersion against genes of like mean, and the verdict."""
        import pandas as pd

        mean, variance = moments.mean[seen], moments.variance[seen]
        mean[mean == 0] = 1e-12
        dispersion = variance / mean
        if self.flavor == "seurat":
            dispersion[dispersion == 0] = np.nan
            dispersion, mean = np.log(dispersion), np.log1p(mean)
            bins: Any = self.n_bins
        else:
            bins = np.r_[-np.inf, np.percentile(mean, np.arange(10, 105, 5)), np.inf]
            if len(np.unique(bins)) < len(bins):
                raise DataError(
                    f"{_NAME}: flavor cell_ranger bins genes by percentiles of their mean, which coincide among {moments.n} cells"
                    f"{' of one batch' if self.batch_key else ''}; use flavor seurat, or {'larger batches' if self.batch_key else 'more cells'}"
                )
        table = pd.DataFrame({"means": mean, "dispersions": dispersion}, index=np.array(names, dtype=object)[seen])
        bin_of = pd.cut(table["means"], bins=bins)
        groups = table.groupby(bin_of, observed=True)["dispersions"]
        if self.flavor == "seurat":
            centre, spread = groups.transform("mean"), groups.transform("std")
            alone = spread.isna()  # a gene alone in its bin gets 1
            centre, spread = centre.mask(alone, 0), spread.mask(alone, centre)
        else:
            centre = groups.transform("median")
            distances = (table["dispersions"] - centre).abs()
            spread = distances.groupby(bin_of, observed=True).transform("median") / _NORMAL_MAD
        with np.errstate(divide="ignore", invalid="ignore"):
            table["dispersions_norm"] = (table["dispersions"] - centre) / spread
        table["highly_variable"] = self._verdict(table)
        if seen.all():
            return table
        unseen = pd.DataFrame(0.0, index=np.array(names, dtype=object)[~seen], columns=table.columns)
        return pd.concat([table, unseen.astype({"highly_variable": bool})]).loc[names]

    def _verdict(self, table):
        score = table["dispersions_norm"]
        if self.n_top_genes is None:
            return self._in_bounds(table["means"], np.nan_to_num(score))
        known = np.sort(score.dropna().to_numpy())[::-1]
        if not len(known):
            return np.zeros(len(score), dtype=bool)
        return np.nan_to_num(score, nan=-np.inf) >= known[min(self.n_top_genes, len(known)) - 1]

    def _in_bounds(self, mean, score):
        highest = np.inf if self.max_disp is None else self.max_disp
        return (mean > self.min_mean) & (mean < self.max_mean) & (score > self.min_disp) & (score < highest)

    def _by_clipped_variance(self, batches: list["_Clipped"], names: list[str]) -> np.ndarray:
        import pandas as pd

        wanted = self.n_top_genes or 2000
        scores = np.stack([batch.variance for batch in batches])
        ranks = np.argsort(np.argsort(-scores, axis=1), axis=1).astype(np.float32)
        times = (ranks < wanted).sum(axis=0)
        ranks[ranks >= wanted] = np.nan
        middle = np.ma.median(np.ma.masked_invalid(ranks), axis=0).filled(np.nan)
        table = pd.DataFrame({"rank": middle, "times": times})
        order = ["rank", "times"] if self.flavor == "seurat_v3" else ["times", "rank"]
        table = table.sort_values(order, ascending=[name == "rank" for name in order], na_position="last")
        marked = np.zeros(len(names), dtype=bool)
        marked[table.index[:wanted]] = True
        return marked

    def genes(self, names: list[str]) -> tuple[list[str], np.ndarray | None]:
        if self.kept_ is None:
            return names, None
        kept = set(self.kept_)
        keep = np.array([index for index, name in enumerate(names) if name in kept], dtype=np.int64)
        return [names[index] for index in keep], keep

    def fitted(self) -> dict[str, Any]:
        return {"kept": self.kept_}

    def restore(self, fitted: dict[str, Any]) -> None:
        self.kept_ = fitted.get("kept")


class _Clipped:
    """Sums of the counts of one batch, each clipped at what the trend of variance over mean makes of sqrt(cells) deviations."""

    def __init__(self, moments: GeneMoments, span: float):
        from skmisc.loess import loess

        self.n, self.mean = moments.n, moments.mean
        varies = moments.variance > 0
        trend = np.zeros(len(self.mean))
        try:
            model = loess(np.log10(self.mean[varies]), np.log10(moments.variance[varies]), span=span, degree=2)
            model.fit()
        except ValueError as error:
            why = error.args[0].decode() if error.args and isinstance(error.args[0], bytes) else str(error)
            raise DataError(
                f"{_NAME}: the trend of variance over mean could not be fitted to {varies.sum()} genes in {self.n} cells ({why}); "
                "raise span, use larger batches, or choose flavor seurat"
            ) from None
        trend[varies] = model.outputs.fitted_values
        self.deviation = np.sqrt(10**trend)
        self.highest = self.deviation * np.sqrt(self.n) + self.mean
        self.sums, self.squares = np.zeros(len(self.mean)), np.zeros(len(self.mean))

    def add(self, chunk: sparse.csr_matrix) -> None:
        from bmfm_pipeline.data.kernels import add_clipped_moments

        add_clipped_moments(chunk.indices, chunk.data, self.highest, self.sums, self.squares)

    def taken(self) -> tuple[np.ndarray, np.ndarray]:
        """Sums and squares of what was added; they begin anew."""
        found = self.sums, self.squares
        self.sums, self.squares = np.zeros_like(found[0]), np.zeros_like(found[1])
        return found

    @property
    def variance(self) -> np.ndarray:
        """Variance of the clipped, standardised counts of each gene."""
        around = self.n * self.mean**2 + self.squares - 2 * self.sums * self.mean
        return around / ((self.n - 1) * self.deviation**2)
