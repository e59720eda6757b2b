from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from ray_sampler.reporting.status import FragmentFact, Status, describe_ranges, render, status
from ray_sampler.storage.record import FragmentName

FINGERPRINT = "7f3a91c2" * 8


def fact(start: int, stop: int, modified: float | None = None, *more: str) -> FragmentFact:
    return FragmentFact(FragmentName(start, stop, "parquet"), modified, *more)


def standing(facts: list[FragmentFact], num_samples: int = 1000, archive: str | None = None, now: float = 0) -> Status:
    return status(FINGERPRINT, num_samples, facts, archive, now)


@given(st.lists(st.tuples(st.integers(0, 120), st.integers(1, 40)), max_size=8), st.integers(1, 130))
def test_finished_and_missing_are_what_the_fragments_cover(ranges: list[tuple[int, int]], num_samples: int) -> None:
    found = standing([fact(start, start + length) for start, length in ranges], num_samples)
    covered = {i for start, length in ranges for i in range(start, start + length)} & set(range(num_samples))
    missing = [i for start, stop in found.missing for i in range(start, stop)]
    assert found.finished == len(covered)
    assert missing == sorted(set(range(num_samples)) - covered)
    assert all(a[1] < b[0] for a, b in zip(found.missing, found.missing[1:], strict=False))


def test_rate_and_eta_come_from_the_last_fragments() -> None:
    early = [fact(k * 10, k * 10 + 10, 100.0 * k) for k in range(40)]
    late = [fact(400 + k * 10, 410 + k * 10, 3900.0 + 5 * (k + 1)) for k in range(25)]
    found = standing(early + late, now=4030.0)
    assert found.rate == pytest.approx(2)
    assert found.eta_s == pytest.approx(350 / 2)
    assert found.state == "sampling"


def test_a_pause_between_two_runs_does_not_spoil_the_rate() -> None:
    before = [fact(k * 10, k * 10 + 10, 10.0 * k) for k in range(5)]
    after = [fact(50 + k * 10, 60 + k * 10, 90_000 + 10.0 * k) for k in range(5)]
    assert standing(before + after, now=90_045.0).rate == pytest.approx(1)


def test_a_run_that_writes_no_more_has_no_eta() -> None:
    found = standing([fact(k * 10, k * 10 + 10, 10.0 * k) for k in range(5)], now=4000.0)
    assert (found.state, found.running, found.eta_s, found.quiet_s) == ("stopped", False, None, 3960.0)


def test_every_state_has_its_name() -> None:
    whole = [fact(0, 1000, 5.0)]
    assert standing([]).state == "empty"
    assert standing(whole).state == "sampled"
    assert standing(whole, archive="samples_1000x32x32x3.npz").state == "done"
    assert standing(whole, num_samples=2000, archive="samples_1000x32x32x3.npz", now=9e9).state == "stopped"


def test_mixed_hardware_is_said() -> None:
    facts = [fact(0, 400, 1.0, "NVIDIA A10G", "a"), fact(400, 1000, 2.0, "NVIDIA H200", "h")]
    found = standing(facts)
    assert found.mixed_numerics
    assert found.devices == (("NVIDIA H200", 600), ("NVIDIA A10G", 400))
    assert not standing(facts[:1]).mixed_numerics


def test_missing_ranges_are_shortened() -> None:
    ranges = [(k * 1024, k * 1024 + 512) for k in range(5)]
    assert describe_ranges(ranges, shown=2) == "0-511, 1,024-1,535 and 3 more"
    assert describe_ranges(ranges[:2], shown=2) == "0-511, 1,024-1,535"


def test_it_fits_80_columns_and_scripts_can_read_it() -> None:
    facts = [fact(k * 1024, k * 1024 + 512, 5.0 * k, "NVIDIA A10G", f"key {k}") for k in range(30)]
    found = standing(facts, num_samples=10_000_000, now=150.0)
    console = Console(width=80, color_system=None)
    with console.capture() as capture:
        console.print(render(found))
    assert max(map(len, capture.get().splitlines())) <= 80
    assert "15,360 of 10,000,000 samples" in capture.get()
    assert "and 22 more" in capture.get()
    found_json = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert found_json["finished"] == 15_360
    assert found_json["missing"][0] == [512, 1024]
