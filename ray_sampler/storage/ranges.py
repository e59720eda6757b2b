"""Folders of ranges: what is in them, which range each sample comes from, and which samples are missing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from ray_sampler.storage.record import FragmentName, in_order
from ray_sampler.storage.store import Store


class Listing(NamedTuple):
    """What lies in a folder of ranges."""

    fragments: list[FragmentName]
    """As `in_order` sorts them."""
    foreign: list[str]
    """Names that are no range's, folders and links among them."""
    modified: dict[FragmentName, float]
    """Unix time of each range's last write, where the store tells."""


class RangeSet:
    """A folder of files, each of which holds something of the samples [start, stop) that its name says."""

    def __init__(self, store: Store, folder: str) -> None:
        self._store = store
        self.folder = folder

    def list(self, times: bool = False) -> Listing:
        """What is there, never from a cache; with `times`, when each was written, where the store says."""
        names, foreign, modified = [], [], {}
        for entry in self._store.list(self.folder, times):
            name = FragmentName.parse(entry.name) if entry.is_file else None
            if name is not None:
                names.append(name)
                if entry.modified is not None:
                    modified[name] = entry.modified
            else:
                foreign.append(entry.name)
        return Listing(in_order(names), sorted(foreign), modified)

    def write(self, name: FragmentName, data: bytes) -> None:
        """Write a range, which is complete or absent."""
        self._store.put(f"{self.folder}/{name.filename}", data)

    def read(self, name: FragmentName) -> bytes | None:
        """The bytes of a range, None where it is not there."""
        return self._store.read(f"{self.folder}/{name.filename}")

    def read_end(self, name: FragmentName, size: int) -> bytes | None:
        """The last `size` bytes of a range, None where it is not there."""
        return self._store.read_end(f"{self.folder}/{name.filename}", size)


class Piece(NamedTuple):
    """Samples [start, stop) come from this fragment."""

    start: int
    stop: int
    fragment: FragmentName


def cover(fragments: Iterable[FragmentName], num_samples: int) -> list[Piece]:
    """The pieces that make up as much of [0, num_samples) as there is, in order and without overlap.

    Where fragments overlap, a sample comes from the first one `in_order`. In that order each fragment adds what lies
    beyond all before it, so one pass does.
    """
    pieces = []
    reached = 0
    for name in in_order(fragments):
        start, stop, _ = name
        # Plain comparisons: there may be a million names, and max() and min() take twice as long.
        if start < reached:
            start = reached
        if stop > num_samples:
            stop = num_samples
        if start < stop:
            pieces.append(Piece(start, stop, name))
            reached = stop
    return pieces


def missing(pieces: Iterable[Piece], num_samples: int) -> list[tuple[int, int]]:
    """The ranges of [0, num_samples) that `pieces`, as `cover` gives them, leave out."""
    gaps = []
    reached = 0
    for piece in pieces:
        if piece.start > reached:
            gaps.append((reached, piece.start))
        reached = piece.stop
    if reached < num_samples:
        gaps.append((reached, num_samples))
    return gaps
