"""UMAP (McInnes, Healy and Melville 2018) of up to some ten thousand cells, exact in its neighbours and the same for the same seed.

Written out here because importing and compiling the umap-learn package takes half a minute of each process that draws one map, and these
kernels are compiled once for all. Constants are those of umap-learn: 15 neighbours, min_dist 0.1, 5 negative samples, learning rate 1.
"""

import numpy as np

from bmfm_pipeline.errors import DataError

NEIGHBOURS = 15
_BLOCK = 4096


def umap(points: np.ndarray, seed: int = 0, neighbours: int = NEIGHBOURS) -> np.ndarray:
    """(n, d) finite points -> (n, 2) float32. Raises DataError below 3 points or where a value is not finite."""
    from bmfm_pipeline.evaluation.umap_kernels import optimise

    points = np.ascontiguousarray(points, dtype=np.float32)
    if len(points) < 3 or not np.isfinite(points).all():
        raise DataError(f"a map needs at least 3 cells with finite embeddings; found {len(points)}")
    found, distances = nearest(points, points, min(neighbours, len(points) - 1) + 1)
    graph = fuzzy_graph(found, distances)
    layout = _start(points, seed)
    epochs = 500 if len(points) <= 10_000 else 200
    graph.data[graph.data < graph.data.max() / epochs] = 0
    graph.eliminate_zeros()
    edges = graph.tocoo()
    order = np.lexsort((edges.col, edges.row))
    optimise(
        layout, edges.row[order].astype(np.int32), edges.col[order].astype(np.int32),
        (edges.data.max() / edges.data[order]).astype(np.float64), epochs, np.uint64(seed & 0xFFFFFFFFFFFFFFFF),
    )  # fmt: skip
    return layout


def place_beside(
    points: np.ndarray, fitted: np.ndarray, layout: np.ndarray, neighbours: int = NEIGHBOURS
) -> np.ndarray:
    """(n, 2): where further points belong on the map of `fitted`: the mean of their nearest fitted points, near ones counting more."""
    placed = np.full((len(points), 2), np.nan, np.float32)
    for start in range(0, len(points), _BLOCK):
        rows = np.flatnonzero(np.isfinite(points[start : start + _BLOCK]).all(axis=1)) + start
        if not len(rows):
            continue
        found, distances = nearest(points[rows], fitted, min(neighbours, len(fitted)))
        weights = _memberships(distances)
        weights /= weights.sum(axis=1, keepdims=True)
        placed[rows] = (weights[:, :, None] * layout[found]).sum(axis=1)
    return placed


def nearest(points: np.ndarray, among: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(indices, distances), each (n, count): the nearest of `among` by Euclidean distance, nearest first."""
    from sklearn.neighbors import NearestNeighbors

    distances, found = NearestNeighbors(n_neighbors=count, algorithm="brute").fit(among).kneighbors(points)
    return found, distances


def _memberships(distances: np.ndarray) -> np.ndarray:
    """How much each neighbour belongs to a point, (n, k): exp(-(d - rho) / sigma), where sigma makes them sum to log2 k."""
    rho = np.where(distances > 0, distances, np.inf).min(axis=1)
    rho[~np.isfinite(rho)] = 0
    beyond = np.maximum(distances - rho[:, None], 0)
    target = np.log2(distances.shape[1])
    low, high, sigma = np.zeros(len(rho)), np.full(len(rho), np.inf), np.ones(len(rho))
    for _ in range(64):
        total = np.exp(-beyond / sigma[:, None]).sum(axis=1)
        high, low = np.where(total > target, sigma, high), np.where(total > target, low, sigma)
        sigma = np.where(np.isinf(high), 2 * low, (low + high) / 2)
    mean = distances.mean(axis=1)
    sigma = np.maximum(sigma, 1e-3 * np.where(rho > 0, mean, distances.mean()))
    return np.exp(-beyond / np.maximum(sigma, np.finfo(np.float64).tiny)[:, None])


def fuzzy_graph(found: np.ndarray, distances: np.ndarray):
    """Symmetric scipy CSR (n, n) of memberships: two points are joined if either is a neighbour of the other (p + q - p q).

    The first column of `found` and `distances` (n, k) is the point itself.
    """
    from scipy import sparse

    n, k = found.shape
    weights = _memberships(distances)
    rows = np.repeat(np.arange(n), k)
    graph = sparse.csr_matrix((weights.ravel(), (rows, found.ravel())), shape=(n, n))
    graph.setdiag(0)
    graph.eliminate_zeros()
    other = graph.T.tocsr()
    return (graph + other - graph.multiply(other)).tocsr()


def _start(points: np.ndarray, seed: int) -> np.ndarray:
    """The first two principal components, 10 across, with noise that parts equal points (Kobak and Linderman 2021)."""
    from sklearn.decomposition import PCA

    layout = np.zeros((len(points), 2))
    parts = min(2, points.shape[1])
    if (points != points[0]).any():
        layout[:, :parts] = PCA(parts, svd_solver="full").fit_transform(points.astype(np.float64))
    largest = np.abs(layout).max()
    layout = layout * (10 / largest) if largest > 0 else layout
    noise = np.random.default_rng(seed).normal(scale=1e-4, size=layout.shape)
    return np.ascontiguousarray(layout + noise, dtype=np.float32)
