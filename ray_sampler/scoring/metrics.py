"""Metrics of features: moments, the Frechet distance and the Inception Score in one pass; KID, precision and recall.

Memory does not grow with N. Sums are float64, of fixed blocks of 1,024 indices, added in the order of the indices and
computed by one thread: so they have the same bits whatever files and machines the features came from. KID, precision
and recall need the features themselves, in parts that can run side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits

from ray_sampler.scoring.features import Features, rows_at

SEED = 2020
"""Of the permutation of the Inception Score and of the subsets of KID, as in torch-fidelity."""
SPLITS = 10
"""Into which the Inception Score divides the samples."""

Head = Callable[[np.ndarray], np.ndarray]


class Moments(NamedTuple):
    """Of features (n, D)."""

    mu: np.ndarray
    """(D,) float64."""
    sigma: np.ndarray
    """(D, D) float64, divided by n - 1."""


class Reduced(NamedTuple):
    """What one pass over features gives."""

    moments: Moments
    inception_score: tuple[float, float] | None
    """Mean and standard deviation over the splits; None where there is no head."""


def reduce(features: Features, head: Head | None = None) -> Reduced:
    """Moments and, of the logits that `head` makes of features, the Inception Score.

    Raises:
        DamagedFeaturesError, RunError: from the features.
    """
    score = SplitEntropies(features.count) if head else None
    n, sums, products = 0, np.zeros(()), np.zeros(())
    with threadpool_limits(1):
        for block in features.blocks():
            rows = block.astype(np.float64)
            sums = sums + rows.sum(axis=0)
            products = products + rows.T @ rows
            if score and head:
                score.add(n, head(block))
            n += len(rows)
        mu = sums / n
        products -= n * np.outer(mu, mu)
        return Reduced(Moments(mu, products / (n - 1)), score.result() if score else None)


def frechet(one: Moments, other: Moments) -> float:
    """|mu1 - mu2|^2 + tr s1 + tr s2 - 2 tr (s1 s2)^(1/2) (Heusel et al. 2017, eq. 6; FID for Inception features).

    The root's trace is that of (r s2 r)^(1/2), r the symmetric root of s1: a sum over eigenvalues that are real.
    """
    with threadpool_limits(1):
        values, vectors = np.linalg.eigh(one.sigma)
        root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
        trace = np.sqrt(np.linalg.eigvalsh(root @ other.sigma @ root).clip(min=0)).sum()
    difference = one.mu - other.mu
    return float(difference @ difference + np.trace(one.sigma) + np.trace(other.sigma) - 2 * trace)


def compare(reduced: Reduced, other: Reduced | Moments | None) -> tuple[float | None, tuple[float, float] | None]:
    """The Frechet distance, and the Inception Score that was reduced beside the moments."""
    moments = other.moments if isinstance(other, Reduced) else other
    return frechet(reduced.moments, moments) if moments else None, reduced.inception_score


class SplitEntropies:
    """The sums of which the Inception Score is made (Salimans et al. 2016), with torch-fidelity's ten random splits.

    The mean divergence of a split is mean(sum p log p) - sum q log q, q the mean of its p.
    """

    def __init__(self, count: int) -> None:
        order = np.random.RandomState(SEED).permutation(count)
        self.split_of = np.empty(count, np.int8)
        self.sizes = np.zeros(SPLITS)
        for split in range(SPLITS):
            chosen = order[split * count // SPLITS : (split + 1) * count // SPLITS]
            self.split_of[chosen] = split
            self.sizes[split] = len(chosen)
        self.p_log_p = np.zeros(SPLITS)
        self.p = np.zeros((SPLITS, 1))

    def add(self, position: int, logits: np.ndarray) -> None:
        """Logits (n, K) of the samples from a position on."""
        shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
        log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        p, split_of = np.exp(log_p), self.split_of[position : position + len(logits)]
        rows = (p * log_p).sum(axis=1)
        self.p_log_p = self.p_log_p + [rows[split_of == split].sum() for split in range(SPLITS)]
        self.p = self.p + np.stack([p[split_of == split].sum(axis=0) for split in range(SPLITS)])

    def result(self) -> tuple[float, float]:
        """Mean and standard deviation over the splits."""
        q = self.p / self.sizes[:, None]
        scores = np.exp(self.p_log_p / self.sizes - (q * np.log(q.clip(min=np.finfo(float).tiny))).sum(axis=1))
        return float(scores.mean()), float(scores.std())


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
