"""Steps about particular genes: a tokenizer's genes, medians per gene, genes set to an extreme or moved to the labels."""

from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator
from scipy import sparse

from bmfm_pipeline.data.transforms.steps import KeepGenes, Step
from bmfm_pipeline.errors import DataError


class KeepVocabGenes(Step):
    """Keep the genes that the tokenizer folder `vocab_identifier` knows, in the order of the data."""

    vocab_identifier: str
    genes_: list[str] | None = Field(None, exclude=True)

    def _known(self) -> set[str]:
        if self.genes_ is None:
            from bmfm_pipeline.vocabulary import MultiFieldVocabulary

            fields = MultiFieldVocabulary.load(self.vocab_identifier)
            if "genes" not in fields:
                raise DataError(
                    f"KeepVocabGenesTransform: {self.vocab_identifier} has no tokenizer of genes (it has {', '.join(fields)})"
                )
            self.genes_ = fields["genes"].tokens[fields["genes"].n_special :]
        return set(self.genes_)

    def genes(self, names: list[str]) -> tuple[list[str], np.ndarray | None]:
        known = self._known()
        keep = np.array([index for index, name in enumerate(names) if name in known], dtype=np.int64)
        if not len(keep):
            raise DataError(
                f"KeepVocabGenesTransform: {self.vocab_identifier} knows none of the {len(names)} genes, e.g. {', '.join(names[:5])}; "
                "rename them to the tokenizer's gene symbols first (RenameGenesTransform with gene_map)"
            )
        return [names[index] for index in keep], keep

    def fitted(self) -> dict[str, Any]:
        return {"genes": self.genes_}

    def restore(self, fitted: dict[str, Any]) -> None:
        self.genes_ = fitted.get("genes")


class MedianNormalize(Step):
    """Divide each gene's values by its median: `median_dict`, or a JSON file {gene: median}."""

    median_dict: dict[str, float] | None = None
    path_to_median_data: str | None = None

    @model_validator(mode="after")
    def _one_table(self) -> "MedianNormalize":
        if (self.median_dict is None) == (self.path_to_median_data is None):
            raise ValueError("give exactly one of median_dict and path_to_median_data")
        if self.path_to_median_data is not None:
            path = Path(self.path_to_median_data)
            if path.suffix != ".json":
                raise ValueError(
                    f"path_to_median_data must be a JSON file of {{gene: median}}, found {path.name}; pickles are not opened"
                )
            from bmfm_pipeline.storage import read_json

            if not path.exists():
                raise ValueError(f"path_to_median_data: {path} does not exist")
            self.median_dict, self.path_to_median_data = read_json(path), None
        if wrong := [gene for gene, median in self.median_dict.items() if not median > 0]:
            raise ValueError(f"medians must be above 0; {wrong[0]} has {self.median_dict[wrong[0]]}")
        return self

    def values(self, chunk: sparse.csr_matrix, names: list[str]) -> sparse.csr_matrix:
        if missing := [name for name in names if name not in self.median_dict]:
            raise DataError(
                f"MedianNormalizeTransform: no median for {len(missing)} of {len(names)} genes, e.g. {', '.join(missing[:5])}; "
                "add them, or keep only genes that have one with KeepGenesTransform"
            )
        medians = np.array([self.median_dict[name] for name in names])
        chunk.data = (chunk.data / medians[chunk.indices]).astype(np.float32)
        return chunk


class ChangeExpressionLevel(Step):
    """Set a gene in all cells to the largest ("positive") or smallest ("negative") value it has in the cells to fit on."""

    needs_pass: ClassVar[bool] = True
    gene_perturbations: dict[str, Literal["positive", "negative"]]
    levels_: dict[str, float] | None = Field(None, exclude=True)

    def observe(self, chunk: sparse.csr_matrix, names: list[str]) -> None:
        for gene, column in _columns(self.gene_perturbations, names, "ChangeExpressionLevelTransform").items():
            values = chunk[:, [column]].toarray().ravel()
            if len(values):
                self.add({gene: float(self._best(gene)(values))})

    def _best(self, gene: str):
        return max if self.gene_perturbations[gene] == "positive" else min

    def seen(self) -> dict[str, float]:
        levels, self.levels_ = self.levels_ or {}, None
        return levels

    def add(self, seen: dict[str, float]) -> None:
        levels = self.levels_ or {}
        self.levels_ = levels | {gene: self._best(gene)(level, levels.get(gene, level)) for gene, level in seen.items()}

    def values(self, chunk: sparse.csr_matrix, names: list[str]) -> sparse.csr_matrix:
        columns = _columns(self.gene_perturbations, names, "ChangeExpressionLevelTransform")
        levels = np.zeros(len(names), dtype=np.float32)
        levels[list(columns.values())] = [(self.levels_ or {}).get(gene, 0) for gene in columns]
        others = np.ones(len(names), dtype=bool)
        others[list(columns.values())] = False
        rest = sparse.csr_matrix((chunk.data * others[chunk.indices], chunk.indices, chunk.indptr), shape=chunk.shape)
        set_to = sparse.csr_matrix(np.broadcast_to(levels, (1, len(names))))
        changed = (rest + sparse.vstack([set_to] * chunk.shape[0], format="csr")).tocsr() if chunk.shape[0] else rest
        changed.eliminate_zeros()
        changed.sort_indices()
        return changed

    def fitted(self) -> dict[str, Any]:
        return {"levels": self.levels_}

    def restore(self, fitted: dict[str, Any]) -> None:
        self.levels_ = fitted.get("levels")


class MoveExpressionsToLabels(Step):
    """Move the values of these genes into obs columns of their names; they are no genes any more."""

    regression_label_columns: list[str] = Field(min_length=1)

    def obs_columns(self, chunk: sparse.csr_matrix, names: list[str]) -> dict[str, np.ndarray]:
        found = _columns(self.regression_label_columns, names, "MoveExpressionsToLabels")
        return {gene: chunk[:, [column]].toarray().ravel() for gene, column in found.items()}

    def genes(self, names: list[str]) -> tuple[list[str], np.ndarray | None]:
        moved = set(self.regression_label_columns)
        keep = np.array([index for index, name in enumerate(names) if name not in moved], dtype=np.int64)
        return [names[index] for index in keep], None if len(keep) == len(names) else keep


class KeepExplanatoryAndTargetGenes(Step):
    """Keep the genes listed in the file `explanatory_gene_set` (one a line, or a list) and those that are regression labels."""

    explanatory_gene_set: list[str] | str
    regression_label_columns: list[str]

    def genes(self, names: list[str]) -> tuple[list[str], np.ndarray | None]:
        listed, _ = KeepGenes(genes_to_keep=self.explanatory_gene_set).genes(names)
        wanted = {*listed, *_columns(self.regression_label_columns, names, "KeepExplanatoryAndTargetGenesTransform")}
        return KeepGenes(genes_to_keep=[name for name in names if name in wanted]).genes(names)


def _columns(wanted, names: list[str], step: str) -> dict[str, int]:
    """{gene: column} of the wanted genes; DataError names those the data does not have."""
    position = {name: index for index, name in enumerate(names)}
    if missing := [gene for gene in wanted if gene not in position]:
        raise DataError(
            f"{step}: the data has no gene {', '.join(missing[:5])}; it has {len(names)} genes, e.g. {', '.join(names[:5])}"
        )
    return {gene: position[gene] for gene in wanted}
