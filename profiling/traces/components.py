"""Principal components of ranks, and clusters of them, from numpy alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from meshwright.profiling.traces.step_table import Cells

__all__ = ["Components", "cluster_of_rank", "principal_components"]

_MAX_COMPONENTS = 3
_MAX_CLUSTERS = 5
_MIN_SILHOUETTE = 0.6
"""Below it one cluster describes the ranks as well as several; 0.5 is the usual border of
structure (Kaufman and Rousseeuw 1990), and ranks of pure noise come near it."""
_LLOYD_ROUNDS = 100
_MAX_RANKS_OF_SILHOUETTE = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Components:
    """The directions in which ranks differ most."""

    explained_fraction: tuple[float, ...]
    """Share of the variance over ranks each component holds, largest first; empty where ranks do
    not differ."""
    scores: Cells
    """(ranks, components): where each rank lies along them."""


def principal_components(values: Cells) -> Components:
    """The first three principal components of ranks by what they did over iterations.

    Args:
        values: (ranks, iterations); the mean over ranks is taken off each iteration, so what all
            ranks did together is no component.
    """
    centered = values - values.mean(axis=0, keepdims=True)
    # Of the ranks x ranks matrix: there are far fewer ranks than iterations, or as many.
    variance, directions = np.linalg.eigh(centered @ centered.T)
    variance, directions = np.clip(variance[::-1], 0.0, None), directions[:, ::-1]
    total = float(variance.sum())
    if total <= 1e-24 * float(np.square(values).sum()):
        return Components(explained_fraction=(), scores=np.zeros((len(values), 0)))
    kept = min(_MAX_COMPONENTS, len(values) - 1)
    scores = directions[:, :kept] * np.sqrt(variance[:kept])
    # The sign of a direction is arbitrary; the rank farthest out lies on the positive side.
    farthest = np.abs(scores).argmax(axis=0)
    signs = np.where(scores[farthest, np.arange(kept)] < 0, -1.0, 1.0)
    return Components(
        explained_fraction=tuple(float(part / total) for part in variance[:kept]),
        scores=scores * signs,
    )


def cluster_of_rank(scores: Cells) -> tuple[int, ...]:
    """The cluster of each rank, numbered by size, largest first; all 0 where none stand apart.

    k-means for each k up to five, started from the points farthest apart, so that it draws
    nothing; the k with the best mean silhouette is taken.
    """
    num_ranks = len(scores)
    best = np.zeros(num_ranks, dtype=np.int64)
    if scores.shape[1] == 0 or num_ranks < 3:
        return tuple(best.tolist())
    best_silhouette = _MIN_SILHOUETTE
    step = -(-num_ranks // _MAX_RANKS_OF_SILHOUETTE)
    sampled = scores[::step]
    distances = np.linalg.norm(sampled[:, None, :] - sampled[None, :, :], axis=-1)
    for num_clusters in range(2, min(_MAX_CLUSTERS, num_ranks - 1) + 1):
        labels = _k_means(scores, num_clusters)
        silhouette = _silhouette(distances, labels[::step])
        if silhouette > best_silhouette:
            best, best_silhouette = labels, silhouette
    sizes = np.bincount(best)
    order = np.argsort(-sizes, kind="stable")
    number = np.empty_like(order)
    number[order] = np.arange(len(order))
    return tuple(number[best].tolist())


def _k_means(points: Cells, num_clusters: int) -> np.ndarray:
    centers = points[[int(np.linalg.norm(points - np.median(points, axis=0), axis=1).argmin())]]
    while len(centers) < num_clusters:
        nearest = np.linalg.norm(points[:, None] - centers[None], axis=-1).min(axis=1)
        centers = np.vstack([centers, points[int(nearest.argmax())]])
    labels = np.zeros(len(points), dtype=np.int64)
    for _ in range(_LLOYD_ROUNDS):
        labels = np.linalg.norm(points[:, None] - centers[None], axis=-1).argmin(axis=1)
        moved = np.array(
            [
                points[labels == index].mean(axis=0) if (labels == index).any() else center
                for index, center in enumerate(centers)
            ]
        )
        if np.allclose(moved, centers, rtol=1e-9, atol=0.0):
            break
        centers = moved
    return labels


def _silhouette(distances: Cells, labels: np.ndarray) -> float:
    """Mean over points of (b - a) / max(a, b): a to its own cluster, b to the nearest other one.

    A point alone in its cluster would count as 0 by the usual rule; here its a is the median of
    those that are not alone, for one slow rank alone is just what is looked for.
    """
    present = np.unique(labels)
    if len(present) < 2:
        return -1.0
    mean_to = np.stack([distances[:, labels == label].mean(axis=1) for label in present], axis=1)
    own = np.searchsorted(present, labels)
    rows = np.arange(len(labels))
    size = np.array([(labels == label).sum() for label in present])[own]
    alone = size == 1
    if alone.all():
        return -1.0
    inner = mean_to[rows, own] * size / np.maximum(size - 1, 1)
    inner[alone] = np.median(inner[~alone])
    mean_to[rows, own] = np.inf
    outer = mean_to.min(axis=1)
    return float(((outer - inner) / np.maximum(np.maximum(inner, outer), 1e-300)).mean())
