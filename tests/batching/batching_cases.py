"""An in-memory store, random cells, and builders for the tests of batching."""

import numpy as np
from hypothesis import strategies as st

from bmfm_pipeline.batching import BatchBuilder, BatchingConfig, FieldSpec

N_GENES = 40
UNK, SEP, PAD, CLS, MASK = range(5)


class MemoryStore:
    """CSR arrays and names, as a CellStore offers them."""

    def __init__(self, dense_rows, dtype=np.int16, n_genes=N_GENES):
        rows = [dict(row) for row in dense_rows]
        self.indptr = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
        self.indices = np.array([gene for row in rows for gene in sorted(row)], dtype=np.int32)
        self.data = np.array([row[gene] for row in rows for gene in sorted(row)], dtype=dtype)
        self.obs_names = np.array([f"cell-{number}" for number in range(len(rows))], dtype=object)
        self.var_names = [f"GENE{number}" for number in range(n_genes)]
        self.shape = (len(rows), n_genes)

    def cell(self, row: int) -> list[tuple[int, float]]:
        """(gene column, value) of the stored entries of a row."""
        where = slice(self.indptr[row], self.indptr[row + 1])
        return list(zip(self.indices[where].tolist(), self.data[where].tolist(), strict=True))


def column_ids(unknown=()) -> np.ndarray:
    ids = np.arange(5, N_GENES + 5, dtype=np.int32)
    ids[list(unknown)] = 0
    return ids


def make_builder(
    store, unknown=(), masked=("expressions",), tokenized=True, top=10, labels=None, weights=None, **settings
):
    """Genes and expressions; whole values below `top` have a token."""
    fields = [
        FieldSpec(
            "genes", "genes", is_masked="genes" in masked, vocab_size=N_GENES + 5, column_ids=column_ids(unknown)
        ),
        FieldSpec(
            "expressions",
            "values",
            tokenized=tokenized,
            is_masked="expressions" in masked,
            vocab_size=top + 5,
            value_ids=np.arange(5, top + 5, dtype=np.int32) if tokenized else None,
        ),
    ]
    settings = {"max_length": 32, **settings}
    return BatchBuilder(store, fields, BatchingConfig(**settings), labels=labels, mask_weights=weights)


def many_cells(n=64, genes_per_cell=20, seed=0, low=1, high=10, dtype=np.int16) -> MemoryStore:
    generator = np.random.default_rng(seed)
    return MemoryStore(
        [
            {
                int(gene): int(generator.integers(low, high))
                for gene in generator.choice(N_GENES, genes_per_cell, replace=False)
            }
            for _ in range(n)
        ],
        dtype=dtype,
    )


cells = st.lists(
    st.dictionaries(st.integers(0, N_GENES - 1), st.integers(0, 14), max_size=N_GENES), min_size=1, max_size=6
)
settings = st.fixed_dictionaries(
    {
        "sequence_order": st.sampled_from([None, "random", "sorted"]),
        "max_length": st.sampled_from([8, 16, 32, 64]),
        "pad_to_multiple_of": st.sampled_from([None, 4, 8]),
        "padding": st.sampled_from(["max_length", "longest", True, False]),
        "truncation": st.booleans(),
        "max_mfi_data_len": st.sampled_from([None, 1, 5, 100]),
        "seed": st.sampled_from([0, 1, 2**63 + 11, -3]),
        "limit_genes": st.sampled_from(["tokenizer", None]),
    }
)
ratios = st.sampled_from(
    [(0.15, 1.0, 0.0), (0.5, 0.5, 0.5), (1.0, 0.8, 0.1), (0.3, 0.0, 1.0), (0.0, 1.0, 0.0), (0.9, 0.1, 0.2)]
)
