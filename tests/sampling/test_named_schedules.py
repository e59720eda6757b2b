"""Schedules by name: their formulas, their ends, and what of them decides a sample."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ray_sampler.config import RunConfig
from ray_sampler.errors import RequestError
from ray_sampler.sampling.schedules import SCHEDULES, ScheduleOptions, karras_sigmas, levels_of, schedule_identity


def levels(name: Any, steps: int = 5, low: float = 0.02, high: float = 40.0, **options: Any) -> list[float]:
    schedule = ScheduleOptions(steps=steps, sigma_min=low, sigma_max=high, schedule=name, **options)
    return levels_of(schedule).tolist()


def even(first: float, last: float, n: int = 5) -> list[float]:
    return [first + i * (last - first) / (n - 1) for i in range(n)]


def test_another_schedule_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCHEDULES, "halves", lambda schedule, n, dtype: torch.tensor([*(2.0**-i for i in range(n)), 0]))
    RunConfig(schedule="halves").check()
    assert levels("halves", 3) == [1, 0.5, 0.25, 0]
    with pytest.raises(RequestError, match=r"--schedule is 'thirds'; it must be one of karras, .*, halves"):
        RunConfig(schedule="thirds").check()


def test_karras_is_the_schedule_of_version_1_bit_for_bit() -> None:
    for dtype in (torch.float32, torch.float64):
        expected = karras_sigmas(7, 0.002, 80.0, 7.0, dtype)
        assert torch.equal(levels_of(ScheduleOptions(steps=7), dtype), expected)
        assert torch.equal(levels_of(ScheduleOptions(steps=7, schedule="karras"), dtype), expected)
    assert levels("karras", rho=3.0)[1] == pytest.approx((40 ** (1 / 3) * 0.75 + 0.02 ** (1 / 3) * 0.25) ** 3)


def test_logsnr_is_even_in_the_logarithm() -> None:
    assert levels("logsnr")[:-1] == pytest.approx([math.exp(u) for u in even(math.log(40), math.log(0.02))], rel=1e-12)


def test_linear_is_even_in_sigma() -> None:
    assert levels("linear")[:-1] == pytest.approx(even(40, 0.02), rel=1e-12)


def test_cosine_is_even_in_the_angle() -> None:
    expected = [math.tan(math.pi / 2 * u) for u in even(math.atan(40) * 2 / math.pi, math.atan(0.02) * 2 / math.pi)]
    assert levels("cosine")[:-1] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("s", [1.0, 3.0, 1 / 0.3, 0.5])
def test_shifted_is_even_in_the_flow_time_before_the_shift(s: float) -> None:
    shifted_times = [sigma / (1 + sigma) for sigma in levels("shifted", shift=s)[:-1]]
    times = [t / (s - (s - 1) * t) for t in shifted_times]  # t' = s t / (1 + (s - 1) t), turned round
    assert times == pytest.approx(even(times[0], times[-1]), rel=1e-10)


def test_a_shift_of_one_changes_nothing() -> None:
    times = [sigma / (1 + sigma) for sigma in levels("shifted")[:-1]]
    assert times == pytest.approx(even(40 / 41, 0.02 / 1.02), rel=1e-12)


@given(
    name=st.sampled_from(sorted(SCHEDULES)),
    n=st.integers(1, 200),
    low=st.floats(1e-3, 0.5),
    high=st.floats(1.0, 200.0),
    shift=st.floats(0.1, 10.0),
)
def test_levels_fall_from_sigma_max_to_sigma_min_and_then_0(
    name: Any, n: int, low: float, high: float, shift: float
) -> None:
    found = levels(name, n, low, high, shift=shift)
    assert len(found) == n + 1
    assert found[0] == pytest.approx(high, rel=1e-9)
    assert found[-1] == 0
    assert all(a > b for a, b in itertools.pairwise(found))
    if n > 1:
        assert found[-2] == pytest.approx(low, rel=1e-9)


def test_given_levels_stand_in_the_place_of_a_schedule() -> None:
    schedule = ScheduleOptions(sigmas="80.0,2.5,0.3,0.0")
    assert levels_of(schedule).tolist() == [80.0, 2.5, 0.3, 0.0]
    assert levels_of(schedule, torch.float32).dtype == torch.float32
    assert schedule_identity(schedule, ("steps", "sigma_min", "schedule")) == {"sigmas": "80.0,2.5,0.3,0.0"}


OLD, NEW = ("steps", "sigma_max", "sigma_min"), ("steps", "sigma_max", "sigma_min", "schedule")
PLAIN = {"sigma_max": 80.0, "sigma_min": 0.002, "steps": 40}


@pytest.mark.parametrize(
    ("options", "used", "expected"),
    [
        ({}, OLD, PLAIN),
        ({"schedule": "karras", "shift": 3.0}, OLD, PLAIN),
        ({"rho": 5.0}, OLD, PLAIN | {"rho": 5.0}),
        ({"schedule": "logsnr", "rho": 5.0}, OLD, PLAIN | {"schedule": "logsnr"}),
        ({"schedule": "shifted", "shift": 3.0}, OLD, PLAIN | {"schedule": "shifted", "shift": 3.0}),
        ({}, NEW, PLAIN | {"schedule": "karras"}),
        ({"schedule": "karras", "rho": 5.0}, NEW, PLAIN | {"schedule": "karras", "rho": 5.0}),
        ({"nfe": 9}, NEW, PLAIN | {"schedule": "karras"}),
        ({"schedule": "logsnr"}, ("sigma_max",), {"sigma_max": 80.0}),
        ({"schedule": "logsnr"}, (), {}),
    ],
)
def test_only_what_applies_and_differs_from_version_1_is_in_the_identity(
    options: dict[str, Any], used: tuple[str, ...], expected: dict[str, Any]
) -> None:
    assert schedule_identity(ScheduleOptions(**options), used) == expected


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"rho": 0.0}, "--rho"),
        ({"shift": 0.0}, "--shift"),
        ({"shift": math.nan}, "--shift"),
        ({"shift": 1e-320}, "--shift"),
        ({"nfe": 0}, "--nfe"),
    ],
)
def test_wrong_values_are_refused(options: dict[str, Any], flag: str) -> None:
    with pytest.raises(RequestError, match=f"{flag} is"):
        ScheduleOptions(**options).check()
