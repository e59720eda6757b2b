from __future__ import annotations

import time

from hypothesis import given, settings
from hypothesis import strategies as st

from ray_sampler.storage.ranges import Piece, cover, missing
from ray_sampler.storage.record import FragmentName

NAMES = st.builds(
    lambda start, count, format: FragmentName(start, start + count, format),
    st.integers(0, 40),
    st.integers(1, 15),
    st.sampled_from(["parquet", "npz"]),
)


def winner(names, index):
    """The fragment that a sample comes from, by the rule's own words."""
    holding = [name for name in names if name.start <= index < name.stop]
    return min(holding, key=lambda name: (name.start, -name.stop, name.filename), default=None)


@settings(max_examples=300)
@given(names=st.lists(NAMES, max_size=12), num_samples=st.integers(1, 60))
def test_overlaps_go_to_the_smallest_start_then_the_largest_stop_then_the_first_name(names, num_samples):
    pieces = cover(names, num_samples)
    by_index = {index: piece.fragment for piece in pieces for index in range(piece.start, piece.stop)}
    assert sum(piece.stop - piece.start for piece in pieces) == len(by_index)
    assert [by_index.get(index) for index in range(num_samples)] == [winner(names, i) for i in range(num_samples)]
    assert pieces == sorted(pieces)
    gaps = {index for start, stop in missing(pieces, num_samples) for index in range(start, stop)}
    assert gaps == set(range(num_samples)) - set(by_index)


def test_nothing_is_missing_nothing_and_everything():
    assert missing([], 5) == [(0, 5)]
    name = FragmentName(0, 9, "parquet")
    assert cover([name], 5) == [Piece(0, 5, name)]
    assert missing(cover([name], 5), 5) == []


def test_the_cost_of_a_fragment_does_not_grow_with_their_number():
    """Of sixteen times as many, a cost that grew with their number would make 256 times as much."""

    def seconds(stop: int) -> float:
        names = [FragmentName(i, i + 2, "parquet") for i in range(0, stop, 2)]
        started = time.process_time()
        assert missing(cover(reversed(names), stop), stop) == []
        return time.process_time() - started

    assert min(seconds(80_000) for _ in range(2)) < 100 * min(seconds(5_000) for _ in range(3))
