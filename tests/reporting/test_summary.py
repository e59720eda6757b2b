from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_sampler.reporting.summary import TIMELINE_POINTS, Part, Timeline, computed_by


@given(
    st.permutations(
        [Part(0, 4, "a", "A10G"), Part(4, 8, "a", "A10G"), Part(8, 9, "b", "H200"), Part(9, 12, "a", "A10G")]
    )
)
def test_who_computed_what_is_joined_to_as_few_ranges_as_possible(parts: list[Part]) -> None:
    assert computed_by(parts) == [
        {"key": "a", "device": "A10G", "samples": 11, "ranges": [[0, 8], [9, 12]]},
        {"key": "b", "device": "H200", "samples": 1, "ranges": [[8, 9]]},
    ]


def test_a_timeline_is_bounded_and_spans_the_whole_run() -> None:
    timeline = Timeline()
    for tick in range(100_000):
        timeline.add(tick * 0.5, rate=tick / 10, actors=tick // 1000)
    points = timeline.as_json()
    assert len(points["elapsed_s"]) == len(points["samples_per_second"]) == len(points["actors"])
    assert TIMELINE_POINTS / 2 <= len(points["elapsed_s"]) <= TIMELINE_POINTS
    assert points["elapsed_s"][0] == 0
    assert points["elapsed_s"][-1] > 0.99 * 49_999.5
    for seconds, rate in zip(points["elapsed_s"], points["samples_per_second"], strict=True):
        assert rate == pytest.approx(seconds / 5)


def test_mixed_hardware_is_said(summary: dict[str, Any]) -> None:
    assert summary["mixed_numerics"] is True
    assert [row["device"] for row in summary["computed_by"]] == ["NVIDIA A10G", "NVIDIA H200"]


def test_throughput_counts_only_what_this_run_computed_while_sampling(summary: dict[str, Any]) -> None:
    assert summary["samples_per_second"] == pytest.approx(37_712 / 4012.5, abs=1e-4)


def test_crcs_read_as_other_tools_print_them(summary: dict[str, Any]) -> None:
    assert [member["crc32"] for member in summary["archive"]["members"]] == ["deadbeef", "000012ab"]
