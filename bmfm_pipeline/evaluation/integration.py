"""How well embeddings mix batches and keep cell types apart: the scores of scIB (Luecken et al. 2022), on scikit-learn's functions.

All lie in 0..1, higher is better. Names and definitions are those of scIB; clusters are found by k-means with as many clusters as there
are labels, as in scib-metrics.
"""

from typing import Any

import numpy as np

from bmfm_pipeline.evaluation.umap import NEIGHBOURS, fuzzy_graph, nearest

MOST_CELLS = 5000
LISI_NEIGHBOURS = 90
BIO = ("nmi", "ari", "silhouette_label", "clisi")
BATCH = ("silhouette_batch", "ilisi", "graph_connectivity")
DESCRIPTIONS = {
    "nmi": "normalised mutual information of k-means clusters and labels",
    "ari": "adjusted Rand index of k-means clusters and labels",
    "silhouette_label": "mean silhouette width by label, scaled to 0..1",
    "clisi": "neighbours of one label: local inverse Simpson index of labels, scaled",
    "silhouette_batch": "1 - |silhouette width by batch| within each label, averaged over labels",
    "ilisi": "neighbours of all batches: local inverse Simpson index of batches, scaled",
    "graph_connectivity": "share of a label's cells that its largest connected part of the neighbour graph holds",
    "bio_conservation": "mean of nmi, ari, silhouette_label, clisi",
    "batch_correction": "mean of silhouette_batch, ilisi, graph_connectivity",
    "total": "0.6 x bio_conservation + 0.4 x batch_correction",
}
Scores = dict[str, dict[str, Any]]


def integration_scores(
    embeddings: np.ndarray, labels: np.ndarray, batches: np.ndarray, seed: int = 0, most: int = MOST_CELLS
) -> tuple[Scores, list[str]]:
    """({score: {"value", "n"}}, notes) of (n, d) embeddings with the label and the batch of each cell (n,), as text.

    Cells without a label or a batch (None) or with an embedding that is not finite are left out, and of more than `most` a seeded sample
    is taken. A score that the cells cannot give has the value None, and the notes say why.
    """
    known = np.array([a is not None and b is not None for a, b in zip(labels, batches, strict=True)], dtype=bool)
    rows = np.flatnonzero(known & np.isfinite(embeddings).all(axis=1))
    notes = []
    if len(rows) < len(labels):
        notes.append(
            f"integration: {len(labels) - len(rows)} cells without a label, a batch or an embedding are left out"
        )
    if len(rows) > most:
        notes.append(f"integration: of {len(rows)} cells, a random {most} (seed {seed})")
        rows = np.sort(np.random.default_rng([seed & 0xFFFFFFFF, 0x1B]).choice(rows, most, replace=False))
    points = np.ascontiguousarray(embeddings[rows], dtype=np.float64)
    kinds, label = np.unique(labels[rows].astype(str), return_inverse=True)
    values, batch = np.unique(batches[rows].astype(str), return_inverse=True)
    names = [*BIO, *BATCH, "bio_conservation", "batch_correction", "total"]
    for what, found in (("label", kinds), ("batch", values)):
        if len(found) < 2:
            only = f"'{found[0]}'" if len(found) else "none"
            notes.append(f"integration: needs at least two values of each; the only {what} is {only}")
            return {name: {"value": None, "n": len(rows)} for name in names}, notes
    # The mixing of neighbours; each point is its own first one.
    found, distances = nearest(points, points, min(LISI_NEIGHBOURS + 1, len(points)))
    scores = {
        **_clusters(points, label, len(kinds), seed),
        "silhouette_label": _silhouette_label(points, label),
        "clisi": _scaled_lisi(found, distances, label, len(kinds), mixed=False),
        "silhouette_batch": _silhouette_batch(points, label, batch),
        "ilisi": _scaled_lisi(found, distances, batch, len(values), mixed=True),
        "graph_connectivity": _connectivity(found, distances, label, len(kinds)),
    }
    missing = [name for name, value in scores.items() if value is None]
    if missing:
        notes.append(f"integration: too few cells of one label in several batches for {', '.join(missing)}")
    for name, parts in (("bio_conservation", BIO), ("batch_correction", BATCH)):
        have = [scores[part] for part in parts if scores[part] is not None]
        scores[name] = float(np.mean(have)) if have else None
    scores["total"] = 0.6 * scores["bio_conservation"] + 0.4 * scores["batch_correction"]
    return {name: {"value": scores[name], "n": len(rows)} for name in names}, notes


