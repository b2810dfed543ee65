"""Cells and batches for benchmarks/train_step.py: synthetic, or from a processed file through h5py alone."""

from dataclasses import dataclass

import numpy as np


@dataclass
class StoredCells:
    """CSR of cells by genes in memory, with names, as a BatchBuilder reads it."""

    indptr: np.ndarray
    indices: np.ndarray
    data: np.ndarray
    shape: tuple[int, int]

    @property
    def obs_names(self) -> np.ndarray:
        return np.array([f"cell-{number}" for number in range(self.shape[0])], dtype=object)

    @classmethod
    def of_file(cls, path: str) -> "StoredCells":
        """The matrix X of a processed h5ad."""
        import h5py

        with h5py.File(path) as file:
            matrix = file["X"]
            if not isinstance(matrix, h5py.Group) or matrix.attrs.get("encoding-type") != "csr_matrix":
                raise SystemExit(f"{path}: X is not a CSR matrix; give a file that `bmfm preprocess` made")
            shape = tuple(int(size) for size in matrix.attrs["shape"])
            data = matrix["data"][:]
            if np.any(data != np.floor(data)) or data.min(initial=0) < 0:
                raise SystemExit(f"{path}: X holds other values than whole numbers; give a file with counts or bins")
            return cls(matrix["indptr"][:].astype(np.int64), matrix["indices"][:].astype(np.int32), data, shape)

    @classmethod
    def synthetic(cls, arguments) -> "StoredCells":
        """Cells with about `genes_per_cell` expressed genes (normal, sd a quarter) of the vocabulary, in bins 1..9."""
        generator = np.random.default_rng(0)
        n_genes, mean = arguments.vocabulary - 5, arguments.genes_per_cell
        sizes = np.clip(generator.normal(mean, mean / 4, arguments.cells), 1, n_genes).astype(np.int64)
        indptr = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        drawn = (generator.choice(n_genes, size, replace=False, shuffle=False) for size in sizes)
        genes = np.concatenate([np.sort(columns) for columns in drawn])
        data = generator.integers(1, 10, indptr[-1]).astype(np.int8)
        return cls(indptr, genes.astype(np.int32), data, (arguments.cells, n_genes))


def make_loader_of(cells: StoredCells, arguments):
    """(loader of training batches without end, the model's fields)."""
    from bmfm_pipeline.batching import (
        BatchBuilder,
        BatchingConfig,
        CellDataset,
        EpochBatchSampler,
        FieldSpec,
        make_loader,
    )

    vocabulary, bins = max(arguments.vocabulary, cells.shape[1] + 5), int(np.max(cells.data, initial=0)) + 1
    genes = FieldSpec(
        "genes",
        "genes",
        is_masked=arguments.mask_genes,
        vocab_size=vocabulary,
        column_ids=np.arange(5, cells.shape[1] + 5, dtype=np.int32),
    )
    values = FieldSpec(
        "expressions", "values", is_masked=True, vocab_size=bins + 5, value_ids=np.arange(5, bins + 5, dtype=np.int32)
    )
    config = BatchingConfig(
        collation_strategy="language_modeling",
        max_length=arguments.max_length,
        padding="longest",
        sequence_order="random",
        mask_ratio=1.0,
    )
    n_cells = cells.shape[0]
    dataset = CellDataset(BatchBuilder(cells, [genes, values], config), np.arange(n_cells))
    fields = [
        {
            "field_name": spec.name,
            "vocab_size": spec.vocab_size,
            "num_special_tokens": 5,
            "is_masked": spec.is_masked,
            **({"decode_modes": {"token_scores": {}}} if spec.is_masked else {}),
        }
        for spec in (genes, values)
    ]
    sampler = EpochBatchSampler(n_cells, min(arguments.batch, n_cells), shuffle=True, seed=1, drop_last=True)
    return Endless(make_loader(dataset, sampler, arguments.loader_threads)), fields


class Endless:
    """One epoch of a loader after the other, each in its own order; every iteration starts with the first."""

    def __init__(self, loader):
        self.loader = loader

    def __iter__(self):
        epoch = 0
        while True:
            self.loader.batch_sampler.set_epoch(epoch)
            yield from self.loader
            epoch += 1
