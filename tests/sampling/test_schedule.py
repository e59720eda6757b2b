"""Schedules are those of Karras et al. 2022, equation 5."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ray_sampler.sampling.schedules import karras_sigmas, multistep_sigmas


def formula(position: float, sigma_min: float, sigma_max: float, rho: float) -> float:
    """The level at a position from 0 (sigma_max) to 1 (sigma_min), in float64."""
    return float((sigma_max ** (1 / rho) + position * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho)


@pytest.mark.parametrize(
    ("key", "n", "sigma_min", "sigma_max", "rho"),
    [("sigmas40", 40, 0.002, 80.0, 7.0), ("sigmas18_rho5", 18, 0.01, 50.0, 5.0)],
)
def test_schedules_equal_the_original(
    golden: Path, key: str, n: int, sigma_min: float, sigma_max: float, rho: float
) -> None:
    expected = np.load(golden / "schedule.npz")[key]
    np.testing.assert_allclose(karras_sigmas(n, sigma_min, sigma_max, rho).numpy(), expected, rtol=1e-6)


@given(
    n=st.integers(2, 300),
    sigma_min=st.floats(1e-3, 0.5),
    sigma_max=st.floats(1.0, 200.0),
    rho=st.floats(1.0, 10.0),
)
def test_schedules_follow_the_formula_and_end_in_zero(n: int, sigma_min: float, sigma_max: float, rho: float) -> None:
    sigmas = karras_sigmas(n, sigma_min, sigma_max, rho)
    assert sigmas.dtype == torch.float32
    assert sigmas.shape == (n + 1,)
    assert sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()
    expected = [formula(i / (n - 1), sigma_min, sigma_max, rho) for i in range(n)]
    # Near sigma_min the float32 sum cancels, by an error of about one part in 2^24 of sigma_max^(1/rho).
    cancelled = (sigma_max / sigma_min) ** (1 / rho)
    np.testing.assert_allclose(sigmas[:-1].numpy(), expected, rtol=2e-7 * rho * (1 + cancelled))


def test_one_point_is_sigma_max_and_zero() -> None:
    assert karras_sigmas(1, 0.002, 80.0).tolist() == pytest.approx([80.0, 0.0], rel=1e-6)


def test_schedules_live_on_the_host() -> None:
    assert karras_sigmas(4, 0.002, 80.0).device.type == "cpu"


@given(data=st.data(), steps=st.integers(2, 300))
def test_multistep_levels_follow_the_formula(data: st.DataObject, steps: int) -> None:
    ts = tuple(data.draw(st.lists(st.integers(0, steps - 1), min_size=1, max_size=5)))
    sigmas = multistep_sigmas(ts, steps, 0.002, 80.0)
    assert sigmas == pytest.approx([formula(t / (steps - 1), 0.002, 80.0, 7.0) for t in ts], rel=1e-12)


@pytest.mark.parametrize("steps", [2, 18, 40, 151, 201])
def test_the_last_multistep_index_is_exactly_sigma_min(steps: int) -> None:
    """So that no noise has to be drawn for it."""
    assert multistep_sigmas((0, steps - 1), steps, 0.002, 80.0)[-1] == 0.002
