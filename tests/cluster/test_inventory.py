"""What becomes missing when a fragment turns out to be damaged is sampled again, and nothing else."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ray_sampler.cluster.inventory import without
from ray_sampler.storage.ranges import cover, missing
from ray_sampler.storage.record import FragmentName

NAMES = st.lists(
    st.tuples(st.integers(0, 40), st.integers(1, 12)).map(lambda p: FragmentName(p[0], p[0] + p[1], "parquet")),
    max_size=12,
    unique=True,
)

RANGES = st.lists(st.integers(0, 60), max_size=24, unique=True).map(
    lambda ends: [(a, b) for a, b in zip(sorted(ends)[::2], sorted(ends)[1::2], strict=False)]
)


@given(RANGES, RANGES)
def test_ranges_without_others_are_those_samples_that_are_in_none_of_them(now, before):
    def samples(ranges):
        return [i for start, stop in ranges for i in range(start, stop)]

    assert samples(without(now, before)) == [i for i in samples(now) if i not in samples(before)]


@given(NAMES, st.data())
def test_the_ranges_that_only_damaged_fragments_held_become_missing(names, data):
    damaged = set(data.draw(st.lists(st.sampled_from(names), unique=True))) if names else set()
    before = missing(cover(names, 45), 45)
    now = missing(cover([name for name in names if name not in damaged], 45), 45)
    whole = {i for name in names if name not in damaged for i in range(name.start, name.stop)}
    lost = {i for name in damaged for i in range(name.start, min(name.stop, 45))} - whole
    ranges = without(now, before)
    assert [i for start, stop in ranges for i in range(start, stop)] == sorted(lost)
    assert all(start < stop for start, stop in ranges)


def test_what_is_newly_missing_is_found_in_one_pass_over_the_gaps() -> None:
    """Each gap is looked at about once, however many there are: the driver's loop waits for it."""
    looks = 0

    class Counted(int):
        def __le__(self, other: int) -> bool:
            nonlocal looks
            looks += 1
            return int(self) <= other

    before = [(Counted(i), Counted(i + 1)) for i in range(0, 8000, 2)]
    now = [*before[:2000], (4000, 4004), *before[2002:]]
    assert without(now, before) == [(4001, 4002), (4003, 4004)]
    assert looks < 4 * len(before)
