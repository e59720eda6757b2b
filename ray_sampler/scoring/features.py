"""Features of many pictures, read in fixed blocks of indices, so that what is added up does not depend on files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ray_sampler.errors import RunError
from ray_sampler.storage.ranges import Piece, RangeSet
from ray_sampler.storage.record import Column, DamagedFragment, FragmentName
from ray_sampler.storage.run_dir import RunDir

BLOCK = 1024
"""Indices of a block."""

FEATURES = "features"
"""The column's name, and the role of the network that makes it."""


class DamagedFeaturesError(Exception):
    """A file of features is damaged or gone."""

    def __init__(self, ranges: RangeSet, name: FragmentName, reason: str) -> None:
        super().__init__(ranges, name, reason)
        self.ranges = ranges
        """The folder in which it lies."""
        self.name = name
        self.reason = reason


class Features(Protocol):
    """Features of n pictures."""

    @property
    def count(self) -> int:
        """n, at least 1."""

    def blocks(self) -> Iterator[np.ndarray]:
        """(up to 1,024, D) float32: those of each block of indices that has any, in order."""


@dataclass(frozen=True)
class Held:
    """Features in memory."""

    array: np.ndarray
    """(n, D) float32."""

    @property
    def count(self) -> int:
        return len(self.array)

    def blocks(self) -> Iterator[np.ndarray]:
        return (self.array[at : at + BLOCK] for at in range(0, len(self.array), BLOCK))


@dataclass(frozen=True)
class StoredFeatures:
    """Features in a folder of ranges."""

    output: str
    """Absolute path or URL of the run directory."""
    folder: str
    fingerprint: str
    """Of the pictures that they are of."""
    dims: int
    pieces: tuple[Piece, ...]
    """The files that make them up, in order and without overlap."""

    @property
    def count(self) -> int:
        return sum(piece.stop - piece.start for piece in self.pieces)

    def blocks(self) -> Iterator[np.ndarray]:
        """As of `Features`.

        Raises:
            DamagedFeaturesError: a file is; what was taken before may be wrong.
            RunError: a value is not finite.
        """
        return in_blocks(self._parts())

    def _parts(self) -> Iterator[tuple[int, np.ndarray]]:
        """Index of the first, and features."""
        ranges = RunDir(self.output).ranges(self.folder, {FEATURES: Column("float32", (self.dims,))})
        for start, stop, name in self.pieces:
            try:
                for group in ranges.read_groups(name, self.fingerprint)[1]:
                    first, last = max(start, group.start), min(stop, group.stop)
                    if first < last:
                        rows = group.part(first, last).columns[FEATURES]
                        self._check(first, rows)
                        yield first, rows
            except DamagedFragment as error:
                raise DamagedFeaturesError(ranges, name, str(error)) from error

    def _check(self, start: int, rows: np.ndarray) -> None:
        wrong = start + np.flatnonzero(~np.isfinite(rows).all(axis=1))
        if len(wrong):
            raise RunError(
                f"the extractor gave features that are not finite for {len(wrong)} of the samples {start} to "
                f"{start + len(rows) - 1}, the first of them {wrong[0]}; correct it, delete {self.folder} in "
                "the output, and run the same command again"
            )


def in_blocks(parts: Iterable[tuple[int, np.ndarray]]) -> Iterator[np.ndarray]:
    """Rows, of which each part has the index of its first, joined and cut at the multiples of 1,024."""
    held: list[np.ndarray] = []
    at = 0
    for start, rows in parts:
        while len(rows):
            if held and start // BLOCK != at:
                yield np.concatenate(held)
                held = []
            at, size = start // BLOCK, BLOCK - start % BLOCK
            held.append(rows[:size])
            start, rows = start + size, rows[size:]
    if held:
        yield np.concatenate(held)


def rows_at(features: Features, positions: np.ndarray) -> np.ndarray:
    """The rows at some positions, each once and ascending: (len(positions), D)."""
    found, at = [], 0
    for block in features.blocks():
        first, last = np.searchsorted(positions, (at, at + len(block)))
        found.append(block[positions[first:last] - at])
        at += len(block)
    return np.concatenate(found)
