"""Metrics that need the features themselves: KID, and precision and recall; both in parts that can run side by side."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from threadpoolctl import threadpool_limits

from ray_sampler.scoring.features import Features, rows_at
from ray_sampler.scoring.moments import SEED

SUBSETS, SUBSET_SIZE = 100, 1000
"""Of KID; a subset is smaller where there are fewer samples."""

NEIGHBOUR = 3
"""The neighbour to which a ball of precision and recall reaches."""

ROWS = 4096
"""Samples of which the distances to all others are computed in one part."""

Pair = tuple[np.ndarray, np.ndarray]


def kid_subset_size(n: int, m: int) -> int:
    return min(SUBSET_SIZE, n, m)


def kid_subsets(n: int, m: int) -> list[Pair]:
    """Positions among n and m samples that each of the subsets consists of: those that torch-fidelity draws."""
    random, size = np.random.RandomState(SEED), kid_subset_size(n, m)
    return [(random.choice(n, size, replace=False), random.choice(m, size, replace=False)) for _ in range(SUBSETS)]


def kid_part(features: Features, reference: Features, subsets: Sequence[Pair]) -> list[float]:
    """The squared MMD of each subset (Binkowski et al. 2018): unbiased, under the kernel (x.y / D + 1)^3."""
    sides = []
    for side, of in enumerate((features, reference)):
        positions = np.unique(np.concatenate([subset[side] for subset in subsets]))
        rows = rows_at(of, positions)
        sides.append([rows[np.searchsorted(positions, subset[side])].astype(np.float64) for subset in subsets])
    with threadpool_limits(1):
        return [squared_mmd(x, y) for x, y in zip(*sides, strict=True)]


def squared_mmd(x: np.ndarray, y: np.ndarray) -> float:
    n, dims = x.shape
    xx, yy, xy = ((a @ b.T / dims + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    within = xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)
    return float(within / (n * (n - 1)) - 2 * xy.mean())


def squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(n, m) float32."""
    lengths = np.einsum("ij,ij->i", x, x)[:, None] + np.einsum("ij,ij->i", y, y)
    return (lengths - 2 * (x @ y.T)).clip(min=0)


def radii(features: Features, start: int) -> np.ndarray:
    """Squared distances from each of the samples [start, start + 4,096) to its third neighbour, itself left out."""
    rows = rows_at(features, np.arange(start, min(start + ROWS, features.count)))
    nearest = np.full((len(rows), NEIGHBOUR), np.inf, np.float32)
    at = 0
    with threadpool_limits(1):
        for block in features.blocks():
            distances = squared_distances(rows, block)
            own = np.arange(max(start, at), min(start + len(rows), at + len(block)))
            distances[own - start, own - at] = np.inf
            nearest = np.partition(np.hstack([nearest, distances]), NEIGHBOUR - 1, axis=1)[:, :NEIGHBOUR]
            at += len(block)
    return nearest[:, -1]


def within(features: Features, start: int, others: Features, radii: np.ndarray) -> np.ndarray:
    """Whether each of the samples [start, start + 4,096) lies in the ball of any other sample; `radii` as above."""
    rows = rows_at(features, np.arange(start, min(start + ROWS, features.count)))
    found, at = np.zeros(len(rows), bool), 0
    with threadpool_limits(1):
        for block in others.blocks():
            found |= (squared_distances(rows, block) <= radii[at : at + len(block)]).any(axis=1)
            at += len(block)
    return found