def _clusters(points: np.ndarray, label: np.ndarray, kinds: int, seed: int) -> dict[str, float]:
    from sklearn.cluster import KMeans
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    clusters = KMeans(min(kinds, len(points)), n_init=5, random_state=seed & 0xFFFFFFFF).fit_predict(points)
    return {
        "nmi": float(normalized_mutual_info_score(label, clusters)),
        "ari": float(adjusted_rand_score(label, clusters)),
    }


def _silhouette_label(points: np.ndarray, label: np.ndarray) -> float | None:
    from sklearn.metrics import silhouette_score

    if len(np.unique(label)) >= len(label):
        return None
    return (float(silhouette_score(points, label)) + 1) / 2


def _silhouette_batch(points: np.ndarray, label: np.ndarray, batch: np.ndarray) -> float | None:
    from sklearn.metrics import silhouette_samples

    found = []
    for kind in np.unique(label):
        here = label == kind
        if 2 <= len(np.unique(batch[here])) < here.sum():
            found.append((1 - np.abs(silhouette_samples(points[here], batch[here]))).mean())
    return float(np.mean(found)) if found else None


def _connectivity(found: np.ndarray, distances: np.ndarray, label: np.ndarray, kinds: int) -> float:
    from scipy.sparse.csgraph import connected_components

    graph = fuzzy_graph(found[:, : NEIGHBOURS + 1], distances[:, : NEIGHBOURS + 1])
    shares = []
    for kind in range(kinds):
        here = np.flatnonzero(label == kind)
        _, parts = connected_components(graph[here][:, here], directed=False)
        shares.append(np.bincount(parts).max() / len(here))
    return float(np.mean(shares))


def _scaled_lisi(found: np.ndarray, distances: np.ndarray, values: np.ndarray, kinds: int, mixed: bool) -> float:
    """Median local inverse Simpson index (Korsunsky et al. 2019), from 1 (one value) to `kinds` (all alike), as a share of 1.

    `mixed`: 1 where all values are mixed; else 1 where neighbours have one value.
    """
    weights = perplexity_weights(distances[:, 1:])
    of_neighbours = values[found[:, 1:]]
    simpson = sum(np.where(of_neighbours == value, weights, 0).sum(axis=1) ** 2 for value in range(kinds))
    lisi = float(np.median(1 / simpson))
    return min(max((lisi - 1) / (kinds - 1) if mixed else (kinds - lisi) / (kinds - 1), 0.0), 1.0)


def perplexity_weights(distances: np.ndarray) -> np.ndarray:
    """(n, k) weights exp(-beta d), summing to 1, where beta gives each point a perplexity of a third of its neighbours."""
    target = np.log(max(distances.shape[1] / 3, 1.0))
    nearer = distances - distances[:, :1]
    beta, low, high = np.ones(len(distances)), np.zeros(len(distances)), np.full(len(distances), np.inf)
    for _ in range(60):
        weights = np.exp(-nearer * beta[:, None])
        total = weights.sum(axis=1)
        entropy = np.log(total) + beta * (nearer * weights).sum(axis=1) / total
        flat = entropy > target
        low, high = np.where(flat, beta, low), np.where(flat, high, beta)
        beta = np.where(np.isinf(high), 2 * beta, (low + high) / 2)
    return weights / weights.sum(axis=1, keepdims=True)
