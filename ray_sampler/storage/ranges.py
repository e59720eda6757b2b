"""Which fragment each sample comes from, and which samples are missing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from ray_sampler.storage.record import FragmentName, in_order


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
