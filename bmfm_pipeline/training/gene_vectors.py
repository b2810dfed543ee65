"""What a model is told of the genes before training: vectors of those that go together, and how large the values of each are."""

import numpy as np
import torch

from bmfm_pipeline.errors import ConfigError
from bmfm_pipeline.models.expressed import GeneScores
from bmfm_pipeline.training.data_module import CellDataModule

# Cells that the vectors are computed from; more change them little, and all of them have to fit into memory.
MOST_CELLS = 20_000


def square_root_shares(counts):
    """CSR float32: the square root of each gene's share of its cell's reads, so that every row has length 1."""
    from scipy import sparse

    matrix = sparse.csr_matrix(counts, dtype=np.float32, copy=True)
    totals = np.asarray(matrix.sum(axis=1, dtype=np.float64)).ravel()
    scale = np.divide(1.0, totals, out=np.zeros_like(totals), where=totals > 0)
    matrix.data = np.sqrt(matrix.data * np.repeat(scale, np.diff(matrix.indptr))).astype(np.float32)
    return matrix


def singular_vectors(matrix, width: int, seed: int) -> np.ndarray:
    """(genes, width) float32: the first right singular vectors of (cells, genes), the first the strongest.

    Where there are fewer than `width` of them, the last columns are zero.
    """
    from scipy.sparse.linalg import svds
    from threadpoolctl import threadpool_limits

    rank = min(width, min(matrix.shape) - 1)
    found = np.zeros((matrix.shape[1], width), np.float32)
    if rank < 1:
        return found
    start = np.random.default_rng(seed).standard_normal(min(matrix.shape)).astype(np.float32)
    with threadpool_limits(1):  # the same digits on any number of cores
        _, strengths, vectors = svds(matrix, k=rank, v0=start)
    order = np.argsort(-strengths)
    vectors = vectors[order]
    # The sign of a singular vector is free: the largest entry is made positive.
    signs = np.sign(vectors[np.arange(rank), np.abs(vectors).argmax(axis=1)])
    found[:, :rank] = (vectors * signs[:, None]).T
    return found


def start_from_singular_vectors(model: torch.nn.Module, data: CellDataModule, seed: int) -> str:
    """Write the vectors of genes that training cells express into the embedding of genes; returns a sentence about it.

    `data` is set up. The vectors are scaled to the mean square that random first weights have; special tokens and genes without an expressing cell keep theirs.
    Raises ConfigError when the model has no plain embedding of genes.
    """
    embedding = getattr(model.backbone.embeddings, "genes_embeddings", None)
    if type(embedding) is not torch.nn.Embedding:
        raise ConfigError(
            "model.gene_vectors: svd needs an embedding of the field genes that starts at random; set it to random where the field has a "
            "pretrained_embedding"
        )
    prepared, rows = data.prepared, data.rows["train"]
    if len(rows) > MOST_CELLS:
        rows = np.sort(np.random.default_rng([seed, 0x5BD]).choice(rows, MOST_CELLS, replace=False))
    store = prepared.store if prepared.store.counts is None else prepared.store.counts
    matrix = square_root_shares(store.rows(rows))
    tokens = prepared.vocabularies["genes"].ids(prepared.store.var_names)
    expressed = (np.diff(matrix.tocsc().indptr) > 0) & (tokens > 0)
    columns = np.flatnonzero(expressed)
    vectors = singular_vectors(matrix[:, columns], embedding.embedding_dim, seed)
    size = float(np.sqrt(np.mean(np.square(vectors, dtype=np.float64)))) or 1.0
    wanted = getattr(model.config, "initializer_range", None) or 0.02
    with torch.no_grad():
        embedding.weight[torch.from_numpy(tokens[columns].astype(np.int64))] = torch.from_numpy(
            vectors * (wanted / size)
        )
    return f"gene vectors: {len(columns)} genes start from the first {embedding.embedding_dim} singular vectors of {len(rows)} training cells"


def measure_linear_paths(model: torch.nn.Module, data: CellDataModule) -> int:
    """Give every linear path that has learned nothing yet the sizes of gene values among training cells; returns how many there were.

    `data` is set up; its batches say what the model sees.
    """
    fresh = [module for module in model.modules() if isinstance(module, GeneScores) and module.is_fresh]
    rows = data.rows["train"]
    if len(rows) > MOST_CELLS:
        rows = rows[np.linspace(0, len(rows) - 1, MOST_CELLS).astype(np.int64)]
    if fresh:
        builder = data.uncounted(data.run.data_module.max_length)
        blocks = (rows[start : start + 100] for start in range(0, len(rows), 100))
        fresh[0].measure(builder.build(block, training=False)["input_ids"] for block in blocks)
        for other in fresh[1:]:  # they read the same genes and values
            other.sizes.copy_(fresh[0].sizes)
    return len(fresh)
